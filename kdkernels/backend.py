"""Which implementation serves which device and dtype: one table that dispatch, `explain`, `doctor` and the README read.

Rows of an operator stand in the order `auto` tries them, fastest first, as benchmarks measured it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch.autograd import forward_ad

from kdkernels import _native

BACKENDS = ("auto", "reference", "native", "triton")

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REAL_OR_COMPLEX = (torch.float32, torch.float64, torch.complex64, torch.complex128)
ANY_DTYPE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def always() -> None:
    """Available everywhere."""
    return None


TRITON_INSTALLED = find_spec("triton") is not None  # found, not imported


def triton_why_not() -> str | None:
    """None when Triton is installed, else the reason."""
    return None if TRITON_INSTALLED else "Triton is not installed"


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    op: str
    backend: str
    devices: tuple[str, ...]  # empty: any device
    dtypes: tuple[torch.dtype, ...]
    methods: tuple[str, ...]
    why_not: Callable[[], str | None] = always  # None, or why it cannot run on this machine

    def objection(self, device: str, dtypes: Iterable[torch.dtype]) -> str | None:
        """None when this implementation serves the case, else the reason."""
        if self.devices and device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        for dtype in dtypes:
            if dtype not in self.dtypes:
                return f"it does not support {dtype} on {device}"
        return self.why_not()


def small(op: str, native: tuple[str, ...], reference: tuple[str, ...]) -> tuple[Implementation, ...]:
    """The rows of an operator on batches of small matrices, and their methods."""
    return (
        Implementation(op, "native", ("cpu",), REAL_OR_COMPLEX, native, _native.why_not),
        Implementation(op, "native", ("cuda",), REAL_OR_COMPLEX, native, _native.why_not_cuda),
        Implementation(op, "reference", (), REAL_OR_COMPLEX, reference),
    )


TABLE: tuple[Implementation, ...] = (
    Implementation("projection_alignment_loss", "triton", ("cuda",), GPU_FLOATS, ("direct", "gram"), triton_why_not),
    Implementation("projection_alignment_loss", "native", ("cpu",), FLOATS, ("direct", "gram"), _native.why_not),
    Implementation("projection_alignment_loss", "reference", (), ANY_DTYPE, ("direct",)),
    Implementation("linear_distillation_loss", "triton", ("cuda",), GPU_FLOATS, ("streamed",), triton_why_not),
    Implementation("linear_distillation_loss", "native", ("cpu",), FLOATS, ("streamed",), _native.why_not),
    Implementation("linear_distillation_loss", "reference", (), ANY_DTYPE, ("eager",)),
    Implementation("lora_linear", "triton", ("cuda",), GPU_FLOATS, ("fused",), triton_why_not),
    Implementation("lora_linear", "native", ("cpu",), FLOATS, ("fused",), _native.why_not),
    Implementation("lora_linear", "reference", (), ANY_DTYPE, ("eager",)),
    Implementation("linear_recurrence", "triton", ("cuda",), REAL_OR_COMPLEX, ("scan",), triton_why_not),
    Implementation("linear_recurrence", "native", ("cpu",), REAL_OR_COMPLEX, ("scan",), _native.why_not),
    Implementation("linear_recurrence", "reference", (), (*ANY_DTYPE, *REAL_OR_COMPLEX[2:]), ("scan",)),
    *small("svd", ("jacobi", "lapack"), ("lapack",)),
    *small("svdvals", ("jacobi", "lapack"), ("lapack",)),
    *small("gramian_factors", ("generator",), ("generator",)),
    *small("hankel_singular_values", ("jacobi", "lapack"), ("lapack",)),
    Implementation("hankel_energy", "reference", (), REAL_OR_COMPLEX, ("trace",)),
    *small("balanced_truncation", ("jacobi", "lapack"), ("lapack",)),
    Implementation("hankel_svd", "reference", (), REAL_OR_COMPLEX, ("dense", "fft")),
    Implementation("era", "reference", (), REAL_OR_COMPLEX, ("dense", "fft")),
)

_default = "auto"


def default() -> str:
    """What `use_backend` named, or `"auto"`."""
    return _default


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block, operators called with `backend="auto"` use this backend (process-wide, not per thread)."""
    global _default
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(map(repr, BACKENDS))}")
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def choose(op: str, requested: str, device: str, dtypes: Iterable[torch.dtype]) -> Implementation:
    """The implementation that runs.

    A backend asked for by name either serves or raises: ImportError when its module is missing, ValueError when it
    does not support the case, RuntimeError under torch.func and torch.jit.trace, where `auto` takes the reference.
    """
    dtypes = tuple(dtypes)
    if not isinstance(requested, str) or requested not in BACKENDS:
        raise ValueError(f"backend is {requested!r}, but must be one of {', '.join(map(repr, BACKENDS))}")
    wanted = _default if requested == "auto" else requested
    if torch.compiler.is_compiling():
        return _row(op, wanted, device, dtypes)
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        if wanted not in ("auto", "reference"):
            raise RuntimeError(
                f"{op} on backend {wanted!r} knows neither torch.func transforms (grad, vmap, forward-mode jvp) nor "
                "torch.jit.trace; use backend='reference'"
            )
        wanted = "reference"
    key = (id(TABLE), op, wanted, device, *dtypes)
    if key not in _chosen:
        _chosen[key] = _row(op, wanted, device, dtypes)
    return _chosen[key]


