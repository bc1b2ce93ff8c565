"""Operators with torch.library and without it: when which, and that it makes no difference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from kdkernels.library import Operator, watched

POINTS = torch.ones(2, 3)


class Marked(torch.Tensor):
    pass


def test_what_watches_sees_operators():
    assert not watched([POINTS, torch.nn.Parameter(POINTS)])
    assert watched([POINTS, POINTS.as_subclass(Marked)])
    with FakeTensorMode():
        assert watched([])
    assert torch.func.vmap(lambda x: x + watched([x]))(POINTS).sum() == POINTS.sum() + POINTS.numel()


def test_both_ways_give_the_same():
    calls = []

    def scaled(x: torch.Tensor, factor: float) -> list[torch.Tensor]:
        calls.append(type(x))
        return [x * factor, x + factor]

    def save(ctx, inputs, output):
        ctx.factor = inputs[1]

    twice = Operator("kdkernels_tests::scaled", scaled)
    twice.register_fake(lambda x, factor: [torch.empty_like(x), torch.empty_like(x)])
    twice.register_autograd(lambda ctx, grads: (grads[0] * ctx.factor + grads[1], None), setup_context=save)
    x = POINTS.clone().requires_grad_()
    for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        first, second = run(x, 3.0)
        (grad,) = torch.autograd.grad((first + second).sum(), x)
        assert torch.equal(first, 3 * POINTS) and torch.equal(second, POINTS + 3) and torch.equal(grad, 4 * POINTS)
    assert len(calls) >= 2


@pytest.mark.native
def test_first_gradients_do_not_import_the_compiler(python, environment):
    """Seconds, which a call that nothing watches need not wait for."""
    program = (
        "import sys, torch, kdkernels as kd; x = torch.eye(3, requires_grad=True); "
        "kd.projection_alignment_loss(x, -x).backward(); kd.lora_linear(x, x, x, x).sum().backward(); "
        "kd.svdvals(x).sum().backward(); kd.hankel_singular_values(torch.full((3,), 0.5), x, x).sum().backward(); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    python(environment, "-c", program, check=True)


@pytest.mark.native
def test_batches_of_gradients_are_those_one_by_one():
    x, weights = torch.randn(5, 3, requires_grad=True), torch.randn(4, 5)
    losses = kd.projection_alignment_loss(x, torch.eye(5, 3) + 1, reduction="none")
    (together,) = torch.autograd.grad(losses, x, weights, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(losses, x, row, retain_graph=True)[0] for row in weights]
    torch.testing.assert_close(together, torch.stack(apart))
