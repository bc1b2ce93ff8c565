"""The Triton kernels of linear distillation, in Triton's interpreter on CPU tensors; on a GPU where there is one."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreting import interpreted_module, put_in_place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.ops.linear_distillation import stream
from kdkernels.ops.linear_distillation.call import Call, Side
from kdkernels.ops.linear_distillation.reference import DIVERGENCES, weighted_losses
from kdkernels.testing.compare import Deviation, Outcome, poisoned_memory
from kdkernels.testing.linear_distillation.checks import CASES, applies, judge
from kdkernels.testing.linear_distillation.inputs import Inputs, call_of, exact, interpreted, make_inputs, ours

triton = pytest.importorskip("triton")

# numpy computes both arms of `tl.where`; a GPU does too, in silence
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

NAME = "kdkernels.ops.linear_distillation.triton"
LOW = (torch.bfloat16, torch.float16)
NONE = -torch.inf
TRAINED = ("student", "student_head", "bias", "lora_A", "lora_B")

# Arguments of make_inputs by name, beside those of `validate`. Rows are few: the interpreter takes 20 ms for each.
MORE: dict[str, dict[str, Any]] = {
    "each column by itself": {"V": 530, "N": 3, "plain": True},
    "several steps a row": {"N": 2, "V": 4100, "K": 2, "labels": True, "alpha": 0.5, "temperature": 2.0},
    "several steps a row of logits": {"N": 2, "V": 4097, "given": "logits", "student_logits": True},
    "cold": {"temperature": 0.1, "labels": True, "alpha": 0.5},
    "huge logits": {"regime": "huge", "given": "logits", "student_logits": True, "labels": True, "alpha": 0.5},
    "huge logits, mixture": {"regime": "huge", "given": "logits", "student_logits": True, "K": 2, "temperature": 0.1},
    "geometric, three": {"K": 3, "mixture": "geometric", "weights": "nan", "beta": 0.1},
    "one token, mixture": {"V": 1, "K": 2, "labels": True, "alpha": 0.5, "temperature": 2.0},
    "nothing counts": {"N": 1, "weights": "nan", "labels": True, "alpha": 0.5},
}
ALL = {name: arguments for name, arguments in (CASES | MORE).items() if name not in ("blocks", "wide")}


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


def check(inputs: Inputs) -> None:
    """Hold the interpreted kernels to their budget: twice eager's error against float64."""
    with poisoned_memory():
        outcome = interpreted(inputs, "triton")
    assert not over_budget(inputs, outcome)


def over_budget(inputs: Inputs, outcome: Outcome) -> list[Deviation]:
    return [deviation for deviation in judge(inputs, outcome) if not deviation.ok]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", ALL)
def test_error_against_float64(kernels: ModuleType, case: str, divergence: str) -> None:
    if not applies(divergence, torch.float32, ALL[case]):
        pytest.skip("infinite")
    check(make_inputs(**{"N": 7, "divergence": divergence} | ALL[case]))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", ["one teacher", "three teachers", "mapped", "logits", "truncated", "frozen head"])
def test_low_precision(kernels: ModuleType, case: str, dtype: torch.dtype) -> None:
    check(make_inputs(**{"N": 7, "divergence": "jsd"} | ALL[case], dtype=dtype))


