"""The Triton kernels of projection alignment, in Triton's interpreter on CPU tensors; on a GPU where there is one."""

import math
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
from kdkernels.ops.projection_alignment import method as methods
from kdkernels.ops.projection_alignment.reference import ANGULAR_EPS, EPS, METRICS, weighted_losses
from kdkernels.testing.compare import Deviation, Outcome, poisoned_memory
from kdkernels.testing.projection_alignment.checks import judge
from kdkernels.testing.projection_alignment.inputs import Inputs, interpreted, make_inputs, ours

triton = pytest.importorskip("triton")

# numpy computes both arms of `tl.where`; a GPU does too, in silence
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")

NAME = "kdkernels.ops.projection_alignment.triton"
METHODS = ("direct", "gram")
SIDES = (("both", "direct"), ("student", "direct"), ("teacher", "direct"), ("both", "gram"))  # gram needs both
LOW = (torch.bfloat16, torch.float16)
PROJECTIONS = ("student_proj", "teacher_proj", "student_bias", "teacher_bias")

# Arguments of make_inputs by name. Rows are few, since the interpreter takes 20 ms for each tile.
CASES: dict[str, dict[str, Any]] = {
    "both sides": {"N": 20},
    "several steps a row": {"N": 2, "D": 2100},
    "several steps a point": {"N": 2, "D": 5, "d_s": 2100, "d_t": 2070},
    "student side": {"sides": "student", "weights": "nan"},
    "teacher side": {"sides": "teacher", "weights": "signed", "bias": False},
    "neither side": {"sides": "neither", "D": 130, "weights": "mask"},
    "no bias": {"bias": False, "weights": "nan"},
    "frozen teacher": {"frozen": ("teacher", "teacher_proj", "teacher_bias"), "weights": "signed", "D": 130},
    "frozen student": {"frozen": ("student", "student_proj", "student_bias"), "reduction": "sum"},
    "frozen projections": {"frozen": PROJECTIONS, "weights": "nan"},
    "only biases": {"frozen": ("student", "teacher", "student_proj", "teacher_proj"), "weights": "nan"},
    "points": {"reduction": "none", "weights": "signed"},
    "close": {"regime": "close", "bias": False},
    "parallel": {"regime": "parallel", "D": 130},
    "antiparallel": {"regime": "antiparallel", "D": 130, "sides": "neither"},
    "parallel, teacher side": {"regime": "parallel", "sides": "teacher"},
    "zero vectors": {"regime": "zero", "sides": "student"},
    "one point": {"N": 1, "D": 3, "d_s": 2, "d_t": 5},
    "no points": {"N": 0, "weights": "mask"},
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


def check(inputs: Inputs, method: str) -> None:
    """Hold the interpreted kernels to their budget: twice eager's error against float64."""
    with poisoned_memory():
        outcome = interpreted(inputs, "triton", method)
    assert not over_budget(inputs, outcome)


def over_budget(inputs: Inputs, outcome: Outcome) -> list[Deviation]:
    return [deviation for deviation in judge(inputs, outcome) if not deviation.error <= deviation.budget]


def refused(inputs: Inputs, method: str) -> bool:
    """Whether `method` does not apply to the case, as `explain` would say."""
    sizes = methods.sizes(inputs.operands, inputs.needs, "triton", inputs.metric)
    return method == "gram" and methods.gram_cost(sizes).why_not is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_error_against_float64(kernels: ModuleType, case: str, metric: str, method: str) -> None:
    arguments = {"N": 7} | CASES[case]
    inputs = make_inputs(**arguments, metric=metric)
    if refused(inputs, method):
        pytest.skip("gram does not apply")
    check(inputs, method)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", ["both sides", "student side", "teacher side", "frozen teacher", "points"])
def test_low_precision(kernels: ModuleType, case: str, dtype: torch.dtype) -> None:
    check(make_inputs(**({"N": 7} | CASES[case]), dtype=dtype), "direct")


@pytest.mark.parametrize("metric", METRICS)
def test_one_column(kernels: ModuleType, metric: str) -> None:
    """In one dimension every angle is 0 or π: cosine and angular have no gradient, and eager only rounding."""
    inputs = make_inputs(7, 3, 2, 1, metric=metric)
    if metric == "mse":
        check(inputs, "direct")
        return
    outcome = interpreted(inputs, "triton", "direct")
    exact = weighted_losses(*inputs.to(dtype=torch.float64).operands, None, metric=metric).mean()
    assert outcome.loss.item() == pytest.approx(exact.item(), abs=1e-6)
    assert all(grad.abs().max() < 1e-4 for grad in outcome.grads.values())


@pytest.mark.parametrize(("sides", "method"), SIDES)
def test_blocks_of_rows(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, sides: str, method: str) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 1)
    monkeypatch.setattr(kernels, "MIN_ROWS", 3)
    check(make_inputs(7, sides=sides, weights="nan"), method)
    check(make_inputs(4, sides=sides, dtype=torch.bfloat16), "direct")


