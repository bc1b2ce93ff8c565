"""A device that is not there: where does each tensor of an operator live, asked without a GPU.

Under FakeTensorMode `device="cuda"` cannot answer on a CPU build of PyTorch: autograd asks for the device's guard and
aborts the process. A device registered from Python has a guard, and FakeTensorMode raises wherever tensors of two
devices meet, as CUDA would. Registering it changes the process for good, so this file runs in one of its own, which
prints a line of JSON for each case: what it is, and what the pretended device says otherwise than a real CPU run.
With --mistake one gradient is made on the CPU, which must show, and an eighth of the other operators' cases stay right.
"""

import dataclasses
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd

NAME = "pretend"
EIGHTH = 8
N, D_S, D_T, D, D_OUT, R = 6, 4, 5, 8, 7, 2


class Case(NamedTuple):
    """One call: tensors by name, of which those in `leaves` require a gradient."""

    name: str
    call: Callable[[dict[str, Tensor]], Any]  # -> a tensor, or some
    shapes: dict[str, tuple[int, ...]]
    leaves: frozenset[str]
    dtype: torch.dtype


def cases() -> Iterator[Case]:
    """Every operator, with every optional operand absent and present."""
    yield from alignment()
    yield from lora()
    yield from distillation()
    yield from distillation_on_gpus()
    yield from decompositions()
    yield from recurrences()


def alignment() -> Iterator[Case]:
    inputs = {"student": (N, D_S), "teacher": (N, D_T)}
    sides = {
        "student_proj": {"student_proj": (D_T, D_S), "student_bias": (D_T,)},
        "teacher_proj": {"teacher_proj": (D_S, D_T), "teacher_bias": (D_S,)},
        "both": {
            **{"student_proj": (D, D_S), "teacher_proj": (D, D_T)},
            **{"student_bias": (D,), "teacher_bias": (D,)},
        },
        "neither": {},
    }
    for side, shapes in sides.items():
        biases = [name for name in shapes if name.endswith("bias")]
        for absent in subsets(biases):
            given = inputs | {name: shape for name, shape in shapes.items() if name not in absent}
            if side == "neither":
                given["teacher"] = (N, D_S)
            for weighted, reduction in itertools.product((False, True), ("mean", "sum", "none")):
                tensors = given | ({"weights": (N,)} if weighted else {})
                for leaves, dtype in itertools.product(
                    (given.keys(), {"student"}, set()), (torch.float32, torch.bfloat16)
                ):
                    yield Case(
                        f"projection_alignment_loss {' '.join(tensors)} {reduction}",
                        lambda x, reduction=reduction: kd.projection_alignment_loss(**x, reduction=reduction),
                        *(tensors, frozenset(leaves), dtype),
                    )


def lora() -> Iterator[Case]:
    shapes = {"input": (2, 3, D_S), "weight": (D_OUT, D_S), "lora_A": (R, D_S), "lora_B": (D_OUT, R), "bias": (D_OUT,)}
    for absent, p in itertools.product(((), ("bias",)), (0.0, 0.1)):
        given = {name: shape for name, shape in shapes.items() if name not in absent}
        for leaves, dtype in itertools.product(subsets(given), (torch.float32, torch.bfloat16)):
            yield Case(
                f"lora_linear {' '.join(given)} p={p}",
                lambda x, p=p: kd.lora_linear(**x, dropout_p=p),
                *(given, frozenset(leaves), dtype),
            )
    for bias, p in itertools.product((False, True), (0.0, 0.1)):
        given = shapes | {"second A": (R + 1, D_S), "second B": (D_OUT, R + 1)}

        def group(x: dict[str, Tensor], bias: bool = bias, p: float = p) -> Any:
            first = kd.LoRA(x["weight"], x["lora_A"], x["lora_B"], x["bias"], 1.0, p)
            second = kd.LoRA(x["weight"], x["second A"], x["second B"], x["bias"] if bias else None, 1.0, 0.0)
            return kd.lora_linear_group(x["input"], [first, second])

        for leaves in (given.keys(), {"lora_A", "second B"}):
            yield Case(f"lora_linear_group {bias=} p={p}", group, given, frozenset(leaves), torch.float32)