def small_call(N: int = 3, V: int = 37, **options: Any) -> Call:
    """Given logits."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (Side(torch.randn(N, V, generator=draw), vocabulary=V) for _ in range(2))
    call = Call(student, [teacher], None, None, None, "forward_kl", "arithmetic", 1.0, 0.5, 1.0, 1, torch.float32)
    return call._replace(**options)


def losses_and_gradient(module: ModuleType, call: Call) -> tuple[Tensor, Tensor]:
    """Of given logits."""
    with poisoned_memory():
        losses = torch.empty(len(call.student.states))
        total, gradient = torch.empty(()), torch.empty_like(call.student.states)
        module.losses(call, losses)
        module.loss_and_gradients(call, total, [gradient, None, None, None, None])
    assert torch.equal(total, losses.sum()) or not total.isfinite()
    return losses, gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_without_probability(kernels: ModuleType, divergence: str) -> None:
    """They add nothing; what one side excludes and the other does not makes that KL divergence infinite."""
    call = small_call(4, divergence=divergence)
    student, teacher = call.student.states, call.teachers[0].states
    both, rest, others = (torch.arange(37) % 3 == k for k in range(3))
    student[:, both] = teacher[:, both] = NONE
    student[1, rest] = teacher[2, rest] = NONE
    student[3, rest] = teacher[3, others] = NONE  # nothing in common
    losses, gradient = losses_and_gradient(kernels, call)
    infinite = {"forward_kl": [1, 3], "reverse_kl": [2, 3]}.get(divergence, [])
    assert losses.isinf().nonzero()[:, 0].tolist() == infinite
    leaf = student.double().requires_grad_()
    wide = call._replace(
        student=call.student._replace(states=leaf),
        teachers=[call.teachers[0]._replace(states=teacher.double())],
        dtype=torch.float64,
    )
    expected = weighted_losses(wide)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=0)
    finite = [i for i in range(4) if i not in infinite]
    (exact_gradient,) = torch.autograd.grad(expected[finite].sum(), leaf)
    torch.testing.assert_close(gradient[finite].double(), exact_gradient[finite].nan_to_num(0), rtol=1e-5, atol=1e-7)
    assert not gradient[finite][:, both].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher", "weights"])
def test_nan_stays_nan_in_its_own_row(kernels: ModuleType, side: str, divergence: str) -> None:
    call = small_call(labels=torch.tensor([1, 2, 3]), weights=torch.ones(3), alpha=0.5, divergence=divergence)
    assert call.weights is not None
    where = {"student": call.student.states, "teacher": call.teachers[0].states, "weights": call.weights[:, None]}
    where[side][1, -1] = torch.nan
    losses, gradient = losses_and_gradient(kernels, call)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [-1, 37, 2**40 + 3, -(2**62)])
def test_a_label_that_is_no_token_makes_its_point_nan(kernels: ModuleType, label: int) -> None:
    call = small_call(labels=torch.tensor([3, label, 5]), weights=torch.tensor([1.0, 1.0, 2.0]), alpha=0.5)
    losses, gradient = losses_and_gradient(kernels, call)
    assert losses.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, False]
    losses, gradient = losses_and_gradient(kernels, call._replace(weights=torch.tensor([1.0, 0.0, 2.0])))
    assert losses[1] == 0 and not gradient[1].any() and losses.isfinite().all() and gradient.isfinite().all()


def test_labels_that_nobody_needs_are_not_looked_at(kernels: ModuleType) -> None:
    losses, _ = losses_and_gradient(kernels, small_call(labels=torch.tensor([3, -100, 5])))
    assert losses.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["one teacher", "three teachers", "truncated", "mapped logits"])
def test_blocks_of_rows(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)  # sixteen rows
    check(make_inputs(**ALL[case] | {"N": 18}, dtype=dtype))


@pytest.mark.parametrize("logits", [False, True])
def test_any_strides(kernels: ModuleType, logits: bool) -> None:
    inputs = make_inputs(
        7, student_logits=logits, given="logits", K=2, weights="signed", labels=True, alpha=0.5, temperature=2.0
    )

    def scattered(x: Any) -> Any:
        """The same numbers in every third column of a transposed buffer."""
        room = torch.full((*x.shape[::-1], 3), -7 if x.dtype is torch.int64 else torch.nan, dtype=x.dtype)
        return room[..., 1].permute(*reversed(range(x.dim()))).copy_(x)

    strided = replace(
        inputs, trained={name: scattered(x) for name, x in inputs.trained.items()},
        teachers=[*map(scattered, inputs.teachers)], labels=scattered(inputs.labels), weights=scattered(inputs.weights),
    )  # fmt: skip
    assert not strided.trained["student"].is_contiguous()
    check(strided)


def test_nothing_beside_the_rows_is_changed(kernels: ModuleType) -> None:
    """Logits and their gradient within wider tensors; what lies beside them is not counted either."""
    call, rooms = small_call(), [torch.full((3, 64), 99.0) for _ in "stg"]
    views = [room[:, :37] for room in rooms]
    views[0].copy_(call.student.states)
    views[1].copy_(call.teachers[0].states)
    expected = losses_and_gradient(kernels, call)
    call = call._replace(
        student=call.student._replace(states=views[0]), teachers=[call.teachers[0]._replace(states=views[1])]
    )
    losses = torch.empty(3)
    kernels.losses(call, losses)
    kernels.loss_and_gradients(call, torch.empty(()), [torch.empty(3, 37), None, None, None, None])
    assert torch.equal(losses, expected[0])
    assert all((room[:, 37:] == 99).all() for room in rooms)


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_dtypes(kernels: ModuleType, states: torch.dtype) -> None:
    """States in one dtype, heads in another: float32 sums, and each gradient as exact as its own dtype."""
    head = torch.float32 if states is torch.bfloat16 else torch.bfloat16
    inputs = make_inputs(7, K=2)
    dtypes = dict(zip(TRAINED, (states, head, head, head, states), strict=True))
    mixed = replace(
        inputs, trained={name: x.to(dtypes[name]) for name, x in inputs.trained.items()},
        teachers=[x.to(states) for x in inputs.teachers],
    )  # fmt: skip
    found, expected = interpreted(mixed, "triton"), exact(mixed)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, grad in found.grads.items():
        error = (grad.double() - expected.grads[name]).norm() / expected.grads[name].norm()
        assert error < 2 * torch.finfo(grad.dtype).eps + 1e-6


class Recorder(TorchDispatchMode):
    """What was asked of PyTorch: the operators' names, and how many are matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.names.add(name)
        self.products += name in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


