"""The Triton kernels of the recurrence, in Triton's interpreter on CPU tensors; on a GPU where there is one."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreting import interpreted_module, put_in_place
from layouts import sliced, transposed
from torch import Tensor

from kdkernels.ops.linear_recurrence import schema
from kdkernels.ops.linear_recurrence.state_space import state_space
from kdkernels.testing.compare import deviations, errors
from kdkernels.testing.linear_recurrence.checks import CASES, compare_case
from kdkernels.testing.linear_recurrence.inputs import arriving, eager, exact, make_inputs, ours

pytest.importorskip("triton")

NAME = "kdkernels.ops.linear_recurrence.triton"
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SLOW = {"wide", "long", "near the circle", "many sequences"}  # in the interpreter
CUT: dict[
    str, dict[str, Any]
] = {  # in time: a tile more or less than chunks, chunks of a tile, one lane more than a block
    "plain": {"T": 21, "n": 3},
    "own λ, initial state, reverse": {"T": 24, "n": 5, "own": True, "initial": True, "reverse": True},
    "initial state": {"N": 5, "T": 17, "n": 7, "initial": True},
    "growing": {"T": 20, "n": 3, "radii": (1.0, 1.1), "reverse": True},
    "two steps": {"T": 2, "n": 2, "initial": True},
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ModuleType]:
    """The operator's Triton module with interpreted kernels."""
    with interpreted_module(NAME) as module:
        yield module


