"""What a call costs the host: each operator on tensors of one element, beside plain PyTorch's own cost of the same.

One thread; a forward without gradients, and a step with them. Medians of rounds in which both take turns.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from kdkernels.cli.machine import machine
from kdkernels.cli.table import print_table
from kdkernels.testing import names, operators
from kdkernels.testing.host import Cost, cases, measure

COLUMNS = ("operator", "case", "direction", "ours, µs", "PyTorch, µs", "ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `host-overhead`."""
    parser.add_argument("--op", choices=names(), action="append", help="only this operator or family (repeatable)")
    parser.add_argument("--rounds", type=int, default=15, help="of a hundred calls each (default 15)")
    parser.add_argument("--json", metavar="PATH", help="write JSON to PATH too")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if arguments.rounds < 1:
        raise SystemExit(f"--rounds is {arguments.rounds}, but must be at least 1")
    wanted = {op for name in arguments.op or names() for op in operators(name)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [
            cost
            for case in cases()
            if case.op.removesuffix("_group") in wanted
            for cost in measure(case, arguments.rounds)
        ]
    finally:
        torch.set_num_threads(threads)
    print_table("Host overhead, one element", COLUMNS, [cells(cost) for cost in costs])
    if arguments.json:
        report = {"machine": machine(), "results": [asdict(cost) | {"ratio": cost.ratio} for cost in costs]}
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def cells(cost: Cost) -> tuple[str, ...]:
    """One row."""
    times = (f"{1e6 * cost.ours_s:.1f}", f"{1e6 * cost.plain_s:.1f}")
    return (cost.op, cost.case, cost.direction, *times, f"{cost.ratio:.2f}×")