@pytest.mark.parametrize(("sides", "method"), SIDES)
def test_any_strides(kernels: ModuleType, sides: str, method: str) -> None:
    inputs = make_inputs(7, sides=sides, weights="signed")

    def scattered(x: Tensor | None) -> Tensor | None:
        """The same numbers in every third column of a transposed buffer."""
        if x is None:
            return None
        room = torch.full((*x.shape[::-1], 3), torch.nan, dtype=x.dtype)
        view = room[..., 1].permute(*reversed(range(x.dim())))
        return view.copy_(x)

    strided = replace(inputs, operands=tuple(map(scattered, inputs.operands)), weights=scattered(inputs.weights))
    assert not strided.operands[0].is_contiguous()  # type: ignore[union-attr]
    check(strided, method)


def test_mixed_dtypes(kernels: ModuleType) -> None:
    """Each side in its own dtypes: float32 sums, and each gradient as exact as its own dtype."""
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float32)
    inputs = make_inputs(7)
    operands = [x.to(dtype) for x, dtype in zip(inputs.operands, dtypes, strict=True)]  # type: ignore[union-attr]
    total, grads = torch.tensor(torch.nan), [torch.full_like(x, torch.nan) for x in operands]
    kernels.loss_and_gradients(operands, None, "cosine", "direct", 1, total, grads)
    leaves = [x.double().requires_grad_() for x in operands]
    exact = weighted_losses(*leaves, None, metric="cosine").sum()
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)
    for grad, target in zip(grads, torch.autograd.grad(exact, leaves), strict=True):
        error = (grad.double() - target).norm() / target.norm()
        assert error < 2 * torch.finfo(grad.dtype).eps + 1e-6


@pytest.mark.parametrize(("sides", "method"), SIDES)
def test_nan_stays_nan_in_its_own_row(kernels: ModuleType, sides: str, method: str) -> None:
    inputs = make_inputs(7, sides=sides, frozen=PROJECTIONS, reduction="none")
    inputs.operands[1][2, 0] = torch.nan  # type: ignore[index]
    outcome = interpreted(inputs, "triton", method)
    for x in (outcome.loss, outcome.grads["student"], outcome.grads["teacher"]):
        rows = x.reshape(7, -1)
        assert rows[2].isnan().all()
        assert rows[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [(9e-9, 3.0), (3.0, 9e-9), (9e-9, 8e-9)], ids=str)
def test_vectors_below_the_clamp(kernels: ModuleType, lengths: tuple[float, float], method: str) -> None:
    """A clamped norm is a constant, to the gradient too (torch's cosine_similarity still differentiates it)."""
    directions = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    points = [lengths[0] * F.normalize(directions), lengths[1] * F.normalize(directions.roll(1, 0) + 2 * directions)]
    operands = (*points, torch.eye(5), torch.eye(5), None, None)
    grads = [torch.full_like(points[0], torch.nan) for _ in range(2)] + 4 * [torch.empty(0)]
    total = torch.tensor(torch.nan)
    kernels.loss_and_gradients(operands, None, "cosine", method, 1, total, grads)
    leaves = [x.double().requires_grad_() for x in points]
    units = [x / x.norm(dim=1, keepdim=True).clamp_min(EPS) for x in leaves]
    exact = (1 - (units[0] * units[1]).sum(1)).sum()
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)
    for grad, target in zip(grads, torch.autograd.grad(exact, leaves), strict=False):
        assert (grad - target).norm() < 1e-5 * target.norm()


@pytest.mark.parametrize("sign", [1, -1])
def test_angle_inside_the_clamp(kernels: ModuleType, sign: int) -> None:
    """Parallel points have the clamp's angle and no gradient."""
    x = make_inputs(7, D=130, sides="neither").operands[0]
    outcome = interpreted(
        Inputs((x, sign * 3 * x, None, None, None, None), None, (True, True) + 4 * (False,), "angular"),
        "triton",
        "direct",
    )
    assert outcome.loss.item() == pytest.approx(math.acos(sign * (1 - ANGULAR_EPS)), rel=1e-6)
    assert all(grad.count_nonzero() == 0 for grad in outcome.grads.values())


def test_angle_over_the_whole_range(kernels: ModuleType) -> None:
    angles = torch.linspace(0.01, math.pi - 0.01, 64, dtype=torch.float64)
    student = torch.tensor([[2.0, 0.0]]).expand(64, 2)
    teacher = torch.stack([angles.cos(), angles.sin()], 1).float()
    losses = torch.full((64,), torch.nan)
    kernels.losses((student, teacher, None, None, None, None), None, "angular", "direct", losses)
    exact = weighted_losses(student.double(), teacher.double(), None, None, None, None, None, metric="angular")
    assert (losses - exact).abs().max() < 4e-7


class Recorder(TorchDispatchMode):
    """What was asked of PyTorch: the operators' names, and the FLOPs of the matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "frozen", [(), PROJECTIONS, ("teacher", "teacher_proj"), ("student", "teacher"), None], ids=str
)
def test_only_the_gradients_asked_for(kernels: ModuleType, frozen: tuple[str, ...] | None) -> None:
    """The direct method's matmuls are those that its cost model counts."""
    names = ("student", "teacher", *PROJECTIONS)
    inputs = make_inputs(7, 5, 6, 20, frozen=names if frozen is None else frozen)
    operands = [x.detach() for x in inputs.operands]  # type: ignore[union-attr]
    grads = [torch.empty(x.shape if need else 0) for x, need in zip(operands, inputs.needs, strict=True)]
    with Recorder() as asked:
        kernels.loss_and_gradients(operands, None, "cosine", "direct", 1, torch.empty(()), grads)
    assert asked.flops == methods.direct_cost(methods.sizes(operands, inputs.needs, "triton", "cosine")).flops