def distillation() -> Iterator[Case]:
    inputs = {"student": (2, 3, D_S), "teacher": (2, 3, D_T), "given": (2, 3, D)}
    head = {"weight": (D, D_S), "bias": (D,), "lora_A": (R, D_S), "lora_B": (D, R)}
    for absent in ((), ("bias",), ("lora_A", "lora_B"), tuple(head)):
        own = {name: shape for name, shape in head.items() if name not in absent}
        shapes = inputs | own | {"teacher_head": (D, D_T), "weights": (2, 3)}
        if not own:
            shapes["student"] = (2, 3, D)
        for K, alpha, reduction in itertools.product((1, 2), (1.0, 0.5), ("mean", "none")):

            def call(
                x: dict[str, Tensor], own: Any = own, K: int = K, alpha: float = alpha, reduction: str = reduction
            ) -> Any:
                labels = torch.zeros(2, 3, dtype=torch.int64, device=x["student"].device) if alpha < 1 else None
                student_head = kd.Head(**{name: x[name] for name in own}, softcap=9.0) if own else None
                return kd.linear_distillation_loss(
                    x["student"], student_head, [x["teacher"], x["given"]][:K], [x["teacher_head"], None][:K],
                    labels=labels, alpha=alpha, weights=x["weights"], reduction=reduction,
                )  # fmt: skip

            name = f"linear_distillation_loss {' '.join(own)} {K=} {alpha=} {reduction}"
            for leaves, dtype in itertools.product(({"student", *own}, {"student"}), (torch.float32, torch.bfloat16)):
                yield Case(name, call, shapes, frozenset(leaves), dtype)


def distillation_on_gpus() -> Iterator[Case]:
    """What the GPU's implementation asks of torch, with kernels that only look where their tensors are."""
    from kdkernels.ops.linear_distillation import kernels, triton
    from kdkernels.ops.linear_distillation.call import Call, Side

    def look(grid: Any, tensors: Any, *others: Any) -> None:
        assert len({x.device for x in tensors if x is not None}) == 1

    kernels.absorb = kernels.diverge = look  # type: ignore[assignment]
    shapes = {"student": (N, D_S), "weight": (D, D_S), "bias": (D,), "low": (N, R), "low_head": (D, R)}
    shapes |= {"teacher": (N, D_T), "teacher_head": (D + 3, D_T), "top": (N, 2), "given": (N, D + 1), "weights": (N,)}

    def call(x: dict[str, Tensor], whole: bool, needs: bool) -> Any:
        like = x["student"]
        places = torch.arange(2, device=like.device).expand(N, 2)
        mapped = Side(x["teacher"], x["teacher_head"], columns=torch.arange(D, device=like.device), vocabulary=D + 3)
        top = Side(x["top"], indices=places, spread=1.0, vocabulary=D + 1)
        given = Side(x["given"], vocabulary=D + 1)
        own = Side(*(x[name] for name in list(shapes)[:5]), vocabulary=D) if whole else Side(x["given"][:, :D])
        teachers = [side._replace(share=1 / 3) for side in (mapped, top, given)][: 3 if whole else 1]
        weights, labels = x["weights"].float(), places[:, 0]
        made = Call(own, teachers, None, labels, weights, "jsd", "arithmetic", 2.0, 0.5, 0.5, 1, torch.float32)
        grads = [torch.empty_like(t) if needs and t is not None else None for t in own[:5]]
        total, losses = like.new_empty((), dtype=torch.float32), like.new_empty(N, dtype=torch.float32)
        triton.loss_and_gradients(made, total, grads)
        triton.losses(made, losses)
        return [total, losses, *(g for g in grads if g is not None)]

    for whole, needs, dtype in itertools.product((True, False), (True, False), (torch.float32, torch.bfloat16)):
        yield Case(
            f"linear_distillation_loss on GPUs {whole=} {needs=}",
            lambda x, whole=whole, needs=needs: call(x, whole, needs),
            *(shapes, frozenset[str](), dtype),
        )


