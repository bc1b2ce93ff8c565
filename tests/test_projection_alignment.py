"""`projection_alignment_loss` on every backend that runs on a CPU, against float64 and against what it promises."""

import pytest
import torch
import torch.nn.functional as F
from layouts import sliced, transposed

import kdkernels as kd
from kdkernels.ops.projection_alignment import schema
from kdkernels.ops.projection_alignment.reference import METRICS
from kdkernels.testing.compare import relative_error
from kdkernels.testing.projection_alignment.checks import QUICK, applies, compare_case, judge
from kdkernels.testing.projection_alignment.inputs import REGIMES, SIDES, exact, make_inputs, ours, run

NATIVE = pytest.param("native", marks=pytest.mark.native)
BACKENDS = ("reference", NATIVE)
IMPLEMENTATIONS = (
    ("reference", "direct"),
    pytest.param("native", "direct", marks=pytest.mark.native),
    pytest.param("native", "gram", marks=pytest.mark.native),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

everywhere = pytest.mark.parametrize(("backend", "method"), IMPLEMENTATIONS)
every_metric = pytest.mark.parametrize("metric", METRICS)


def loss(inputs, operands=None, **options):
    s, t, W_s, W_t, b_s, b_t = operands or inputs.operands
    options = {"metric": inputs.metric, "weights": inputs.weights, "reduction": inputs.reduction} | options
    return kd.projection_alignment_loss(s, t, W_s, W_t, student_bias=b_s, teacher_bias=b_t, **options)


def within_budget(inputs, outcome):
    wrong = [d for d in judge(inputs, outcome) if not d.ok]
    assert not wrong, wrong


def needs_method(backend, method, inputs):
    if not applies(backend, method, inputs):
        pytest.skip(f"{method} does not apply to this case")


# ---- error budgets


@everywhere
@every_metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", QUICK)
def test_quick_cases_stay_within_budget(backend, method, metric, dtype, case):
    arguments = {"metric": metric, "dtype": dtype, "device": "cpu"} | QUICK[case]
    needs_method(backend, method, make_inputs(**arguments))
    deviations = compare_case(arguments, backend, method)
    assert all(d.ok for d in deviations), deviations


@everywhere
@every_metric
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("regime", REGIMES)
def test_hostile_inputs_stay_within_budget(backend, method, metric, sides, regime):
    inputs = make_inputs(sides=sides, regime=regime, metric=metric, bias=False, N=50, seed=3)
    needs_method(backend, method, inputs)
    outcome = ours(inputs, backend, method)
    assert all(x.isfinite().all() for x in outcome.tensors().values())
    within_budget(inputs, outcome)


def test_every_hostile_regime_is_what_it_says():
    for sides in SIDES:
        for regime, wanted in (("close", 1), ("parallel", 1), ("antiparallel", -1)):
            s, t, W_s, W_t, b_s, b_t = make_inputs(sides=sides, regime=regime, dtype=torch.float64).operands
            z_s = s if W_s is None else F.linear(s, W_s, b_s)
            z_t = t if W_t is None else F.linear(t, W_t, b_t)
            assert (F.cosine_similarity(z_s, z_t) - wanted).abs().max() < 2e-6
            if regime == "close":
                assert (z_s - z_t).norm() < 2e-4 * z_s.norm()
            else:
                assert (z_s - z_t).norm() > 0.5 * z_s.norm()


def test_a_wrong_gradient_is_over_budget():
    inputs = make_inputs()
    outcome = ours(inputs, "reference")
    outcome.grads["teacher_proj"][3, 4] *= 1.01
    assert [d.name for d in judge(inputs, outcome) if not d.ok] == ["grad teacher_proj"]


def test_every_gradient_that_is_missing_or_nan_is_over_budget():
    inputs = make_inputs()
    outcome = ours(inputs, "reference")
    del outcome.grads["student"]
    outcome.grads["teacher"][0, 0] = torch.nan
    assert [d.name for d in judge(inputs, outcome) if not d.ok] == ["grad student", "grad teacher"]


@pytest.mark.native
@every_metric
@pytest.mark.parametrize("case", ["both sides", "wide"])
def test_gram_is_not_direct_in_disguise(metric, case, monkeypatch):
    """Ill-conditioned projections are served by direct; the cases that should tell about gram must not be."""
    from kdkernels.ops.projection_alignment import native

    taken = []
    honest = native._run_gram
    monkeypatch.setattr(native, "_run_gram", lambda *a: taken.append(honest(*a)) or taken[-1])
    ours(make_inputs(metric=metric, **QUICK[case]), "native", "gram")
    assert taken == [True]


# ---- autograd


@everywhere
@every_metric
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, method, metric, sides, reduction):
    inputs = make_inputs(
        4, 3, 2, 12, sides=sides, metric=metric, weights="signed", reduction=reduction, dtype=torch.float64, seed=1
    )
    needs_method(backend, method, inputs)
    leaves = [x for x in inputs.operands if x is not None]
    present = [x is not None for x in inputs.operands]

    def function(*given):
        given = iter(given)
        return loss(inputs, [next(given) if there else None for there in present], backend=backend, method=method)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves], nondet_tol=0)