def recorded(module: ModuleType, inputs: Inputs) -> Recorder:
    """What a call asks of PyTorch."""
    call, needs = call_of(inputs, inputs.trained)
    grads = [torch.empty_like(x) if need else None for x, need in zip(call.student.tensors, needs, strict=False)]  # type: ignore
    with torch.no_grad(), Recorder() as asked:
        module.loss_and_gradients(call, torch.empty(()), grads)
    return asked


@pytest.mark.parametrize("needs", [(), ("student",), ("student_head",), ("bias",), ("lora_B",), TRAINED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_gradients_asked_for(kernels: ModuleType, needs: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(5, frozen=[name for name in TRAINED if name not in needs], dtype=dtype)
    leaves = {name: x.clone().requires_grad_(name in needs) for name, x in inputs.trained.items()}
    asked = recorded(kernels, replace(inputs, trained=leaves))
    # two heads and an adapter; of `student` there is also the adapter's part, as lora_A's is
    assert asked.products == 3 + {(): 0, ("student",): 2, ("bias",): 0, TRAINED: 4}.get(needs, 1)
    check(inputs)


@pytest.mark.parametrize("case", ["three teachers", "mapped", "truncated", "top k", "logits", "longer"])
def test_nothing_asks_for_a_value(kernels: ModuleType, case: str) -> None:
    """An operator that reads a number back, or whose shape depends on one, would wait for the device."""
    asked = recorded(kernels, make_inputs(**{"N": 4, "weights": "mask"} | ALL[case]))
    assert asked.names
    assert not asked.names & {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "is_nonzero"}


def test_given_logits_are_read_and_differentiated_where_they_are(kernels: ModuleType) -> None:
    """No room for a row, whatever there is of them: one kernel, and the sum of losses."""
    call = small_call(weights=torch.ones(3))
    rooms = stream._Rooms(call, kernels.Kernels(call), torch.float32, 3)
    assert rooms.rows == 3 and rooms.student is rooms.mixture is rooms.raw is rooms.apart is None
    grads = [torch.empty(3, 37), None, None, None, None]
    with Recorder() as asked:
        kernels.loss_and_gradients(call, torch.empty(()), grads)
    assert not asked.names & {"mm", "addmm", "_to_copy", "index_select", "masked_fill", "mul"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_beyond_a_row_is_zero(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Matmuls of bfloat16 on CPUs were seen to read an odd row's neighbour, and to multiply it by 0."""
    found = []
    add = stream._Trained.add
    monkeypatch.setattr(
        stream._Trained, "add", lambda self, block, gradient, w: found.append(gradient) or add(self, block, gradient, w)
    )
    check(make_inputs(5, dtype=dtype, weights="mask"))
    (gradient,) = found
    assert gradient.dtype is dtype and gradient.shape == (5, 45)
    assert not gradient.as_strided((5, 3), gradient.stride(), gradient.storage_offset() + 45).any()


def test_same_bits_on_every_run(kernels: ModuleType) -> None:
    inputs = make_inputs(5, **CASES["three teachers"])
    first, second = (interpreted(inputs, "triton").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_softcap_of_small_and_large_logits(kernels: ModuleType) -> None:
    """tanh to its last digits on either side of where its two forms meet."""
    x = torch.cat([torch.tensor([1e-20, 1e-3, 0.1, 0.3]), torch.linspace(0.55, 0.65, 9), torch.tensor([1.0, 3, 9, 99])])
    x = torch.cat([x, -x])[:, None]
    side = Side(torch.cat([x, torch.zeros_like(x)], 1), softcap=1.0, vocabulary=2)
    labels = torch.zeros(len(x), dtype=torch.int64)
    losses, gradient = losses_and_gradient(
        kernels, Call(side, [side], None, labels, None, "tvd", "arithmetic", 1.0, 0.5, 0.0, 1, torch.float32)
    )
    leaf = x.double().requires_grad_()
    expected = F.softplus(-leaf.tanh())
    assert (losses.double() - expected[:, 0]).abs().max() < 2e-7
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    assert (gradient[:, :1].double() - slope).abs().max() < 2e-7


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", CASES | MORE)
def test_gpu_error_against_float64(case: str, divergence: str, dtype: torch.dtype) -> None:
    arguments = (CASES | MORE)[case]
    if not applies(divergence, dtype, arguments):
        pytest.skip("infinite")
    inputs = make_inputs(**{"N": 150, "divergence": divergence} | arguments, dtype=dtype, device="cuda")
    with poisoned_memory():
        outcome = ours(inputs, "triton")
    assert not over_budget(inputs, outcome)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [51865, 128256])
@pytest.mark.parametrize("logits", [False, True])
def test_gpu_large_vocabularies(V: int, logits: bool, dtype: torch.dtype) -> None:
    """Odd ones too: rows of buffers are aligned whatever V is, those of given logits are not."""
    given = {"student_logits": True, "given": "logits"} if logits else {}
    inputs = make_inputs(60, 64, V, 2, 48, labels=True, alpha=0.5, weights="nan", dtype=dtype, device="cuda", **given)
    assert not over_budget(inputs, ours(inputs, "triton"))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["three teachers", "truncated", "logits", "geometric"])
def test_gpu_never_waits(case: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(**{"N": 300} | CASES[case], dtype=dtype, device="cuda")
    ours(inputs, "triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_gpu_same_bits_on_every_run() -> None:
    inputs = make_inputs(3000, 64, 5000, 2, labels=True, alpha=0.5, device="cuda")
    first, second = (ours(inputs, "triton").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@gpu
def test_gpu_memory_does_not_grow_with_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the gradients it needs its blocks and a number for each point."""
    from kdkernels.ops.linear_distillation import triton as module

    monkeypatch.setattr(module, "BLOCK_BYTES", 2**22)
    V, N = 4096, 2**16
    student, teacher = torch.randn(N, 8, device="cuda", requires_grad=True), torch.randn(N, 8, device="cuda")
    W_s, W_t = torch.randn(V, 8, device="cuda"), torch.randn(V, 8, device="cuda")
    # cuBLAS takes its workspace from the same allocator, once
    kd.linear_distillation_loss(student[:9], W_s, teacher[:9], W_t, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kd.linear_distillation_loss(student, W_s, teacher, W_t, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2**22 + 2**22  # N·V floats would be 2**30
