"""`lora_linear` and `lora_linear_group`: against float64 and autograd, under transforms, on every instruction set."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ISAS
from lora import BACKENDS, call, native_only, operands

import kdkernels as kd
from kdkernels import gemm
from kdkernels.gemm import vendor_multiplies
from kdkernels.ops.lora_linear import reference, schema
from kdkernels.philox import keep_mask
from kdkernels.testing.check import FLOAT64_SHARE
from kdkernels.testing.lora_linear.checks import QUICK, VARIANTS, compare_case
from kdkernels.testing.lora_linear.inputs import NAMES, exact, make_inputs, ours

# ---- numbers


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("case", QUICK)
def test_error_against_float64(case, dtype, variant, isa):
    if "adapter_dtype" in VARIANTS[variant] and dtype.itemsize >= 4:
        pytest.skip("adapters in float32 beside a narrower base")
    wrong = [d for d in compare_case({"dtype": dtype} | VARIANTS[variant] | QUICK[case], "native") if not d.ok]
    assert not wrong, wrong


@native_only
@pytest.mark.parametrize("p", (0.0, 0.4))
@pytest.mark.parametrize("bias", (False, True))
def test_every_combination_of_gradients_in_float64(bias, p):
    names = ("input", *NAMES) if bias else ("input", *NAMES[:3])
    for count in range(len(names) + 1):
        for needs in itertools.combinations(names, count):
            inputs = make_inputs(bias=bias, dropout_p=p, needs=needs, dtype=torch.float64)
            found, target = ours(inputs, "native"), exact(inputs)
            assert found.grads.keys() == target.grads.keys()
            for name, x in target.tensors().items():
                assert (found.tensors()[name] - x).norm() <= 1e-10 * x.norm(), (needs, name)


@native_only
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_base_products_of_the_vendor(monkeypatch, p):
    """Where the processor multiplies bfloat16, torch forms [x, αS] [W, B]ᵀ and dY W; the rest is ours."""
    monkeypatch.setattr(gemm, "FORCED", "vendor")
    for dtype, case in itertools.product((torch.float32, torch.bfloat16), QUICK.values()):
        wrong = [d for d in compare_case({"dtype": dtype, "dropout_p": p} | case, "native") if not d.ok]
        assert not wrong, wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_gradcheck(backend, p):
    def seeded(*tensors):
        torch.manual_seed(1)
        return call(*tensors, dropout_p=p, backend=backend)

    assert torch.autograd.gradcheck(seeded, operands())


def test_the_reference_is_differentiable_twice():
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, backend="reference"), operands(3, 4, 3, 2))


@native_only
def test_a_second_derivative_of_native_is_an_error_that_says_what_to_do():
    tensors = operands()
    (grad,) = torch.autograd.grad(call(*tensors, backend="native").square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@native_only
def test_the_same_bits_for_every_thread_count_and_run():
    inputs = make_inputs(N=700, d_in=300, d_out=270, r=9, K=2, dropout_p=0.2)
    torch.set_num_threads(1)
    expected = ours(inputs, "native").tensors()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for name, x in ours(inputs, "native").tensors().items():
            assert torch.equal(x, expected[name]), (threads, name)


@native_only
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("shared", (False, True))
def test_a_group_is_its_layers(shared, p):
    """Outputs and gradients of a group equal those of single calls with the same masks."""
    inputs = make_inputs(K=3, shared=shared, dropout_p=p)
    together = ours(inputs, "native").tensors()
    for k in range(3):
        single = replace(inputs, layers=inputs.layers[k : k + 1], states=inputs.states[k : k + 1])
        expected = together["output" if k == 0 else f"output {k}"]
        torch.testing.assert_close(ours(single, "native").loss, expected, rtol=1e-5, atol=1e-6)


# ---- shapes, strides, values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (0,), (2, 0), (4,), (2, 3), (1, 1, 5)))
def test_leading_dimensions(backend, leading):
    _, weight, lora_A, lora_B, bias = operands()
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    y = call(x, weight, lora_A, lora_B, bias, backend=backend)
    assert y.shape == (*leading, 9)
    torch.testing.assert_close(y, F.linear(x, weight + 1.5 * lora_B @ lora_A, bias))
    for grad, t in zip(torch.autograd.grad(y.sum(), (x, lora_A, lora_B)), (x, lora_A, lora_B), strict=True):
        assert grad.shape == t.shape and grad.isfinite().all()


@native_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_do_not_matter(dtype):
    tensors = operands(9, 33, 21, 5, dtype)

    def layouts(t):
        yield t
        yield t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2]
        yield torch.cat([t, t], -1)[..., : t.shape[-1]]

    def results(xs, incoming):
        leaves = [x.detach().requires_grad_() for x in xs]
        torch.manual_seed(2)
        y = call(*leaves, dropout_p=0.3, backend="native")
        return [y, *torch.autograd.grad(y, leaves, incoming)]

    incoming = torch.randn(9, 21).to(dtype)
    expected = results(tensors, incoming)
    for xs in zip(*(layouts(t) for t in tensors), strict=True):
        for dY in (incoming, incoming.T.contiguous().T):
            for a, b in zip(results(xs, dY), expected, strict=True):
                assert torch.equal(a, b)
    row = torch.randn(1, 33).to(dtype)
    a, b = (
        results([x, *tensors[1:]], torch.ones(1, 1, dtype=dtype).expand(9, 21))
        for x in (row.expand(9, 33), row.repeat(9, 1))
    )
    assert all(map(torch.equal, a, b))


@native_only
def test_a_nan_stays_in_its_row():
    x, *rest = operands(8, dtype=torch.float32)
    with torch.no_grad():
        x[3, 5] = torch.nan
    y = call(x, *rest, backend="native")
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@native_only
def test_a_dropped_element_does_not_exist_for_the_adapter():
    """NaN at a dropped place reaches Y through the base alone."""
    state = torch.tensor([[3, 4]])
    mask = keep_mask(state[0], 6, 8, 0.5)
    x = torch.where(mask, 1.0, torch.nan)
    eye, zeros = torch.eye(8), torch.zeros(8, 8)
    _, S = schema.lora_linear.seen([x, zeros, eye, eye, None], [1.0, 0.5], state, "native")
    assert torch.equal(S, 2.0 * mask)


@pytest.mark.parametrize("wide_adapters", (False, True))
@pytest.mark.parametrize("path", ("reference", *(pytest.param(x, marks=native_only) for x in ("own", "vendor"))))
def test_bfloat16_is_rounded_once(path, wide_adapters, monkeypatch):
    """Beside the rounding of the result, half a unit of its last place, there is room for that of sums alone."""
    if path != "reference":
        monkeypatch.setattr(gemm, "FORCED", path)
    x, weight, lora_A, lora_B, bias = operands(40, 64, 48, 8, torch.bfloat16, grad=False)
    if wide_adapters:
        draw = torch.Generator().manual_seed(4)
        lora_A, lora_B = (torch.randn(t.shape, generator=draw) for t in (lora_A, lora_B))
    exact = reference.adapted(*(t.double() for t in (x, weight, bias, lora_A, lora_B)), 1.5, 0.0, None)
    y = call(x, weight, lora_A, lora_B, bias, backend="reference" if path == "reference" else "native")
    assert y.dtype is torch.bfloat16
    # the vendor takes the adapter's part to 24 bits, beside wide adapters to 16
    sums = 2**-15 * (x.double() @ lora_A.double().T).abs() @ lora_B.double().abs().T if wide_adapters else 0
    off = (y.double() - exact).abs() > 2**-8 * exact.abs() * (1 + 2 * FLOAT64_SHARE) + 1e-4 + sums
    assert not off.any()


@native_only
def test_what_is_not_finite_is_no_other_number_in_the_vendors_product(monkeypatch):
    """A projected point beyond the range is infinite, not NaN, though it is split into several numbers."""
    monkeypatch.setattr(gemm, "FORCED", "vendor")
    x, weight, lora_A, lora_B, bias = operands(3, dtype=torch.bfloat16, grad=False)
    x[1] = 1e38
    y = call(x.abs(), weight.abs(), lora_A.abs(), lora_B.abs(), bias, backend="native")
    assert y[1].isinf().all() and y[[0, 2]].isfinite().all()


def test_who_multiplies_is_one_of_three(monkeypatch):
    monkeypatch.setattr(gemm, "FORCED", "mine")
    with pytest.raises(ValueError, match="KDKERNELS_GEMM is 'mine', but must be one of 'auto', 'vendor', 'own'"):
        vendor_multiplies(torch.float32)
    for who in ("vendor", "own"):
        monkeypatch.setattr(gemm, "FORCED", who)
        assert vendor_multiplies(torch.float32) is (who == "vendor")


@native_only
def test_the_processors_maker_multiplies_where_that_is_faster(monkeypatch):
    """Of large products: those of small ones do not pay for a call of their own."""
    monkeypatch.setattr(gemm, "FORCED", "auto")
    for maker in ("intel", "amd", "other"):
        monkeypatch.setattr(gemm, "_processor", lambda maker=maker: maker)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        assert vendor_multiplies(torch.float32, 2**30) is (maker == "intel")
        assert not vendor_multiplies(torch.float32, 2**10)


@native_only
def test_a_sign_that_torch_keeps_in_the_view():
    draw = torch.Generator().manual_seed(0)

    def negative(*shape):
        return torch.view_as_complex(torch.randn(*shape, 2, generator=draw)).conj().imag

    x, weight, dY = negative(9, 6), negative(5, 6), negative(9, 5)
    lora_A, lora_B = torch.randn(2, 6, generator=draw), torch.randn(5, 2, generator=draw)
    assert x.is_neg() and weight.is_neg() and dY.is_neg()
    results = []
    for backend in ("native", "reference"):
        leaf = x.detach().requires_grad_()
        y = kd.lora_linear(leaf, weight, lora_A, lora_B, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, dY)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"lora_B": torch.randn(9, 4)}, ValueError, r"lora_B has shape \(9, 4\).*r = 3, as in lora_A"),
        ({"lora_A": torch.randn(3, 11)}, ValueError, r"lora_A has shape \(3, 11\).*d_in = 12"),
        ({"bias": torch.randn(8)}, ValueError, r"bias has shape \(8\).*d_out = 9"),
        ({"weight": torch.randn(9, 12, 1)}, ValueError, "weight has shape"),
        ({"input": torch.ones(7, 12, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
        ({"input": [1.0]}, TypeError, "input is list"),
        ({"weight": torch.randn(9, 12).bfloat16()}, TypeError, "weight has dtype torch.bfloat16.*torch.float32"),
        ({"bias": torch.randn(9).double()}, TypeError, "bias has dtype torch.float64"),
        ({"lora_A": torch.randn(3, 12, device="meta")}, ValueError, "lora_A is on meta"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0, but must be at least 0 and below 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p is str"),
        ({"scaling": float("inf")}, ValueError, "scaling is inf"),
        ({"scaling": 10**400}, ValueError, "scaling is 1000"),
        ({"lora_A": torch.randn(0, 12), "lora_B": torch.randn(9, 0)}, ValueError, "rank of at least 1"),
        ({"scaling": None}, TypeError, "scaling is NoneType"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"backend": "triton"}, ValueError, "triton"),
    ),
)
def test_wrong_arguments_are_named(change, error, message):
    x, weight, lora_A, lora_B, bias = operands(dtype=torch.float32, grad=False)
    arguments = {"input": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias} | change
    with pytest.raises(error, match=message):
        kd.lora_linear(**arguments)


def test_a_group_says_which_layer_is_wrong():
    x, weight, lora_A, lora_B, _ = operands(dtype=torch.float32, grad=False)
    good, bad = kd.LoRA(weight, lora_A, lora_B), kd.LoRA(weight, lora_A, lora_B[:, :2])
    with pytest.raises(ValueError, match=r"layers\[1\]\.lora_B"):
        kd.lora_linear_group(x, [good, bad])
    with pytest.raises(ValueError, match="layers is empty"):
        kd.lora_linear_group(x, [])
    for layers, message in (
        (good, "layers is LoRA"),
        (None, "layers is NoneType"),
        ([good, None], r"layers\[1\] is None"),
    ):
        with pytest.raises(TypeError, match=message):
            kd.lora_linear_group(x, layers)
    assert len(kd.lora_linear_group(x, [good, tuple(good)])) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_any_kind(backend):
    tensors = operands()
    torch.manual_seed(0)
    expected = kd.lora_linear(*tensors[:4], scaling=0.5, dropout_p=0.25, backend=backend)
    for number in (Fraction, np.float16):
        torch.manual_seed(0)
        found = kd.lora_linear(*tensors[:4], scaling=number(0.5), dropout_p=number(0.25), backend=backend)
        assert torch.equal(found, expected)


@native_only
def test_a_forward_mode_derivative_is_refused_not_lost():
    tensors = operands()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: call(x, *tensors[1:], backend="native"), (tensors[0].detach(),), (torch.ones_like(tensors[0]),)
        )


@native_only
def test_explain_shows_what_would_run():
    tensors = operands()
    explanation = kd.explain(kd.lora_linear, *tensors[:4], bias=tensors[4], dropout_p=0.1)
    assert explanation.backend == "native" and explanation.method == "fused"
    costs = {cost.method: cost for cost in explanation.costs}
    assert costs["base"].bytes < costs["fused"].bytes < costs["eager"].bytes
    assert costs["base"].flops < costs["fused"].flops == costs["eager"].flops
