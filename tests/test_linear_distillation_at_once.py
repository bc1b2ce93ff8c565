"""Small calls of `linear_distillation_loss` by one step into C++: which go there, and that the numbers are the same."""

import weakref

import pytest
import torch
from test_linear_distillation import DTYPES, every_divergence, loss

import kdkernels as kd
from kdkernels.ops.linear_distillation import api, at_once
from kdkernels.plans import Plans
from kdkernels.testing.compare import relative_error
from kdkernels.testing.linear_distillation.inputs import exact, make_inputs, ours, run

pytestmark = pytest.mark.native


@pytest.fixture
def calls(monkeypatch):
    """What was computed at once; plans of other tests are forgotten."""
    found, right = [], at_once.run
    monkeypatch.setattr(api, "PLANS", Plans())
    monkeypatch.setattr(at_once, "run", lambda *arguments: found.append(arguments) or right(*arguments))
    return found


def bare(**options):
    return make_inputs(plain=True, **options)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("frozen", [(), ("student",), ("student_head",)], ids=str)
def test_the_numbers_are_those_of_many_steps(calls, monkeypatch, divergence, dtype, reduction, frozen):
    inputs = bare(divergence=divergence, dtype=dtype, reduction=reduction, frozen=frozen, temperature=1.7)
    outcome = ours(inputs, "native")
    assert len(calls) == 1
    monkeypatch.setattr(at_once, "MOST", 0)
    monkeypatch.setattr(api, "PLANS", Plans())
    steps = ours(inputs, "native")
    assert len(calls) == 1
    tolerance = 2e-6 if dtype is torch.float32 else 1e-13
    for name, x in exact(inputs).tensors().items():
        assert relative_error(outcome.tensors()[name], steps.tensors()[name]) < tolerance, name
        assert relative_error(outcome.tensors()[name], x) < tolerance, name


@pytest.mark.parametrize(
    "options",
    [
        {"K": 2},
        {"labels": True, "alpha": 0.5},
        {"labels": True, "alpha": 1.0},
        {"weights": "mask"},
        {"reduction": "none"},
        {"given": "logits"},
        {"given": "top k"},
        {"student_logits": True},
        {"vocabulary": "truncated"},
        {"dtype": torch.bfloat16},
        {"N": 5000},
    ],
    ids=str,
)
def test_what_takes_several_steps(calls, options):
    ours(bare(**options), "native")
    assert not calls


def test_an_adapter_and_a_trained_bias_take_several_steps(calls):
    for names, frozen, count in (
        (("lora_A", "lora_B"), (), 0),
        ((), ("bias",), 0),
        (("lora_A", "lora_B"), ("bias",), 1),
    ):
        inputs = make_inputs(frozen=(*names, *frozen))
        for name in names:
            del inputs.trained[name]
        outcome = ours(inputs, "native")
        assert len(calls) == count
        assert relative_error(outcome.loss, exact(inputs).loss) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_states_of_any_shape_and_strides(calls, dtype):
    inputs = bare(N=24, dtype=dtype)
    expected = ours(inputs, "reference")

    def shaped(trained):
        states, teacher = (x.reshape(4, 6, -1).transpose(0, 1) for x in (trained["student"], inputs.teachers[0]))
        head = trained["student_head"].repeat_interleave(2, 1)[:, ::2]
        return kd.linear_distillation_loss(states, head, teacher, inputs.heads, backend="native")

    outcome = run(inputs, shaped)
    assert len(calls) == 1
    for name, x in expected.tensors().items():
        assert relative_error(outcome.tensors()[name], x) < 2e-6, name


def test_a_graph_that_is_walked_twice_and_one_that_is_differentiated_twice(calls):
    inputs = bare()
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.trained.items()}
    value = loss(inputs, leaves, backend="native")
    first = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * value, list(leaves.values()), retain_graph=True)
    for x, before, y in zip(first, kept, second, strict=True):
        assert torch.equal(x, before) and relative_error(y, 3 * x) < 2e-6
    (slope,) = torch.autograd.grad(value, leaves["student"], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' for second derivatives"):
        torch.autograd.grad(slope.sum(), leaves["student"])


def test_other_threads_give_the_same_bits(calls):
    inputs, found = bare(N=64, V=100), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(inputs, "native").tensors())
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 3
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


class Marked(torch.Tensor):
    """A subclass that does nothing."""


def test_a_subclass_anywhere_takes_several_steps(calls):
    inputs = bare()
    bias = torch.zeros(45).as_subclass(Marked)
    head = kd.Head(inputs.trained["student_head"], bias)
    kd.linear_distillation_loss(inputs.trained["student"], head, inputs.teachers, inputs.heads, backend="native")
    assert not calls


def test_a_teachers_graph_is_not_kept(calls):
    class Token:
        pass

    alive = []

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    inputs = bare()
    student = inputs.trained["student"].clone().requires_grad_()
    teacher = Same.apply(inputs.teachers[0].clone().requires_grad_())
    head = inputs.trained["student_head"]
    value = kd.linear_distillation_loss(student, head, teacher, inputs.heads, backend="native")
    del teacher
    assert len(calls) == 1 and alive[0]() is None and value.requires_grad
