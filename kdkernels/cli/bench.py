"""Time the operators against eager PyTorch and torch.compile, side by side in one run.

A variant's times are printed only if its results passed their error budget in this run.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from kdkernels.cli.machine import machine
from kdkernels.cli.table import RED, print_table
from kdkernels.testing import SUITES, names, operators, workloads
from kdkernels.testing.compare import Deviation, poisoned_memory
from kdkernels.testing.memory import peak_extra_bytes
from kdkernels.testing.rates import Rates, measure_rates
from kdkernels.testing.timing import interleave, medians

COLUMNS = (
    *("case", "variant", "ms", "× eager", "× compile", "over linear"),
    *("GFLOP/s", "of matmul", "GB/s", "of copy", "× floor", "extra MiB"),
)
BASELINES = {"eager": "eager", "compile": "torch.compile"}


@dataclass(frozen=True)
class Row:
    """One variant of one case. Without `ok` there are no times."""

    op: str
    case: str
    variant: str
    ok: bool
    worst_error: str
    backend: str | None = None
    method: str | None = None
    median_s: float | None = None
    times_s: tuple[float, ...] = ()
    speedup_over_eager: float | None = None
    speedup_over_compile: float | None = None
    overhead_over_linear: float | None = None  # where the plain layer is a variant: what the rest adds to it
    gflop_per_s: float | None = None
    share_of_matmul: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    ratio_to_floor: float | None = None  # of the time to that of its FLOPs or of its bytes alone, whichever is longer
    peak_extra_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("--op", choices=names(), action="append", help="only this operator or family (repeatable)")
    parser.add_argument("--case", default="*", help="only cases whose name matches this pattern, such as '*D=4096*'")
    parser.add_argument("--quick", action="store_true", help="small sizes: a test of the benchmark, not of the speed")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="write JSON to PATH, or print it")
    parser.add_argument("--png", metavar="PATH", help="draw the speed-ups (needs matplotlib)")
    parser.add_argument("--threads", type=int, help="threads of torch and of kdkernels")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="time for each case's rounds (default 30, quick 0.3)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (as --quick does)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and return the exit code: 1 when one of our results was wrong."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    seconds = arguments.seconds if arguments.seconds is not None else (0.3 if arguments.quick else 30.0)
    ops = [op for name in arguments.op or SUITES for op in operators(name)]
    known = [workload for op in ops for workload in workloads(op, arguments.quick, arguments.device)]
    cases = [workload for workload in known if fnmatch(workload.name, arguments.case)]
    if not cases:
        listed = "\n  ".join(workload.name for workload in known)
        print(f"no case matches {arguments.case!r}; the cases are\n  {listed}", file=sys.stderr)
        return 2
    rates = measure_rates(arguments.device, (torch.float32, torch.bfloat16), quick=arguments.quick)
    memory = not (arguments.no_memory or arguments.quick)
    if (load := os.getloadavg()[0]) > 0.5 and arguments.device == "cpu":
        print(f"something else is running here (load {load:.1f}): times will be off", file=sys.stderr)
    rows: list[Row] = []
    for workload in cases:
        print(f"{workload.name} ...", file=sys.stderr, flush=True)
        rows += measure(workload, rates, arguments.device, seconds, memory)
    report = {"machine": machine(), "device": arguments.device, "quick": arguments.quick, "rates": asdict(rates)}
    report |= {"load_before": load, "results": [asdict(row) for row in rows]}
    if arguments.json == "-":
        print(json.dumps(report, indent=1))
    else:
        show(rows, rates, report)
    if arguments.json not in (None, "-"):
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.png:
        from kdkernels.cli.plot import draw

        draw(report, arguments.png)
    return 0 if rows and all(row.ok for row in rows if row.variant == "kdkernels") else 1


def measure(workload: Any, rates: Rates, device: str, seconds: float, memory: bool) -> list[Row]:
    """The rows of one case: check every variant, then time those that were right."""
    session = workload.open(device)
    variants = session.variants()
    judged = verdicts(session, variants)
    right = {name: step for name, step in variants.items() if all(d.ok for d in judged[name])}
    times = interleave(right, session.refresh, device, seconds=seconds)
    typical = medians(times)
    explanation = session.explain()
    rows = []
    for name in variants:
        ours = name == "kdkernels"
        worst = max(judged[name], key=lambda d: (not d.ok, d.used))
        row = {"op": workload.op, "case": workload.name, "variant": name, "ok": name in right}
        row |= {"worst_error": f"{worst.name}: {worst.error:.1e}, budget {worst.budget:.1e}"}
        row |= {"backend": explanation.backend, "method": explanation.method} if ours else {}
        if name in right:
            cost, t = session.cost(name), typical[name]
            matmul = rates.matmul_gflop_per_s[str(session.dtype)]
            row |= {"median_s": t, "times_s": tuple(times[name])}
            row |= {f"speedup_over_{k}": typical[v] / t for k, v in BASELINES.items() if v in typical}
            row |= {"overhead_over_linear": t / typical["linear"] - 1} if "linear" in typical else {}
            row |= {"gflop_per_s": cost.flops / t / 1e9, "share_of_matmul": cost.flops / t / 1e9 / matmul}
            row |= {"gb_per_s": cost.bytes / t / 1e9, "share_of_copy": cost.bytes / t / 1e9 / rates.copy_gb_per_s}
            row |= {"ratio_to_floor": 1 / max(row["share_of_matmul"], row["share_of_copy"])}
            if memory:
                row["peak_extra_bytes"] = extra_memory(workload, name, device)
        rows.append(Row(**row))
    return rows


def extra_memory(workload: Any, variant: str, device: str) -> int | None:
    """Peak memory, or None and a word on stderr where it could not be measured: the times are still good."""
    try:
        return peak_extra_bytes(workload.op, workload.name, variant, device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return None


def verdicts(session: Any, variants: dict[str, Any]) -> dict[str, list[Deviation]]:
    """One checked step of each variant, which also warms it up; one that raises has no number within its budget."""
    outcomes, raised = {}, {}
    for name, step in variants.items():
        try:
            session.refresh()
            with poisoned_memory():
                outcomes[name] = step()
        except Exception as error:
            raised[name] = [Deviation(f"{type(error).__name__}: {error}", float("inf"), 0.0)]
    return session.judge(outcomes) | raised


def show(rows: list[Row], rates: Rates, report: dict[str, Any]) -> None:
    """The table, with what it should be read against."""
    cells, previous = [], None
    for row in rows:
        name = f"{row.variant} ({row.backend}, {row.method})" if row.backend else row.variant
        cells.append((row.case if row.case != previous else "", name, *numbers(row)))
        previous = row.case
    if report["quick"]:
        print("--quick: sizes too small to say anything about speed")
    print_table("Forward and backward, medians", COLUMNS, cells, ["" if row.ok else RED for row in rows])
    found = report["machine"]
    place = found["cpu"] + f", {found['threads']} threads" if report["device"] == "cpu" else ", ".join(found["cuda"])
    matmul = ", ".join(f"{d.removeprefix('torch.')} {r:.0f}" for d, r in rates.matmul_gflop_per_s.items())
    print(f"{place}; torch {found['packages']['torch']}; copy {rates.copy_gb_per_s:.1f} GB/s; matmul GFLOP/s: {matmul}")
    print("FLOPs and bytes are those of what each variant runs.")


def numbers(row: Row) -> tuple[str, ...]:
    """A row's cells after its name; a wrong result shows its error instead of a speed."""
    if not row.ok:
        return (f"WRONG {row.worst_error}", *[""] * 9)
    extra = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 2**20:.1f}"
    return (
        f"{row.median_s * 1e3:.2f}",  # type: ignore[operator]
        "" if row.speedup_over_eager is None else f"{row.speedup_over_eager:.2f}×",
        "" if row.speedup_over_compile is None else f"{row.speedup_over_compile:.2f}×",
        "" if row.overhead_over_linear is None else f"{100 * row.overhead_over_linear:+.0f}%",
        f"{row.gflop_per_s:.1f}",
        f"{100 * row.share_of_matmul:.0f}%",  # type: ignore[operator]
        f"{row.gb_per_s:.1f}",
        f"{100 * row.share_of_copy:.0f}%",  # type: ignore[operator]
        f"{row.ratio_to_floor:.1f}×",
        extra,
    )