@pytest.fixture
def kernels(interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The interpreted module, where the operator looks for it."""
    put_in_place(interpreter, monkeypatch)
    return interpreter


@pytest.fixture
def cut(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """However short a sequence is, it is cut."""
    monkeypatch.setattr(kernels, "LEAST_STEPS", 2)
    kernels.chunks_of.cache_clear()
    yield kernels
    kernels.chunks_of.cache_clear()


def results(tensors: tuple[Any, ...], reverse: bool, grad: Tensor) -> list[Tensor]:
    """Λ, input and initial state -> h, and the gradients of those that are there."""
    h = schema.linear_recurrence.seen(*tensors, reverse, "triton")
    needs = [x is not None for x in tensors]
    found = schema.linear_recurrence_backward(grad, tensors[0], h, tensors[2], reverse, needs, "triton")
    return [h, *(x for x in found if x is not None)]


# ---- numbers


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)  # `validate` takes the others too
@pytest.mark.parametrize("case", sorted(CASES.keys() - SLOW - {"cut in time"}))
def test_error_against_float64(kernels: ModuleType, case: str, dtype: torch.dtype) -> None:
    wrong = [d for d in compare_case(CASES[case] | {"dtype": dtype}, "triton") if not d.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex64), ids=str)
@pytest.mark.parametrize("case", CUT)
def test_error_against_float64_cut_in_time(cut: ModuleType, case: str, dtype: torch.dtype) -> None:
    assert cut.chunks_of(CUT[case]["n"] * CUT[case].get("N", 3), CUT[case]["T"], 132)[0] > 1 or case == "two steps"
    wrong = [d for d in compare_case(CUT[case] | {"dtype": dtype}, "triton") if not d.ok]
    assert not wrong, wrong


def test_near_the_circle_cut_in_time(kernels: ModuleType) -> None:
    """No error grows with the power of λ that chunks multiply by."""
    inputs = make_inputs(1, 260, 2, radii=(0.999, 1.0), dtype=torch.float32)
    assert kernels.chunks_of(2, 260, 132) == (11, 24)
    target = exact(inputs)
    wrong = [d for d in deviations(ours(inputs, "triton"), target, errors(eager(inputs), target)) if not d.ok]
    assert not wrong, wrong


def test_a_chunk_or_several_are_the_same_recurrence(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 30, 4, own=True, initial=True, reverse=True, dtype=torch.complex128)
    found = []
    for chunks, length in ((1, 30), (2, 16), (4, 8)):
        monkeypatch.setattr(kernels, "chunks_of", lambda *sizes, c=chunks, steps=length: (c, steps))
        found.append(ours(inputs, "triton").tensors())
    for other in found[1:]:
        for name, x in found[0].items():
            torch.testing.assert_close(other[name], x, rtol=1e-12, atol=1e-12)


# ---- strides, places, values


@pytest.mark.parametrize("move", (transposed, sliced))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)
def test_strides_do_not_matter(kernels: ModuleType, move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 11, 5, own=True, initial=True, dtype=dtype)
    grad = arriving(inputs.input)
    expected = results(inputs.tensors(), False, grad)
    found = results(tuple(move(x) for x in inputs.tensors()), False, move(grad))
    assert all(map(torch.equal, found, expected))


def test_what_torch_keeps_in_the_view(kernels: ModuleType) -> None:
    inputs = make_inputs(2, 9, 3, initial=True, dtype=torch.complex64)
    tensors = [x.conj() for x in inputs.tensors()]
    grad = arriving(inputs.input).conj()
    assert all(x.is_conj() for x in (*tensors, grad))
    found = results(tuple(tensors), True, grad)
    expected = results(tuple(x.resolve_conj() for x in tensors), True, grad.resolve_conj())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex64), ids=str)
def test_in_place(cut: ModuleType, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 20, 3, initial=True, dtype=dtype)
    Lambda, u, start = inputs.tensors()
    assert u is not None
    grad = arriving(u)
    h, *grads = results((Lambda, u, start), True, grad)
    assert torch.equal(cut.forward(Lambda, u, start, True, in_place=True), h) and torch.equal(u, h)
    found = cut.backward(grad, Lambda, u, start, True, [True] * 3, in_place=True)
    assert all(map(torch.equal, found, grads)) and found[1] is grad


@pytest.mark.parametrize("needs", [[bool(k & 1 << i) for i in range(3)] for k in range(8)], ids=str)
def test_only_what_is_needed(cut: ModuleType, needs: list[bool]) -> None:
    inputs = make_inputs(2, 20, 3, initial=True, dtype=torch.complex64)
    h, *grads = results(inputs.tensors(), False, arriving(inputs.input))
    found = cut.backward(arriving(inputs.input), inputs.Lambda, h, inputs.initial_state, False, needs)
    for need, x, expected in zip(needs, found, grads, strict=True):
        assert torch.equal(x, expected) if need else x is None


def test_sums_over_more_rows_than_a_program_takes(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SUM", (2, 4, 8))
    monkeypatch.setattr(kernels, "GROUP", 8)
    for N in (1, 2, 8, 9, 70):
        wrong = [d for d in compare_case({"N": N, "T": 2, "n": 5}, "triton") if not d.ok]
        assert not wrong, wrong


def test_nan_stays_in_its_own_state_from_its_own_step_on(cut: ModuleType) -> None:
    inputs = make_inputs(2, 40, 3, initial=True, dtype=torch.float32)
    inputs.input[1, 17, 2] = torch.nan
    h, d_Lambda, d_input, d_initial = results(inputs.tensors(), False, arriving(inputs.input))
    spoilt = torch.zeros(2, 40, 3, dtype=torch.bool)
    spoilt[1, 17:, 2] = True
    assert torch.equal(h.isnan(), spoilt) and d_Lambda.isnan().tolist() == [[False, False, True]]
    assert d_input.isfinite().all() and d_initial.isfinite().all()


@pytest.mark.parametrize("value", (torch.inf, torch.nan))
def test_without_an_initial_state_the_first_step_does_not_meet_lambda(kernels: ModuleType, value: float) -> None:
    u = torch.tensor([[[1.0, 2.0]]])
    grad = torch.tensor([[[torch.inf, 1.0]]])
    h, d_Lambda, d_input = results((torch.full((1, 2), value), u, None), False, grad)
    assert torch.equal(h, u) and torch.equal(d_input, grad) and torch.equal(d_Lambda, torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64), ids=str)
def test_powers_of_lambda_may_overflow_where_states_do_not(cut: ModuleType, dtype: torch.dtype) -> None:
    """Of 16 steps of λ = 10⁶ or 10⁻⁶ float32 holds no power, of 10³⁸ float64 none."""
    u = torch.zeros(1, 128, 3, dtype=dtype)
    assert cut.chunks_of(3, 128, 132) == (8, 16)
    u[0, 61] = 1
    u[0, 3, 1] = 1e30
    Lambda = torch.tensor([[1e6, 1e-6, 1e38]], dtype=dtype)
    h = schema.linear_recurrence.seen(Lambda, u, None, False, "triton")
    assert h[0, :61, [0, 2]].eq(0).all() and torch.equal(h[0, 61, [0, 2]], torch.ones(2, dtype=dtype))
    assert torch.equal(h[0, 62, [0, 2]], Lambda[0, [0, 2]])
    torch.testing.assert_close(h[0, 4, 1], torch.tensor(1e24, dtype=dtype))
    assert h.real.isfinite()[0, :, 1].all()


def test_same_bits_on_every_run(cut: ModuleType) -> None:
    inputs = make_inputs(3, 20, 7, initial=True, dtype=torch.complex64)
    first, second = (ours(inputs, "triton").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_of_states(cut: ModuleType) -> None:
    """What lives in blocks: states and gradients in place, by the same kernels."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    x, B, C = normal(2, 20, 3), normal(8, 3), normal(2, 8)
    Lambda, start = 0.3 * torch.view_as_complex(normal(4, 2)), torch.view_as_complex(normal(2, 4, 2))
    leaves = [t.requires_grad_() for t in (x, Lambda, B, C, start)]
    found = []
    for backend in ("reference", "native"):
        outputs = state_space(*leaves, backend="reference") if backend == "reference" else _layer(leaves)
        total = sum((y.real * torch.cos(torch.arange(y.numel())).reshape(y.shape)).sum() for y in outputs)
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _layer(leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """By Triton's kernels on the CPU, which dispatch would not choose."""
    from kdkernels.ops.linear_recurrence.state_space import layer

    return layer(*leaves, "triton")[:2]


# ---- chunks


@pytest.mark.parametrize(
    ("states", "T", "expected"),
    [
        (32 * 1024, 1024, (1, 1024)),  # states alone fill it
        (16 * 1024, 1024, (2, 512)),
        (8 * 784, 784, (5, 160)),
        (256, 16384, (128, 128)),
        (1, 2**40, (33026, 33292_296)),
        (1, 255, (1, 255)),  # over before another launch were
        (1, 256, (16, 16)),
        (0, 0, (1, 1)),
    ],
)
def test_chunks(kernels: ModuleType, states: int, T: int, expected: tuple[int, int]) -> None:
    chunks, length = kernels.chunks_of(states, T, 132)
    assert (chunks - 1) * length < max(T, 1) <= chunks * length
    assert chunks == 1 or length % kernels.STEPS == 0
    if T < 2**40:
        assert (chunks, length) == expected


# ---- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gpu_error_against_float64(case: str, dtype: torch.dtype) -> None:
    wrong = [d for d in compare_case(CASES[case] | {"dtype": dtype, "device": "cuda"}, "triton") if not d.ok]
    assert not wrong, wrong


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("sizes", ((4, 16384, 64), (32, 1024, 256), (4096, 3, 40)), ids=str)
def test_gpu_same_bits_on_every_run_without_waiting(sizes: tuple[int, int, int]) -> None:
    inputs = make_inputs(*sizes, initial=True, device="cuda")
    first = ours(inputs, "triton").tensors()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = ours(inputs, "triton").tensors()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], second[name]) for name in first)