def decompositions() -> Iterator[Case]:
    n, m = 4, 2
    system = {"Lambda": (3, n), "B": (3, n, m), "C": (3, m, n)}
    for dtype in (torch.float32, torch.complex64):
        for shape in ((3, 5, n), (2, 3, n, 5), (n, n)):
            for leaves in ({"A"}, set[str]()):
                for name, function in (
                    ("svd", kd.svd),
                    ("svd reduced", lambda A: kd.svd(A, full_matrices=False)),
                    ("svdvals", kd.svdvals),
                ):
                    call = lambda x, f=function: f(x["A"])  # noqa: E731
                    yield Case(f"{name} {shape}", call, {"A": shape}, frozenset(leaves), dtype)
        for leaves in subsets(system):
            for function in (kd.hankel_singular_values, kd.hankel_energy):
                yield Case(
                    function.__name__,
                    lambda x, f=function: f(x["Lambda"], x["B"], x["C"]),
                    *(system, frozenset(leaves), dtype),
                )
        yield Case(
            "gramian_factors",
            lambda x: kd.gramian_factors(x["Lambda"], x["B"], x["C"]),
            *(system, frozenset[str](), dtype),
        )


def recurrences() -> Iterator[Case]:
    n = 4
    for reverse, own, initial in itertools.product((False, True), (False, True), (None, (n,), (3, 2, n))):
        shapes = {"Lambda": (2, n) if own else (n,), "input": (3, 2, 5, n)}
        shapes |= {} if initial is None else {"initial_state": initial}
        for leaves, dtype in itertools.product(subsets(shapes), (torch.float32, torch.complex64, torch.bfloat16)):
            yield Case(
                f"linear_recurrence {' '.join(shapes)} {own=} {initial=} {reverse=}",
                lambda x, reverse=reverse: kd.linear_recurrence(**x, reverse=reverse),
                *(shapes, frozenset(leaves), dtype),
            )


def subsets(names: Any) -> Iterator[tuple[str, ...]]:
    names = list(names)
    return itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(len(names) + 1))


def run(case: Case, device: str) -> dict[str, list[object]]:
    """Device, dtype, shape and strides of every output and gradient."""
    torch.manual_seed(0)
    tensors = {
        name: (torch.rand(shape, device=device) * 0.5 + 0.25).to(case.dtype).requires_grad_(name in case.leaves)
        for name, shape in case.shapes.items()
    }
    found = case.call(tensors)
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    result = {f"output {k}": y for k, y in enumerate(outputs)}
    reached = [y for y in outputs if y.requires_grad]
    if case.leaves:
        wanted = [tensors[name] for name in sorted(case.leaves)]
        grads = torch.autograd.grad(reached, wanted, [torch.ones_like(y) for y in reached])
        for name, x, grad in zip(sorted(case.leaves), wanted, grads, strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device), f"grad {name}"
            result[f"grad {name}"] = grad
    return {name: [y.device.type, str(y.dtype), list(y.shape), list(y.stride())] for name, y in result.items()}


def difference(case: Case) -> str:
    """What the pretended device says otherwise than the CPU; empty where nothing is."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        expected = {name: [NAME, *rest] for name, (_, *rest) in run(case, "cpu").items()}
        with FakeTensorMode():
            found = run(case, NAME)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    return "" if found == expected else f"{found} instead of {expected}"


def register() -> None:
    """The device, and the rows for CUDA serving it."""
    from torch.utils import backend_registration

    from kdkernels import backend

    module = types.SimpleNamespace(
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
    )
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    backend.TABLE = tuple(
        dataclasses.replace(row, devices=(NAME,), why_not=backend.always) if row.devices == ("cuda",) else row
        for row in backend.TABLE
    )


def mistake() -> None:
    """The room of the bias's gradient on the CPU."""
    from kdkernels.ops.projection_alignment import schema

    right = schema._gradient_room

    def wrong(operands: Any, needs: Any) -> list[Tensor | None]:
        *rooms, bias, last = right(operands, needs)
        return [*rooms, None if bias is None else torch.empty(bias.shape, dtype=bias.dtype), last]

    schema._gradient_room = wrong


if __name__ == "__main__":
    register()
    mistaken = "--mistake" in sys.argv
    if mistaken:
        mistake()
    for implementation in ("auto",) if mistaken else ("auto", "reference"):
        with kd.use_backend(implementation):
            for number, case in enumerate(cases()):
                if mistaken and number % EIGHTH and not case.name.startswith("projection_alignment_loss"):
                    continue
                about = [implementation, case.name, sorted(case.leaves), str(case.dtype)]
                print(json.dumps([*about, difference(case)]))
    sys.stdout.flush()
    os._exit(0)  # autograd's thread for the device would abort an orderly exit: nothing ever joins it