@pytest.mark.parametrize("method", METHODS)
def test_nothing_asks_for_a_value(kernels: ModuleType, method: str) -> None:
    """An operator that reads a number back, or whose shape depends on one, would wait for the device."""
    inputs = make_inputs(7, weights="mask")
    operands = [x.detach() for x in inputs.operands]  # type: ignore[union-attr]
    with Recorder() as asked:
        kernels.loss_and_gradients(
            operands, inputs.weights, "cosine", method, 1, torch.empty(()), [torch.empty_like(x) for x in operands]
        )
    assert asked.names
    assert not asked.names & {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "is_nonzero"}


def test_gram_serves_cosine_in_float32() -> None:
    for dtype, metric, served in (
        (torch.float32, "cosine", True),
        (torch.float32, "angular", False),
        (torch.float32, "mse", False),
        (torch.bfloat16, "cosine", False),
    ):
        operands = make_inputs(512, 4, 4, 4096, dtype=dtype, bias=False).operands
        sizes = methods.sizes(operands, [True] * 6, "triton", metric)
        assert methods.choose("auto", sizes)[0] == "direct"
        if served:
            assert methods.choose("gram", sizes)[0] == "gram"
        else:
            with pytest.raises(ValueError, match="method='gram' does not apply"):
                methods.choose("gram", sizes)


@pytest.mark.parametrize("needs", ([True, False, True, True, False, False], [True, *[False] * 5]))
def test_auto_takes_gram_where_float64_is_fast_and_it_costs_less(needs: list[bool]) -> None:
    def chosen(N: int, D: int, by_itself: bool = True) -> str:
        sizes = methods.Sizes(N, D, 768, 1280, 4, "triton", "cosine", False, tuple(needs), gram_by_itself=by_itself)
        return methods.choose("auto", sizes)[0]

    assert chosen(8192, 4096) == chosen(8192, 16384) == "gram"  # as measured on an H100
    assert chosen(8192, 512) == "direct"  # D below the widths
    assert chosen(64, 4096) == "direct"  # too few points for the products of the projections
    assert chosen(8192, 4096, by_itself=False) == "direct"


def test_which_gpus_sum_in_float64_at_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = [x.to("meta") for x in make_inputs(8, bias=False).operands if x is not None]
    device = torch.device("cuda")
    for capability, precision, expected in (
        ((9, 0), "highest", True),
        ((9, 0), "high", False),
        ((8, 9), "highest", False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda found=precision: found)
        assert methods._gram_pays_on(device) is expected
    assert not methods.sizes(operands, [True] * 4, "triton", "cosine").gram_by_itself


def test_same_bits_on_every_run(kernels: ModuleType) -> None:
    inputs = make_inputs(7, weights="signed")
    first, second = (interpreted(inputs, "triton", "gram").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_gpu_error_against_float64(case: str, metric: str, dtype: torch.dtype, method: str) -> None:
    arguments = {"N": 300} | CASES[case]
    inputs = make_inputs(**arguments, metric=metric, dtype=dtype, device="cuda")
    if refused(inputs, method):
        pytest.skip("gram does not apply")
    with poisoned_memory():
        outcome = ours(inputs, "triton", method)
    assert not over_budget(inputs, outcome)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("dtype", "method"), [(torch.float32, "direct"), (torch.bfloat16, "direct"), (torch.float32, "gram")], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gpu_never_waits(reduction: str, dtype: torch.dtype, method: str) -> None:
    inputs = make_inputs(300, weights="mask", dtype=dtype, reduction=reduction, device="cuda")
    ours(inputs, "triton", method)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(inputs, "triton", method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_same_bits_on_every_run(method: str) -> None:
    inputs = make_inputs(5000, 64, 96, 512, device="cuda")
    first, second = (ours(inputs, "triton", method).tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@gpu
def test_gpu_memory_does_not_grow_with_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the gradients, direct needs its blocks and a number for each point."""
    from kdkernels.ops.projection_alignment import triton as module

    monkeypatch.setattr(module, "BLOCK_BYTES", 2**22)
    D, N = 1024, 2**16
    student, teacher = torch.randn(N, 8, device="cuda"), torch.randn(N, 8, device="cuda")
    W_s, W_t = torch.randn(D, 8, device="cuda"), torch.randn(D, 8, device="cuda", requires_grad=True)
    # cuBLAS takes its workspace from the same allocator, once
    kd.projection_alignment_loss(student[:9], teacher[:9], W_s, W_t, method="direct", backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kd.projection_alignment_loss(student, teacher, W_s, W_t, method="direct", backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2**22 + 2**21  # N·D floats would be 2**28
