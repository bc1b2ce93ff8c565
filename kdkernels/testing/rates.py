"""What this machine can do: the copy bandwidth and matmul rate that achieved rates are compared with."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

COPY_BYTES = 256 * 2**20  # well past any cache
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Best of a few runs each."""

    copy_gb_per_s: float  # bytes read and written
    matmul_gflop_per_s: dict[str, float]  # by dtype


def measure_rates(device: str, dtypes: tuple[torch.dtype, ...], *, quick: bool = False) -> Rates:
    """Copy one large buffer; multiply square matrices (small ones in a dtype the machine has no arithmetic for)."""
    size = COPY_BYTES // (8 if quick else 1)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = best(lambda: target.copy_(source), device)
    rates = {}
    for dtype in dtypes:
        n = MATMUL_SIZE[device] // (4 if quick or (device == "cpu" and dtype is not torch.float32) else 1)
        a = torch.ones(n, n, device=device, dtype=dtype)
        rates[str(dtype)] = 2 * n**3 / best(lambda a=a: a @ a, device) / 1e9  # type: ignore[misc]
    return Rates(2 * size / seconds / 1e9, rates)


def best(step: Callable[[], Any], device: str) -> float:
    """The shortest of a few runs, after one to warm up."""
    seconds = [timed(step, device) for _ in range(REPEATS + 1)]
    return min(seconds[1:])


def timed(step: Callable[[], Any], device: str) -> float:
    """Wall time of one step, the device's queue drained before and after."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
