"""The Triton kernels of layers with adapters, in Triton's interpreter on CPU tensors; on a GPU where there is one."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreting import interpreted_module, put_in_place
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.lora_linear import schema
from kdkernels.ops.lora_linear.call import pack
from kdkernels.ops.lora_linear.reference import adapted
from kdkernels.philox import draw_states, keep_mask
from kdkernels.testing.compare import Outcome, deviations, errors, poisoned_memory
from kdkernels.testing.lora_linear.checks import CASES, QUICK, VARIANTS, compare_case
from kdkernels.testing.lora_linear.inputs import NAMES, Inputs, eager, exact, make_inputs, ours

triton = pytest.importorskip("triton")

NAME = "kdkernels.ops.lora_linear.triton"
LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
LEAVES = ("input", *NAMES)

# Arguments of make_inputs by name, beside those of `validate`; past blocks and the ranks that one program holds.
MORE: dict[str, dict[str, Any]] = {
    "widths of 1": {"d_in": 1, "d_out": 1, "r": 1, "N": 3},
    "one more than blocks": {"N": 65, "d_in": 65, "d_out": 129, "r": 33},
    "exactly blocks": {"N": 64, "d_in": 64, "d_out": 128, "r": 64},
    "one less than blocks": {"N": 31, "d_in": 63, "d_out": 127, "r": 15},
    "wide input": {"N": 5, "d_in": 700, "d_out": 9},
    "wide output": {"N": 5, "d_in": 9, "d_out": 700},
    "rank 65": {"r": 65, "N": 9},
    "rank 130, siblings": {"r": 130, "K": 2, "N": 5, "d_in": 11, "d_out": 10},
    "rank 300": {"r": 300, "N": 5},
    "six siblings": {"K": 6, "N": 9},
    "five on one base": {"K": 5, "N": 9, "shared": True, "needs": ("input", "lora_A", "lora_B")},
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


@pytest.fixture(params=(False, True), ids=("vendor", "fused"))
def base(request: pytest.FixtureRequest, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Who multiplies x Wᵀ."""
    monkeypatch.setattr(kernels, "fuses", lambda d_in, dtype: request.param)
    return bool(request.param)


def check(inputs: Inputs, found: Outcome | None = None) -> None:
    """Hold the kernels to their budget: twice eager's error against float64."""
    target = exact(inputs)
    over = [d for d in deviations(found or ours(inputs, "triton"), target, errors(eager(inputs), target)) if not d.ok]
    assert not over, over


# ---- numbers


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("case", sorted((CASES | MORE).keys() - {"blocks of width", "blocks of points", "blocks"}))
def test_error_against_float64(base: bool, case: str, p: float) -> None:
    check(make_inputs(**(CASES | MORE)[case], dropout_p=p))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", ("one layer", "three on one base"))
def test_low_precision(base: bool, case: str, dtype: torch.dtype, variant: str) -> None:
    check(make_inputs(**{"dtype": dtype} | VARIANTS[variant] | QUICK[case]))


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, DTYPES, (None,)), (*LOW, torch.float32)], ids=str)
def test_adapters_of_any_dtype(kernels: ModuleType, dtypes: tuple[torch.dtype, ...]) -> None:
    """Gradients have the dtypes of what they belong to, and their digits where float32 adapters ask for them."""
    dtype, adapter, of_b = dtypes
    inputs = make_inputs(dtype=dtype, adapter_dtype=adapter, dropout_p=0.2)
    (layer,) = inputs.layers
    layer = layer._replace(lora_B=layer.lora_B.to(of_b or adapter))
    dY = torch.randn(37, 22).to(dtype)
    y, _, *grads = results(inputs.input, (layer,), inputs.states, [dY])
    leaves = [x.double().requires_grad_() for x in (inputs.input, *layer[:4])]
    x, W, A, B, b = leaves
    expected = adapted(x, W, b, A, B, layer.scaling, 0.2, inputs.states[0])
    originals = (inputs.input, inputs.input, *layer[:4])
    targets = (expected, *torch.autograd.grad(expected, leaves, dY.double()))
    for found, target, original in zip((y, *grads), targets, originals, strict=True):
        assert found.dtype is original.dtype
        assert (found - target).norm() <= 2 * torch.finfo(found.dtype).eps * target.norm() + 1e-5