@every_metric
def test_the_reference_is_differentiable_twice(metric):
    inputs = make_inputs(3, 2, 3, 4, metric=metric, dtype=torch.float64, bias=False)
    leaves = [x.requires_grad_() for x in inputs.operands[:4]]
    function = lambda *x: loss(inputs, (*x, None, None), backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.native
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_of_native_is_an_error_that_says_what_to_do(reduction):
    inputs = make_inputs(reduction=reduction)
    student = inputs.operands[0].requires_grad_()
    (grad,) = torch.autograd.grad(loss(inputs, backend="native").sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; use backend='reference'"):
        torch.autograd.grad(grad.sum(), student)


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_requested_gradients_are_computed(backend, method, reduction, monkeypatch):
    asked = []
    if backend == "native":
        implementation = schema._implementation(backend)
        honest = implementation.loss_and_gradients

        def spy(*arguments):
            asked.append([name for name, g in zip(schema.NAMES, arguments[-1], strict=True) if g is not None])
            return honest(*arguments)

        monkeypatch.setattr(implementation, "loss_and_gradients", spy)
    for wanted in ("student", "teacher_proj", "student_bias"):
        frozen = [name for name in schema.NAMES if name != wanted]
        outcome = ours(make_inputs(frozen=frozen, reduction=reduction), backend, method)
        assert list(outcome.grads) == [wanted]
        assert not asked or asked.pop() == [wanted]


@pytest.mark.native
def test_no_gradients_without_grad_mode(monkeypatch):
    asked = []
    implementation = schema._implementation("native")
    honest = implementation.loss_and_gradients
    monkeypatch.setattr(implementation, "loss_and_gradients", lambda *a: asked.append(a[-1]) or honest(*a))
    inputs = make_inputs()
    inputs.operands[0].requires_grad_()
    with torch.no_grad():
        assert not loss(inputs, backend="native").requires_grad
    assert asked[0] == [None] * 6


@everywhere
def test_gradients_accumulate_over_repeated_use(backend, method):
    """One projection in two losses: the gradients add up."""
    inputs = make_inputs(frozen=("teacher",))
    student, teacher, W_s, W_t, b_s, b_t = inputs.operands
    W_s.requires_grad_()

    def of(points):
        return loss(inputs, (points, teacher, W_s, W_t, b_s, b_t), backend=backend, method=method)

    (grad,) = torch.autograd.grad(of(student) + of(-student), W_s)
    parts = [torch.autograd.grad(of(points), W_s)[0] for points in (student, -student)]
    assert relative_error(grad, parts[0] + parts[1]) < 1e-7


# ---- torch.library, torch.compile, autocast


@pytest.mark.native
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("weights", [None, "signed"])
def test_opcheck(sides, weights):
    inputs = make_inputs(5, 4, 3, 12, sides=sides, weights=weights)
    operands = [None if x is None else x.requires_grad_() for x in inputs.operands]
    points = (*operands, inputs.weights, "cosine", "auto", "native")
    torch.library.opcheck(schema.projection_alignment_points.seen, points)
    reduced = (*operands, inputs.weights, "cosine", "auto", list(inputs.needs), "native", 2)
    # the second and later outputs are gradients, which have none: see test_a_second_derivative_of_native_...
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(schema.projection_alignment.seen, reduced, test_utils=tests)
    frozen = [None if x is None else x.detach() for x in operands]
    torch.library.opcheck(schema.projection_alignment.seen, (*frozen, *reduced[6:]))


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_as_one_graph_with_dynamic_shapes(backend, method, reduction):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, weights in ((37, None), (12, None), (37, "signed")):
        inputs = make_inputs(N, reduction=reduction, weights=weights)
        outcome = run(inputs, lambda x, i=inputs: compiled(i, x, backend=backend, method=method))
        eager = ours(inputs, backend, method)
        for name, x in eager.tensors().items():
            assert relative_error(outcome.tensors()[name], x) < 1e-6, name


@pytest.mark.native
def test_compiled_by_inductor():
    torch.compiler.reset()
    inputs = make_inputs()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    outcome = run(inputs, lambda x: compiled(inputs, x, backend="native"))
    within_budget(inputs, outcome)


@everywhere
@pytest.mark.parametrize("sides", ["both", "student", "neither"])
def test_autocast_casts_as_linear_does(backend, method, sides):
    inputs = make_inputs(sides=sides)
    needs_method(backend, method, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = ours(inputs, backend, method)
    projected = (inputs.operands[2] is not None, inputs.operands[3] is not None) * 3
    rounded = [x if x is None or not p else x.bfloat16() for x, p in zip(inputs.operands, projected, strict=True)]
    assert outcome.loss.dtype is torch.float32
    assert all(g.dtype is torch.float32 for g in outcome.grads.values())
    assert relative_error(outcome.loss, loss(inputs, rounded, backend="reference")) < 1e-6


@pytest.mark.native
def test_no_autocast_of_float64():
    inputs = make_inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(loss(inputs, backend="native"), exact(inputs).loss) < 1e-14


# ---- layout


@everywhere
@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_metric
def test_strides_do_not_matter(backend, method, layout, dtype, metric):
    inputs = make_inputs(dtype=dtype, weights="signed", metric=metric)
    strided = [None if x is None else layout(x[:, None])[:, 0] if x.dim() == 1 else layout(x) for x in inputs.operands]
    weights = layout(inputs.weights[:, None])[:, 0]
    leaves = [x.requires_grad_() for x in strided]
    value = loss(inputs, leaves, weights=weights, backend=backend, method=method)
    grads = torch.autograd.grad(value, leaves)
    expected = [x.requires_grad_() for x in inputs.operands]
    exact_value = loss(inputs, expected, backend=backend, method=method)
    exact_grads = torch.autograd.grad(exact_value, expected)
    assert relative_error(value, exact_value) < 1e-6
    for name, g, e in zip(schema.NAMES, grads, exact_grads, strict=True):
        assert relative_error(g, e) < (1e-6 if dtype is not torch.bfloat16 else 5e-3), name


@everywhere
def test_expanded_inputs(backend, method):
    """One teacher for all points, and one projection row for all of D: strides of 0."""
    inputs = make_inputs(metric="mse", bias=False)
    student, teacher, W_s, W_t, *_ = inputs.operands
    one, row = teacher[:1].clone().requires_grad_(), W_t[:1].clone().requires_grad_()
    expanded = (one.expand_as(teacher), row.expand_as(W_t))
    dense = tuple(x.contiguous() for x in expanded)
    value = loss(inputs, (student, expanded[0], W_s, expanded[1], None, None), backend=backend, method=method)
    plain = loss(inputs, (student, dense[0], W_s, dense[1], None, None), backend="reference")
    for g, e in zip(torch.autograd.grad(value, [one, row]), torch.autograd.grad(plain, [one, row]), strict=True):
        assert relative_error(g, e) < 1e-5


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leading", [(), (1,), (37,), (2, 3, 5), (0,), (4, 0)])
def test_leading_dimensions(backend, method, reduction, leading):
    N = torch.Size(leading).numel()
    inputs = make_inputs(N, reduction=reduction, weights="signed" if N > 1 else None)
    student, teacher, *rest = inputs.operands
    points = (x.reshape(*leading, x.shape[1]) for x in (student, teacher))
    operands = [x.requires_grad_() for x in (*points, *rest)]
    weights = None if inputs.weights is None else inputs.weights.reshape(leading)
    value = loss(inputs, operands, weights=weights, backend=backend, method=method)
    grads = torch.autograd.grad(value.sum(), operands)
    assert value.shape == (leading if reduction == "none" else ())
    assert [g.shape for g in grads] == [x.shape for x in operands]
    assert all(g.isfinite().all() for g in grads)
    if N == 0:
        assert value.sum() == 0
        assert all((g == 0).all() for g in grads)
    else:
        flat = loss(inputs, backend=backend, method=method)
        assert torch.equal(value.reshape(-1), flat.reshape(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(backend, dtype, tmp_path):
    """Three rows 2³¹ elements apart: a sparse file of which only their pages exist."""
    inputs = make_inputs(3, dtype=dtype)
    d_s, far = inputs.operands[0].shape[1], 2**31
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + d_s, dtype=dtype)
    student = storage.as_strided((3, d_s), (far, 1))
    student.copy_(inputs.operands[0])
    for sides in ("both", "neither"):
        near = make_inputs(3, D=d_s, sides=sides, dtype=dtype)
        operands = (student, *near.operands[1:])
        expected = loss(inputs, (inputs.operands[0], *near.operands[1:]), backend=backend)
        assert torch.equal(loss(inputs, operands, backend=backend), expected)


@everywhere
def test_a_gradient_belongs_to_whoever_gets_it(backend, method):
    """A kept graph gives the same gradient again, whatever became of the first."""
    inputs = make_inputs(frozen=("teacher",))
    student, *rest = inputs.operands
    student.requires_grad_()
    value = loss(inputs, (student, *rest), backend=backend, method=method)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(value, student, retain_graph=True)
    assert torch.equal(second, expected)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        assert relative_error(student.grad, times * expected) < 1e-6
    student.grad.zero_()
    value.backward()
    assert torch.equal(student.grad, expected)
