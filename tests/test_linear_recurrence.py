"""`linear_recurrence`: against float64, gradients of any order, under transforms, the same bits."""

from functools import cache

import pytest
import torch
from conftest import ISAS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrences import BACKENDS, DTYPES, WIDE, all_equal, loop, native_only, normal, operands, results
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.ops.linear_recurrence import native, schema
from kdkernels.testing.compare import deviations, errors
from kdkernels.testing.linear_recurrence.checks import CASES, QUICK, checks, compare_case
from kdkernels.testing.linear_recurrence.inputs import eager, exact, make_inputs, ours

# ---- numbers


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_check_is_within_its_budget(isa):
    found = {(c.backend, c.dtype, c.case): c.run() for c in checks() if c.device == "cpu" and c.backend == "native"}
    blocks = {(dtype, case) for _, dtype, case in found if case.endswith("features")}
    assert {dtype for dtype, _ in blocks} == {torch.float32, torch.float64} and len(blocks) == 8
    assert len(found) == len(DTYPES) * len(CASES) + len(blocks) and set(QUICK) < set(CASES)
    wrong = [(name, d) for name, report in found.items() for d in report if not d.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula_and_its_gradients(backend, dtype, own, reverse):
    tensors = operands(dtype, own=own)
    expected = loop(*tensors, reverse=reverse)
    grads = torch.autograd.grad(expected, tensors, normal(*expected.shape, dtype=dtype, seed=9))
    for a, b in zip(results(tensors, reverse=reverse, backend=backend), (expected, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@cache
def long_sequence():
    """The inputs, the answer in complex128 and eager's errors."""
    inputs = make_inputs(1, 16384, 3, radii=(0.999, 0.999), initial=True, dtype=torch.complex64)
    target = exact(inputs)
    return inputs, target, errors(eager(inputs), target)


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_long_sequences_near_the_circle(isa):
    inputs, target, yardstick = long_sequence()
    wrong = [d for d in deviations(ours(inputs, "native"), target, yardstick) if not d.ok]
    assert not wrong, wrong
    assert target.loss.abs().max() > 20  # the memory is long


# ---- gradients


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("initial", (False, True))
@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, dtype, own, initial, reverse):
    def call(*tensors):
        return kd.linear_recurrence(*tensors, reverse=reverse, backend=backend)

    tensors = operands(dtype, N=2, T=3, n=2, own=own, initial=initial)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@native_only
def test_a_third_derivative():
    def third(backend):
        Lambda, input, initial = operands(N=1, T=4, n=2)
        x = kd.linear_recurrence(Lambda, input, initial, backend=backend).abs().square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(x, Lambda, create_graph=True)
            x = grad.abs().square().sum()
        return grad

    torch.testing.assert_close(third("native"), third("reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Lambda", ((5,), (3, 5), (1, 5), (2, 1, 5), (1, 1, 5), (2, 3, 5)))
@pytest.mark.parametrize("initial", (None, (5,), (3, 5), (2, 1, 5), (2, 3, 5)))
def test_gradients_of_leading_dimensions_are_summed(Lambda, initial, backend):
    """Beside an input of (2, 3, T, 5)."""
    shapes = [Lambda, (2, 3, 4, 5)] + ([] if initial is None else [initial])
    leaves = [(normal(*shape, seed=k) / 2).requires_grad_() for k, shape in enumerate(shapes)]
    expanded = [x if k == 1 else x.expand(2, 3, 5) for k, x in enumerate(leaves)]
    expected = loop(*expanded)
    grads = torch.autograd.grad(expected, leaves, normal(*expected.shape, seed=9))
    for a, b in zip(results(leaves, backend=backend), (expected, *grads), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native_only
def test_only_the_gradients_that_are_asked_for(monkeypatch):
    asked, right = [], native.backward
    monkeypatch.setattr(native, "backward", lambda *x: asked.append(list(x[5])) or right(*x))
    expected = results(operands(), backend="native")
    for k in range(3):
        tensors = [x.detach().requires_grad_(i == k) for i, x in enumerate(operands())]
        assert all_equal(results(tensors, backend="native"), [expected[0], expected[1 + k]])
    assert asked == [[True, True, True], [True, False, False], [False, True, False], [False, False, True]]
    assert not kd.linear_recurrence(*operands(grad=False), backend="native").requires_grad
    with torch.no_grad():
        assert not kd.linear_recurrence(*operands(), backend="native").requires_grad


@native_only
def test_states_changed_before_backward_are_noticed():
    h = kd.linear_recurrence(*operands(), backend="native")
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.abs().sum().backward()


@native_only
def test_batches_of_gradients_are_refused():
    Lambda, *rest = operands()
    h = kd.linear_recurrence(Lambda, *rest, backend="native")
    with pytest.raises(RuntimeError, match="takes no batches of gradients"):
        torch.autograd.grad(h, Lambda, torch.ones(2, *h.shape, dtype=h.dtype), is_grads_batched=True)


# ---- transforms


@native_only
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex64))
@pytest.mark.parametrize("T", (0, 4))
def test_opcheck(T, dtype):
    for own, initial, reverse in ((False, False, False), (True, True, True)):
        inputs = make_inputs(T=T, n=3, own=own, initial=initial, dtype=dtype)
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs.tensors()]
        torch.library.opcheck(schema.linear_recurrence.seen, (*leaves, reverse, "native"))
        h = inputs.input
        for needs in ((True, True, initial), (False, True, False)):
            arguments = (h, inputs.Lambda, h, inputs.initial_state, reverse, list(needs), "native")
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(schema.linear_recurrence_backward.seen, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("backend", "initial", "dynamic"),
    (
        ("reference", True, True),
        pytest.param("native", False, True, marks=native_only),
        pytest.param("native", True, False, marks=native_only),
        pytest.param("native", True, True, marks=native_only),
    ),
)
def test_compiled_as_one_graph(backend, initial, dynamic):

    def step(*tensors):
        return kd.linear_recurrence(*tensors, reverse=True, backend=backend).abs().square()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, T in ((3, 3), (2, 3)) if backend == "reference" else ((3, 4), (2, 6), (4, 5)):
        tensors = operands(N=N, T=T, initial=initial)
        a, b = ((y, *torch.autograd.grad(y.sum(), tensors)) for y in (step(*tensors), compiled(*tensors)))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


def test_torch_func_takes_the_reference():
    Lambda, input, initial = operands(torch.float64, grad=False)
    for argument, tensor in enumerate((Lambda, input, initial)):
        loss = lambda *x: kd.linear_recurrence(*x).square().sum()  # noqa: E731
        grad = torch.func.grad(loss, argument)(Lambda, input, initial)
        tensor.requires_grad_()
        (expected,) = torch.autograd.grad(loss(Lambda, input, initial), tensor)
        tensor.requires_grad_(False)
        torch.testing.assert_close(grad, expected)
    batched = torch.func.vmap(kd.linear_recurrence, in_dims=(None, 0, 0))(Lambda, input, initial)
    torch.testing.assert_close(batched, kd.linear_recurrence(Lambda, input, initial))


@native_only
def test_a_forward_mode_derivative_is_right_or_refused():
    Lambda, input, _ = operands(torch.float64, grad=False)
    tangent = normal(*input.shape, dtype=torch.float64, seed=4)
    _, found = torch.func.jvp(lambda x: kd.linear_recurrence(Lambda, x), (input,), (tangent,))
    torch.testing.assert_close(found, kd.linear_recurrence(Lambda, tangent))  # linear in its input
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        with pytest.raises(RuntimeError, match="linear_recurrence has no forward-mode derivative on this backend"):
            kd.linear_recurrence(Lambda, dual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_it_alone(backend):
    tensors = operands(torch.float32)
    expected = results(tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert all_equal(results(tensors, backend=backend), expected)
    Lambda, input, initial = tensors
    grads = []
    for enabled in (False, True):  # a second derivative under another autocast
        h = kd.linear_recurrence(Lambda, input, initial, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(h.square().sum(), Lambda, create_graph=True)[0])
    assert all_equal(*([x] for x in grads))


@native_only
@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant):
    tensors = operands()
    call = lambda *x: kd.linear_recurrence(*x, backend="native")  # noqa: E731
    h = checkpoint(call, *tensors, use_reentrant=reentrant)
    h.backward(normal(*h.shape, seed=9))
    assert all_equal([h.detach(), *(x.grad for x in tensors)], results(operands(), backend="native"))


# ---- the same bits


@native_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex128))
@pytest.mark.parametrize(("N", "T", "n", "own"), ((1, 300, 2000, False), (3, 200, 600, True), (70, 90, 130, False)))
def test_for_every_number_of_threads_and_every_run(N, T, n, own, dtype):
    """Rows go to threads in parts, and wide ones are walked in fewer steps at a time: sums must not see either."""
    tensors = operands(dtype, N=N, T=T, n=n, own=own)
    expected = results(tensors, backend="native")
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert all_equal(results(tensors, backend="native"), expected), threads


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_time_in_two_calls_and_in_reverse(dtype):
    Lambda, input, initial = operands(dtype, grad=False, T=150, n=11)
    h = kd.linear_recurrence(Lambda, input, initial, backend="native")
    first = kd.linear_recurrence(Lambda, input[:, :71], initial, backend="native")
    second = kd.linear_recurrence(Lambda, input[:, 71:], first[:, -1], backend="native")
    assert torch.equal(torch.cat([first, second], 1), h)
    tensors, arriving = operands(dtype, T=150, n=11), normal(*h.shape, dtype=dtype)
    flipped = [x.detach().flip(1).requires_grad_() if x.dim() == 3 else x for x in tensors]
    expected = results(tensors, arriving, backend="native")
    found = results(flipped, arriving.flip(1), reverse=True, backend="native")
    assert all_equal([x.flip(1) if x.dim() == 3 else x for x in found], expected)


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_sequences_and_states(dtype, isa):
    tensors, arriving = operands(dtype, N=5, T=70, n=37, own=True), normal(5, 70, 37, dtype=dtype)
    expected = results(tensors, arriving, backend="native")
    draw = torch.Generator().manual_seed(2)
    rows, states = torch.randperm(5, generator=draw), torch.randperm(37, generator=draw)

    def moved(x):
        return x.detach()[rows][..., states]

    found = results([moved(x).requires_grad_() for x in tensors], moved(arriving), backend="native")
    assert all_equal(found, [moved(x) for x in expected])
    part = [x.detach()[1:3, ..., 5:7].requires_grad_() for x in tensors]  # alone, too
    assert all_equal(results(part, arriving[1:3, :, 5:7], backend="native"), [x[1:3, ..., 5:7] for x in expected])


@native_only
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 140), st.integers(0, 70)),
    flags=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_size(sizes, flags, dtype, seed):
    own, initial, reverse, strided = flags
    case = {"N": sizes[0], "T": sizes[1], "n": sizes[2], "own": own, "initial": initial, "reverse": reverse}
    wrong = [d for d in compare_case(case | {"strided": strided, "dtype": dtype, "seed": seed}, "native") if not d.ok]
    assert not wrong, wrong


# ---- GPUs


@pytest.mark.gpu
def test_on_a_gpu():
    found = {str(check): check.run() for check in checks(quick=True) if check.device == "cuda"}
    assert found
    assert not [(name, d) for name, report in found.items() for d in report if not d.ok]
