"""Say what is installed, what each operator will run on here and why, and check that it computes.

Always prints, whatever is broken. Exit code 1 when the self-check fails.
"""

import argparse
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kdkernels import _native, backend, gemm
from kdkernels.cli.machine import machine
from kdkernels.cli.table import print_table
from kdkernels.testing import SUITES, checks
from kdkernels.testing.compare import Deviation

DEVICES = ("cpu", "cuda")
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, and return the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a missing compiled module has its own section here
        report = {
            "machine": attempt(machine),
            "native": attempt(native_module),
            "backends": attempt(backends),
            "self_check": attempt(self_check),
        }
    report["ok"] = not failed(report["self_check"]) and all(check["ok"] for check in report["self_check"])
    print(json.dumps(report, indent=1)) if arguments.json else show(report)
    return 0 if report["ok"] else 1


def attempt(section: Callable[[], Any]) -> Any:
    """The section, or what kept it from being written: a doctor must not die of the illness."""
    try:
        return section()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def failed(section: Any) -> bool:
    """Whether `attempt` caught something."""
    return isinstance(section, dict) and "failed" in section


def native_module() -> dict[str, Any]:
    """The compiled module: its file, the instruction sets it has for this CPU, and the one it uses."""
    reason = _native.why_not()
    forced = os.environ.get("KDKERNELS_ISA")
    if reason is not None:
        return {"loaded": False, "reason": reason, "mend": _native.HOW_TO_MEND, "KDKERNELS_ISA": forced}
    module = _native.module()
    return {
        "loaded": True,
        "file": module.__file__,
        "isa": module.isa(),
        "isas": list(module.isas()),
        "cuda_architectures": module.cuda_architectures.split(),
        "KDKERNELS_ISA": forced,
        "products": {name: "vendor" if gemm.vendor_multiplies(dtype) else "own" for name, dtype in PRODUCTS.items()},
        gemm.VARIABLE: os.environ.get(gemm.VARIABLE),
    }


def backends() -> list[dict[str, Any]]:
    """For each operator, device and dtype: the backend that `auto` takes, and why not another."""
    rows: list[dict[str, Any]] = []
    for op in sorted({row.op for row in backend.TABLE}):
        for device in DEVICES:
            if device == "cuda" and not torch.cuda.is_available():
                rows.append({"op": op, "device": device, "dtype": "any", "backend": None, "why": "no CUDA device"})
                continue
            served = {dtype for row in backend.TABLE if row.op == op for dtype in row.dtypes}
            for dtype in sorted(served, key=str):
                rows.append({"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")})
                chosen = backend.choose(op, "auto", device, [dtype])
                reasons = backend.passed_over(op, chosen, device, [dtype])
                why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                rows[-1] |= {"backend": chosen.backend, "methods": list(chosen.methods), "why": why}
    return rows


def self_check() -> list[dict[str, Any]]:
    """The first of `validate`'s cases on every backend, method and device that is available, in float32."""
    picked: dict[tuple[str, str, str, str], list[Any]] = {}
    for op in SUITES:
        for check in checks(op, quick=True):
            if check.dtype is torch.float32:
                found = picked.setdefault((check.op, check.backend, check.method, check.device), [])
                if not found or check.variant not in {c.variant for c in found}:
                    found.append(check)
    rows = []
    for (op, backend_name, method, device), found in picked.items():
        result = attempt(partial(worst, found))
        where = {"op": op, "backend": backend_name, "method": method, "device": device}
        if failed(result):
            rows.append(where | {"ok": False, "error": result["failed"]})
        else:
            rows.append(where | {"ok": result.ok, "error": result.error, "budget": result.budget})
    return rows


def worst(found: list[Any]) -> Deviation:
    """The tensor that takes most of its budget."""
    return max((d for check in found for d in check.run()), key=lambda d: (not d.ok, d.used))


def show(report: dict[str, Any]) -> None:
    """The report as text."""
    show_machine(report["machine"])
    show_native(report["native"])
    show_backends(report["backends"])
    show_self_check(report["self_check"])


def show_machine(found: dict[str, Any]) -> None:
    """Versions and hardware."""
    if failed(found):
        print(f"machine: {found['failed']}")
        return
    installed = ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["packages"].items())
    print(f"kdkernels {found['kdkernels']}" + (f" at {found['commit']}" if found["commit"] else ""))
    print(f"python {found['python']}, {installed}")
    print(f"cpu: {found['cpu']}, {found['cpus']} CPUs, {found['threads']} threads; {found['platform']}")
    print(f"cuda: {', '.join(found['cuda']) or 'no device'}")


def show_native(found: dict[str, Any]) -> None:
    """The compiled module, and how to mend it."""
    if failed(found):
        print(f"compiled module: loaded, but it fails: {found['failed']}")
    elif not found["loaded"]:
        print(f"compiled module: missing. {found['reason']}\n  To mend it: {found['mend']}")
    else:
        forced = f", forced by KDKERNELS_ISA={found['KDKERNELS_ISA']}" if found["KDKERNELS_ISA"] else ""
        print(f"compiled module: {found['file']}")
        print(f"  instruction set {found['isa']}{forced}; this CPU has {', '.join(found['isas'])}")
        products = ", ".join(f"{name} {who}" for name, who in found["products"].items())
        forced = f", forced by {gemm.VARIABLE}" if found[gemm.VARIABLE] else ""
        print(f"  large products of lora_linear: {products}{forced}")
        print(f"  CUDA kernels: {', '.join(found['cuda_architectures']) or 'none, built without nvcc'}")


def show_backends(rows: Any) -> None:
    """What `auto` takes."""
    if failed(rows):
        print(f"backends: {rows['failed']}")
        return
    cells = [(r["op"], r["device"], r["dtype"], r["backend"] or "-", r["why"]) for r in rows]
    print_table("What backend='auto' takes", ("op", "device", "dtype", "backend", "why not another"), cells)


def show_self_check(rows: Any) -> None:
    """Whether it computes."""
    if failed(rows):
        print(f"self-check: {rows['failed']}")
        return
    for row in rows:
        found, budget = row["error"], row.get("budget")
        error = found if budget is None else f"error {found:.1e}, budget {budget:.1e}"
        where = f"{row['op']} {row['backend']} {row['method']} on {row['device']}"
        print(f"self-check: {'ok    ' if row['ok'] else 'FAILED'} {where}: {error}")