@pytest.mark.parametrize("precision", ("highest", "high"))
def test_precisions_have_tiles_of_their_own(kernels: ModuleType, precision: str) -> None:
    """The interpreter multiplies float32 either way."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(make_inputs(N=70, d_in=70, d_out=70, r=20, K=2, dropout_p=0.3))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("p", (0.0, 0.4))
def test_every_combination_of_gradients(kernels: ModuleType, p: float) -> None:
    inputs = make_inputs(N=5, d_in=7, d_out=6, r=2, dropout_p=p)
    target = exact(inputs).tensors()
    for count in range(len(LEAVES) + 1):
        for needs in itertools.combinations(LEAVES, count):
            found = ours(replace(inputs, needs=frozenset(needs)), "triton")
            assert {name.split()[0] for name in found.grads} == set(needs)
            for name, x in found.tensors().items():
                assert (x - target[name]).norm() <= 1e-6 * target[name].norm(), (needs, name)


def test_siblings_that_need_different_gradients(kernels: ModuleType) -> None:
    inputs = make_inputs(N=5, d_in=7, d_out=6, r=2, K=2, dropout_p=0.4)
    target = exact(inputs).grads
    tensors, numbers = pack(inputs.input, inputs.layers)
    *_, S0, S1 = schema.lora_linear.seen(tensors, numbers, inputs.states, "triton")
    grads = [0.75 * torch.cos(torch.arange(30.0)).reshape(5, 6)] * 2
    for wanted in itertools.product((0, 1), repeat=4):
        needs = [False, *(k == only for k in range(2) for only in wanted)]
        found = schema.lora_linear_backward(grads, [S0, S1], tensors, numbers, inputs.states, needs, "triton")
        for need, name, x in zip(needs[1:], [f"{n} {k}" for k in range(2) for n in NAMES], found[1:], strict=True):
            assert x is None if not need else (x - target[name]).norm() <= 1e-6 * target[name].norm()


def test_one_pass_over_the_gradient_or_two(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Low ranks take the kernel that leaves dS and dB at once, and sums over many programs; both ways agree."""
    launched = []
    for name in ("_project", "_reduce"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, f=function: (launched.append(name), f(*a)))
    for r, programs in ((4, 1), (4, 6), (4, 512), (65, 512)):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        launched.clear()
        check(make_inputs(N=140, d_in=9, d_out=70, r=r))
        assert launched == ["_project", "_reduce"] if r == 4 else ["_project", "_project", "_reduce", "_reduce"]


