"""Layers with adapters in autograd's and the compilers' graphs: what is kept, computed, traced."""

import pytest
import torch
import torch.nn.functional as F
from lora import BACKENDS, call, native_only, operands

import kdkernels as kd
from kdkernels.ops.lora_linear import schema
from kdkernels.ops.lora_linear.call import pack
from kdkernels.testing.lora_linear.inputs import make_inputs

# ---- what is kept and what is computed


@native_only
@pytest.mark.parametrize("p", (0.0, 0.1))
def test_bytes_kept_for_backward(p):
    N, d_in, d_out, r = 64, 96, 80, 4
    x, weight, lora_A, lora_B, bias = operands(N, d_in, d_out, r, torch.float32)
    weight, bias = weight.detach(), bias.detach()
    parameters = {t.data_ptr() for t in (weight, lora_A, lora_B, bias)}
    kept = {}

    def keep(t):
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(x, weight, lora_A, lora_B, bias, dropout_p=p, backend="native")
    assert sum(kept.values()) <= x.numel() * 4 + N * r * 4 + N * d_in // 8


@native_only
def test_only_requested_gradients_are_computed(monkeypatch):
    from kdkernels.ops.lora_linear import native

    rooms = []
    backward = native.backward

    def spy(*arguments):
        rooms.append(list(arguments[-1]))
        return backward(*arguments)

    monkeypatch.setattr(native, "backward", spy)
    for wanted in range(5):
        tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands())]
        call(*tensors, backend="native").sum().backward()
        assert [i for i, need in enumerate(rooms.pop()) if need] == [wanted]


@native_only
def test_what_backward_does_not_read_may_change():
    x, weight, lora_A, lora_B, bias = operands(grad=False)
    lora_A.requires_grad_()
    y = call(x, weight, lora_A, lora_B, bias, backend="native")
    weight.mul_(2)  # frozen, and x needs no gradient
    bias.zero_()
    (grad,) = torch.autograd.grad(y.sum(), lora_A, retain_graph=True)
    torch.testing.assert_close(grad, 1.5 * lora_B.sum(0)[:, None] * x.sum(0))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), lora_A)


@native_only
def test_an_output_that_is_not_used_gives_no_gradient():
    x, weight, lora_A, lora_B, _ = operands()
    layers = [kd.LoRA(weight, *(t.detach().clone().requires_grad_() for t in (lora_A, lora_B))) for _ in range(3)]
    layers[1] = layers[1]._replace(dropout_p=0.5)
    torch.manual_seed(2)
    outputs = kd.lora_linear_group(x, layers, backend="native")
    found = torch.autograd.grad(
        outputs[1].sum(), [x, *(t for a in layers for t in a[1:3])], allow_unused=True, retain_graph=True
    )
    assert [g is None for g in found] == [False, True, True, False, False, True, True]
    torch.manual_seed(2)
    outputs = kd.lora_linear_group(x, layers, backend="reference")
    expected = torch.autograd.grad(outputs[1].sum(), (x, *layers[1][1:3]))
    for a, b in zip((found[0], *found[3:5]), expected, strict=True):
        torch.testing.assert_close(a, b)


@native_only
def test_a_gradient_of_zeros_without_memory():
    tensors = operands()
    y = call(*tensors, backend="native")
    for grad in torch.autograd.grad(y, tensors, torch._efficientzerotensor(y.shape, dtype=y.dtype)):
        assert not grad.any()


@native_only
def test_batches_of_gradients_are_refused():
    x, *rest = operands()
    y = call(x, *rest, backend="native")
    with pytest.raises(RuntimeError, match="takes no batches of gradients; use backend='reference'"):
        torch.autograd.grad(y, x, torch.ones(4, *y.shape, dtype=y.dtype), is_grads_batched=True)


# ---- transforms


@native_only
def test_opcheck():
    for K, p in ((1, 0.0), (2, 0.3)):
        inputs = make_inputs(K=K, dropout_p=p)
        tensors, numbers = pack(inputs.input, inputs.layers)
        leaves = [t.requires_grad_() for t in tensors]
        torch.library.opcheck(schema.lora_linear.seen, (leaves, numbers, inputs.states if p else None, "native"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_compiled_as_one_graph_with_dynamic_shapes(backend, p):
    def step(*t):
        return call(*t, dropout_p=p, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 8):
        tensors = operands(N)
        grads = []
        for function in (step, compiled):
            torch.manual_seed(4)
            grads.append(torch.autograd.grad(function(*tensors).square().sum(), tensors))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native_only
def test_compiled_by_inductor():
    tensors = operands(dtype=torch.float32)
    compiled = torch.compile(lambda *t: call(*t, backend="native"), fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors).square().sum(), tensors),
        torch.autograd.grad(call(*tensors, backend="native").square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_base_as_linear_does(backend):
    tensors = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*tensors, backend=backend)
        assert y.dtype is F.linear(tensors[0], tensors[1]).dtype is torch.bfloat16
        z = call(*(t.double() for t in tensors), backend=backend)
    assert z.dtype is torch.float64
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype is torch.float32 for g in grads)
    torch.testing.assert_close(y.float(), call(*tensors, backend=backend), rtol=5e-2, atol=5e-2)


@native_only
def test_a_scaling_that_becomes_dynamic():
    x, weight, lora_A, lora_B, _ = operands(grad=False)
    compiled = torch.compile(
        lambda x, s: kd.lora_linear(x, weight, lora_A, lora_B, scaling=s), fullgraph=True, backend="aot_eager"
    )
    for scaling in (1.0, 2.0, 3.5):
        expected = kd.lora_linear(x, weight, lora_A, lora_B, scaling=scaling)
        torch.testing.assert_close(compiled(x, scaling), expected)


def test_torch_func_takes_the_reference():
    x, weight, lora_A, lora_B, _ = operands(grad=False)
    grad = torch.func.grad(lambda x: kd.lora_linear(x, weight, lora_A, lora_B).sum())(x)
    torch.testing.assert_close(grad, (weight + lora_B @ lora_A).sum(0).expand_as(x))
    each = torch.func.vmap(lambda x: kd.lora_linear(x, weight, lora_A, lora_B))(x)
    torch.testing.assert_close(each, kd.lora_linear(x, weight, lora_A, lora_B, backend="reference"))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: kd.lora_linear(x, weight, lora_A, lora_B, backend="native").sum())(x)


@native_only
def test_exported_with_any_number_of_points():
    layer = kd.nn.LoRALinear(12, 9, 3, dropout=0.1)
    points = torch.export.Dim("points")
    exported = torch.export.export(layer.eval(), (torch.randn(8, 12),), dynamic_shapes=({0: points},)).module()
    x = torch.randn(5, 12)
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_on_the_reference():
    layer = kd.nn.LoRALinear(12, 9, 3).eval()
    x = torch.randn(8, 12)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))
