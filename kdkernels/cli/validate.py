"""Run every implementation against float64 and hold each to its error budget: twice the error of eager PyTorch.

Exit code 1 when any check fails. Backends that cannot run on this machine are listed with the reason.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any

from kdkernels.backend import BACKENDS, TABLE
from kdkernels.cli.machine import machine
from kdkernels.cli.table import DIM, RED, print_table
from kdkernels.testing import SUITES, checks, names, operators, suite
from kdkernels.testing.check import Check
from kdkernels.testing.compare import Deviation, poisoned_memory

COLUMNS = ("op", "backend", "method", "device", "dtype", "variant", "cases", "worst", "error", "budget", "")


@dataclass(frozen=True)
class Result:
    """One check: its deviations, or the exception that ended it."""

    op: str
    backend: str
    method: str
    device: str
    dtype: str
    variant: str
    case: str
    deviations: tuple[Deviation, ...]
    failure: str | None = None

    @property
    def ok(self) -> bool:
        """Every tensor within its budget."""
        return self.failure is None and all(d.ok for d in self.deviations)

    @property
    def worst(self) -> Deviation | None:
        """The tensor that takes most of its budget."""
        return max(self.deviations, key=lambda d: (not d.ok, d.used), default=None)

    def as_json(self) -> dict[str, Any]:
        """The fields, each deviation with its verdict."""
        found = [asdict(d) | {"ok": d.ok} for d in self.deviations]
        return asdict(self) | {"ok": self.ok, "deviations": found}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `validate`."""
    parser.add_argument("--op", choices=names(), action="append", help="only this operator or family (repeatable)")
    parser.add_argument("--backend", choices=BACKENDS[1:], help="only this backend")
    parser.add_argument("--case", default="*", help="only cases whose name matches this pattern, such as 'blocks*'")
    parser.add_argument("--quick", action="store_true", help="the cases that tell most")
    parser.add_argument(
        "-x",
        "--exitfirst",
        action="store_true",
        help="stop at the first check that fails, and begin with one of each kind",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Validate, print, and return the exit code."""
    ops = [op for name in arguments.op or SUITES for op in operators(name)]
    results: list[Result] = []
    for op in ops:
        results += validate(op, arguments.backend, arguments.quick, arguments.exitfirst, arguments.case)
        if arguments.exitfirst and not all(result.ok for result in results):
            break
    skipped = [
        {"op": row.op, "backend": row.backend, "reason": reason}
        for row in TABLE
        if row.op in ops and arguments.backend in (None, row.backend) and (reason := suite(row.op).why_not(row))
    ]
    ok = all(result.ok for result in results) and bool(results)
    if arguments.json:
        report = {"ok": ok, "machine": machine(), "not_validated": skipped, "results": [r.as_json() for r in results]}
        print(json.dumps(report, indent=1))
    else:
        show(results, skipped)
    return 0 if ok else 1


def validate(op: str, backend: str | None, quick: bool, exitfirst: bool, case: str = "*") -> list[Result]:
    """Run the checks of one operator; a check that raises has failed, the others still run."""
    results: list[Result] = []
    failed = 0
    progress = Progress()
    found = [check for check in checks(op, quick) if backend in (None, check.backend) and fnmatchcase(check.case, case)]
    for check in spread_out(found) if exitfirst else found:
        dtype = str(check.dtype).removeprefix("torch.")
        row = (check.op, check.backend, check.method, check.device, dtype, check.variant, check.case)
        progress.show(f"{op}: {len(results)} checks, {failed} failed; now {' '.join(filter(None, row[1:]))}")
        deviations, failure = (), None
        try:
            with poisoned_memory():
                deviations = tuple(check.run())
        except Exception as error:  # whatever a broken kernel raises is a finding, and the rest must still be checked
            failure = f"{type(error).__name__}: {error}"
        results.append(Result(*row, deviations, failure))
        failed += not results[-1].ok
        if exitfirst and failed:
            break
    progress.clear()
    return results


def spread_out(found: Sequence[Check]) -> list[Check]:
    """The first case of each dtype and variant, then the second: what is wrong with one of them shows the sooner."""
    met: Counter[tuple[Any, ...]] = Counter()

    def place(check: Check) -> int:
        key = (check.backend, check.method, check.device, check.dtype, check.variant)
        met[key] += 1
        return met[key]

    return sorted(found, key=place)


class Progress:
    """What is being checked, on standard error: a line that overwrites itself on a terminal, else one now and then.

    The first check of an operator is announced at once, before it runs: a kernel may have to be compiled for it.
    """

    SECONDS = 3.0  # between lines that stay

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = -self.SECONDS

    def show(self, text: str) -> None:
        """Announce what comes next."""
        if self.terminal:
            print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
        elif (now := monotonic()) - self.last >= self.SECONDS:
            self.last = now
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def show(results: list[Result], skipped: list[dict[str, str]]) -> None:
    """One row for each implementation, method, dtype and variant: its worst case."""
    rows: list[tuple[str, ...]] = []
    styles = []
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r.op, r.backend, r.method, r.device, r.dtype, r.variant), []).append(r)
    for key, found in groups.items():
        worst = max(found, key=lambda r: (r.failure is not None, not r.ok, r.worst.used if r.worst else 0))
        passed = f"{sum(r.ok for r in found)}/{len(found)}"
        rows.append((*key, passed, *describe(worst), "ok" if all(r.ok for r in found) else "FAILED"))
        styles.append("" if rows[-1][-1] == "ok" else RED)
    for row in skipped:
        rows.append((row["op"], row["backend"], *[""] * 5, row["reason"], "", "", "not validated"))
        styles.append(DIM)
    print_table("Error against float64, and the budget", COLUMNS, rows, styles)
    for result in results:
        if result.failure:
            print(f"{result.backend} {result.method} {result.dtype} {result.variant}, {result.case}: {result.failure}")
    failed = sum(not result.ok for result in results)
    print(f"{len(results)} checks, {failed} failed" if results else "nothing could be validated")


def describe(result: Result) -> tuple[str, str, str]:
    """The case and tensor that came closest to its budget, or passed it."""
    if result.failure or result.worst is None:
        return result.case, "raised" if result.failure else "", ""
    return f"{result.case}: {result.worst.name}", f"{result.worst.error:.1e}", f"{result.worst.budget:.1e}"