@pytest.mark.parametrize("programs", (1, 3, 512))
def test_sums_are_cut_for_any_number_of_programs(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(make_inputs(N=150, d_in=70, d_out=5, r=3, K=2, dropout_p=0.3))


def test_a_group_is_its_layers(kernels: ModuleType) -> None:
    for shared in (False, True):
        inputs = make_inputs(N=9, K=3, shared=shared, dropout_p=0.3, needs=("lora_A", "lora_B"))
        together = ours(inputs, "triton").tensors()
        for k in range(3):
            single = replace(inputs, layers=inputs.layers[k : k + 1], states=inputs.states[k : k + 1])
            alone = ours(single, "triton").tensors()
            torch.testing.assert_close(alone["output"], together["output" if k == 0 else f"output {k}"])
            for name in ("grad lora_A", "grad lora_B"):
                torch.testing.assert_close(alone[f"{name} 0"], together[f"{name} {k}"])


def test_one_product_for_all_adapters_on_a_base(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **options: (products.append(a), multiply(*a, **options))[1])
    ours(make_inputs(K=4, shared=True, needs=()), "triton")
    assert len(products) == 1


def test_rates_of_their_own(kernels: ModuleType) -> None:
    """Siblings with and without dropout, and with different scalings."""
    inputs = make_inputs(K=4)
    rates = (0.0, 0.5, 0.0, 0.9)
    layers = tuple(layer._replace(dropout_p=p) for layer, p in zip(inputs.layers, rates, strict=True))
    check(replace(inputs, layers=layers))


# ---- masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "d"), ((1, 1), (5, 7), (35, 70)))
def test_masks_are_those_of_every_backend(kernels: ModuleType, N: int, d: int, dtype: torch.dtype) -> None:
    """With A = 1 and x = 1 the projected points are the mask itself, in forward and in both places of backward."""
    for seed, offset, p in ((1, 2, 0.1), (-(2**63), 2**63 - 1, 0.5), (12345678901234, -1, 0.93), (7, 7, 1e-12)):
        state = torch.tensor([[seed, offset]])
        mask = keep_mask(state[0], N, d, p)
        x, eye, W = torch.ones(N, d, dtype=dtype), torch.eye(d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
        _, S = schema.lora_linear.seen([x, W, eye, eye, None], [1.0, p], state, "triton")
        assert torch.equal(S != 0, mask)
        operands = ([x], [S], [x, W, eye, eye, None], [1.0, p], state)
        dX, *_ = schema.lora_linear_backward(*operands, [True] + [False] * 4, "triton")
        assert torch.equal(dX != 0, mask)
        # with a dS that is 1 in one column, dA sums the mask's columns
        dA = schema.lora_linear_backward(*operands, [False, False, True, False, False], "triton")[2]
        expected = mask.double().sum(0).expand(d, d) / (1 - p)
        torch.testing.assert_close(dA.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3, atol=1e-6)


def test_masks_of_siblings_are_their_own(kernels: ModuleType) -> None:
    states = torch.tensor([[3, 4], [3, 5], [-1, 2**40]])
    x, eye, W = torch.ones(9, 20), torch.eye(20), torch.zeros(1, 20)
    tensors, numbers = pack(x, [kd.LoRA(W, eye, W.T, dropout_p=p) for p in (0.5, 0.0, 0.25)])
    *_, S0, S1, S2 = schema.lora_linear.seen(tensors, numbers, states, "triton")
    assert torch.equal(S0 != 0, keep_mask(states[0], 9, 20, 0.5))
    assert torch.equal(S1, x)
    assert torch.equal(S2 != 0, keep_mask(states[2], 9, 20, 0.25))


def test_a_dropped_element_does_not_exist_for_the_adapter(kernels: ModuleType) -> None:
    """NaN at a dropped place reaches neither S nor dA."""
    state = torch.tensor([[3, 4]])
    mask = keep_mask(state[0], 6, 8, 0.5)
    x, eye, W = torch.where(mask, 1.0, torch.nan), torch.eye(8), torch.zeros(8, 8)
    _, S = schema.lora_linear.seen([x, W, eye, eye, None], [1.0, 0.5], state, "triton")
    assert torch.equal(S, 2.0 * mask)
    operands = ([torch.ones(6, 8)], [S], [x, W, eye, eye, None], [1.0, 0.5], state)
    dA = schema.lora_linear_backward(*operands, [False, False, True, False, False], "triton")[2]
    assert torch.equal(dA, 2.0 * mask.sum(0).expand(8, 8))


# ---- strides, values, repetition


def strided(x: Tensor) -> Iterator[Tensor]:
    """The same numbers: transposed, every third column of a buffer, a slice of longer rows."""
    yield x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2)[::2]
    room = torch.full((*x.shape, 3), torch.nan, dtype=x.dtype)
    yield room[..., 1].copy_(x)
    yield torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], -1).split(x.shape[-1], -1)[1]