_chosen: dict[Any, Implementation] = {}


def _row(op: str, wanted: str, device: str, dtypes: Iterable[torch.dtype]) -> Implementation:
    rows = [row for row in TABLE if row.op == op and wanted in ("auto", row.backend)]
    if wanted != "auto":
        if not rows:
            raise ValueError(f"backend={wanted!r}: {op} has no such implementation")
        rows.sort(key=lambda row: device not in row.devices)  # the one for this device says best why not
        objections = [row.objection(device, dtypes) for row in rows]
        if None in objections:
            return rows[objections.index(None)]
        if wanted == "native" and device == "cpu":
            _native.module()  # a missing module is raised as the ImportError it is
        raise ValueError(f"backend={wanted!r} cannot serve {op}: {objections[0]}")
    for row in rows:
        if row.objection(device, dtypes) is None:
            return row
    raise ValueError(f"no backend serves {op} for {', '.join(map(str, dtypes))} on {device}")


def refuse_tangents(op: str, tensors: Iterable[torch.Tensor], remedy: str = "; use backend='reference'") -> None:
    """Raise RuntimeError where forward-mode derivatives would be lost without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative{' on this backend' if remedy else ''}{remedy}")


# FLOPs that cost as much as moving one byte: a ratio of rates, the only machine constant in the choice.
# CPUs here run 140 GFLOP/s against 10-25 GB/s; an H100 has a similar ratio for tf32 and bf16.
FLOPS_PER_BYTE = 10


@dataclass(frozen=True)
class Cost:
    """One method's arithmetic and memory traffic, and whether it applies."""

    method: str
    flops: int
    bytes: int
    why_not: str | None = None
    rate: int = 1  # of its arithmetic, as a multiple of float32's

    @property
    def weight(self) -> float:
        """Comparable cost, in FLOP equivalents."""
        return self.flops / self.rate + FLOPS_PER_BYTE * self.bytes


@dataclass(frozen=True)
class Explanation:
    """What would run, and why: `str()` is the sentence, the fields are the data."""

    op: str
    backend: str
    method: str
    reasons: dict[str, str]  # for each backend that was passed over: why
    costs: tuple[Cost, ...] = field(default=())  # the methods' FLOPs and bytes

    def __str__(self) -> str:
        lines = [f"{self.op}: backend {self.backend}, method {self.method}"]
        lines += [
            f"  {c.method:<9}" + (c.why_not or f"{c.flops / 1e9:10.3f} GFLOP  {c.bytes / 2**20:10.1f} MiB")
            for c in self.costs
        ]
        lines += [f"  not {backend}: {why}" for backend, why in self.reasons.items()]
        return "\n".join(lines)


EXPLAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Explanation]]] = {}


def register_explainer(function: Callable[..., Any], explainer: Callable[..., Explanation]) -> None:
    """Have `explain` answer for the operator `function` by `explainer`, which gets every argument by its name."""
    EXPLAINERS[function.__name__] = (function, explainer)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation and method a call would use, with the FLOPs and bytes that decided it.

    `op` is an operator (`kd.projection_alignment_loss`) or its name; the rest are the arguments of the call, which is
    checked but not carried out.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in EXPLAINERS:
        raise ValueError(f"op is {name!r}, but must be one of {', '.join(map(repr, EXPLAINERS))}")
    function, explainer = EXPLAINERS[name]
    call = signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return explainer(**call.arguments)


def passed_over(op: str, chosen: Implementation, device: str, dtypes: Iterable[torch.dtype]) -> dict[str, str]:
    """Why the other backends of `op` were not chosen."""
    dtypes = tuple(dtypes)
    rows = [row for row in TABLE if row.op == op and row.backend != chosen.backend]
    rows.sort(key=lambda row: device in row.devices)  # of two of one backend, the one for this device has the word
    order = TABLE.index
    return {
        row.backend: row.objection(device, dtypes)
        or ("it is slower" if order(row) > order(chosen) else f"{chosen.backend} was asked for")
        for row in rows
    }