def results(x: Tensor, layers: tuple[kd.LoRA, ...], states: Tensor, incoming: list[Tensor]) -> list[Tensor]:
    tensors, numbers = pack(x, layers)
    found = schema.lora_linear.seen(tensors, numbers, states, "triton")
    needs = [True] * len(tensors)
    return found + schema.lora_linear_backward(
        incoming, found[len(layers) :], tensors, numbers, states, needs, "triton"
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_do_not_matter(base: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(N=9, d_in=33, d_out=21, K=2, dropout_p=0.3, dtype=dtype)
    incoming = [torch.randn(9, 21).to(dtype) for _ in range(2)]
    expected = results(inputs.input, inputs.layers, inputs.states, incoming)
    for i in range(3):
        scattered: Callable[[Any], Any] = lambda x, i=i: list(strided(x))[i] if isinstance(x, Tensor) else x  # noqa: E731
        layers = tuple(kd.LoRA(*map(scattered, layer)) for layer in inputs.layers)
        assert not layers[0].weight.is_contiguous()
        found = results(scattered(inputs.input), layers, inputs.states, list(map(scattered, incoming)))
        for a, b in zip(found, expected, strict=True):
            # vendors' products may sum in another order
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5)


def test_expanded_tensors(base: bool) -> None:
    """Strides of zero: one point for all, one row of the weight for all, and the gradient of a sum."""
    inputs = make_inputs(N=9, d_in=33, d_out=21, dropout_p=0.3)
    (layer,) = inputs.layers
    expanded = layer._replace(weight=layer.weight[:1].expand(21, 33), lora_B=layer.lora_B[:1].expand(21, 5))
    x, dY = inputs.input[:1].expand(9, 33), torch.ones(()).expand(9, 21)
    copies = kd.LoRA(*(t.contiguous() if isinstance(t, Tensor) else t for t in expanded))
    found = results(x, (expanded,), inputs.states, [dY])
    for a, b in zip(found, results(x.contiguous(), (copies,), inputs.states, [dY.contiguous()]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_sign_that_torch_keeps_in_the_view(base: bool) -> None:
    draw = torch.Generator().manual_seed(0)

    def negative(*shape: int) -> Tensor:
        return torch.view_as_complex(torch.randn(*shape, 2, generator=draw)).conj().imag

    x, dY = negative(9, 6), negative(9, 5)
    layer = kd.LoRA(negative(5, 6), negative(2, 6), negative(5, 2), negative(5))
    plain = kd.LoRA(*(t.clone().resolve_neg() for t in layer[:4]))
    assert x.is_neg() and layer.lora_A.is_neg() and not plain.lora_A.is_neg()
    found = results(x, (layer,), torch.empty(0, 2, dtype=torch.int64), [dY])
    expected = results(x.resolve_neg(), (plain,), torch.empty(0, 2, dtype=torch.int64), [dY.resolve_neg()])
    assert all(map(torch.equal, found, expected))


def test_nan_stays_nan_in_its_own_row(base: bool) -> None:
    inputs = make_inputs(N=7, needs=("lora_B",))
    inputs.input[2, 0] = torch.nan
    outcome = ours(inputs, "triton")
    assert outcome.loss[2].isnan().all()
    assert outcome.loss[[0, 1, 3, 4, 5, 6]].isfinite().all()
    assert outcome.grads["lora_B 0"].isnan().all()


@pytest.mark.parametrize("p", (0.0, 0.3))
def test_same_bits_on_every_run(base: bool, p: float) -> None:
    inputs = make_inputs(N=140, d_in=70, d_out=20, dropout_p=p)
    first, second = (ours(inputs, "triton").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_path_of_small_layers(kernels: ModuleType) -> None:
    """Without torch.library, through the same kernels."""
    inputs = make_inputs(N=5, dropout_p=0.3)
    tensors, numbers = pack(inputs.input, inputs.layers)
    leaves = [x.requires_grad_() for x in tensors]
    results = []
    for function in (schema.lora_linear, schema.lora_linear.seen):
        y = function(leaves, numbers, inputs.states, "triton")[0]
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(map(torch.equal, *results))


def test_the_smaller_cost_decides_who_multiplies_the_base(kernels: ModuleType) -> None:
    before = torch.get_float32_matmul_precision()
    for precision, dtype, narrow, wide in (
        ("highest", torch.float32, 64, 128),
        ("high", torch.float32, 256, 1024),
        ("highest", torch.bfloat16, 256, 1024),
    ):
        torch.set_float32_matmul_precision(precision)
        try:
            assert kernels.fuses(narrow, dtype) and not kernels.fuses(wide, dtype)
        finally:
            torch.set_float32_matmul_precision(before)


# ---- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES | MORE)
def test_gpu_error_against_float64(case: str, dtype: torch.dtype, variant: str) -> None:
    if "adapter_dtype" in VARIANTS[variant] and dtype.itemsize >= 4:
        pytest.skip("adapters in float32 beside a narrower base")
    arguments = {"dtype": dtype, "device": "cuda"} | VARIANTS[variant] | (CASES | MORE)[case]
    with poisoned_memory():
        wrong = [d for d in compare_case(arguments, "triton") if not d.ok]
    assert not wrong, wrong


@pytest.mark.gpu
@gpu
def test_gpu_masks_are_those_of_the_reference() -> None:
    state = draw_states(1, torch.device("cuda"))
    x, eye, W = torch.ones(300, 1030), torch.eye(1030), torch.zeros(1, 1030)
    x, eye, W = x.cuda(), eye.cuda(), W.cuda()
    _, S = schema.lora_linear.seen([x, W, eye, W.T, None], [1.0, 0.3], state, "triton")
    assert torch.equal(S.cpu() != 0, keep_mask(state[0].cpu(), 300, 1030, 0.3))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_never_waits(dtype: torch.dtype) -> None:
    inputs = make_inputs(N=300, K=3, dropout_p=0.3, dtype=dtype, device="cuda")
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
    inputs = make_inputs(N=5000, d_in=768, d_out=512, r=16, K=3, dropout_p=0.1, device="cuda")
    first, second = (ours(inputs, "triton").tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
