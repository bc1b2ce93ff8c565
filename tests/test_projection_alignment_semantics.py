"""What `projection_alignment_loss` promises beyond its numbers: what counts, what is invariant, what is never stale."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_projection_alignment import BACKENDS, DTYPES, every_metric, everywhere, loss

import kdkernels as kd
from kdkernels.ops.projection_alignment import schema
from kdkernels.ops.projection_alignment.reference import METRICS, eager_losses
from kdkernels.testing.compare import relative_error
from kdkernels.testing.projection_alignment.checks import applies
from kdkernels.testing.projection_alignment.inputs import exact, make_inputs, ours

# Examples share one call's fixtures: nothing is left behind between them.
properties = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(found, expected, tolerance=2e-6):
    for name, x in expected.tensors().items():
        assert relative_error(found.tensors()[name], x) < tolerance, name


# ---- what counts


@everywhere
@every_metric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_points_of_weight_zero_do_not_exist(backend, method, metric, dtype, reduction):
    """Masks must be honoured (peers: Liger #1478, #974), and padding may be NaN."""
    inputs = make_inputs(weights="nan", metric=metric, dtype=dtype, reduction=reduction)
    outcome = ours(inputs, backend, method)
    assert inputs.operands[0].isnan().any()
    assert all(x.isfinite().all() for x in outcome.tensors().values())
    skipped = inputs.weights == 0
    assert (outcome.grads["student"][skipped] == 0).all()
    assert (outcome.grads["teacher"][skipped] == 0).all()
    if reduction == "none":
        assert (outcome.loss[skipped] == 0).all()


@everywhere
@every_metric
def test_a_nan_that_counts_comes_out(backend, method, metric):
    inputs = make_inputs(metric=metric)
    inputs.operands[0][5, 2] = torch.nan
    outcome = ours(inputs, backend, method)
    assert outcome.loss.isnan()
    assert outcome.grads["student"][5].isnan().all()
    assert outcome.grads["student"][:5].isfinite().all()
    points = loss(inputs, reduction="none", backend=backend, method=method)
    assert points.isnan().nonzero().tolist() == [[5]]


@everywhere
@every_metric
def test_all_weights_zero(backend, method, metric):
    inputs = make_inputs(metric=metric, weights="mask")
    inputs.weights.zero_()
    outcome = ours(inputs, backend, method)
    assert all((x == 0).all() for x in outcome.tensors().values())


@everywhere
def test_a_mask_is_a_selection(backend, method):
    inputs = make_inputs()
    mask = torch.arange(37) % 3 != 1
    student, teacher, *rest = inputs.operands
    kept = loss(inputs, (student[mask], teacher[mask], *rest), backend=backend, method=method)
    for weights in (mask, mask.int(), mask.double()):
        assert relative_error(loss(inputs, weights=weights, backend=backend, method=method), kept) < 1e-6


@everywhere
def test_mean_divides_by_the_sum_of_the_weights(backend, method):
    inputs = make_inputs(weights="signed")
    mean, total, points = (loss(inputs, reduction=r, backend=backend, method=method) for r in ("mean", "sum", "none"))
    assert relative_error(total, points.sum()) < 1e-6
    assert relative_error(mean, points.sum() / inputs.weights.sum()) < 1e-6


@everywhere
def test_reduction_none_weighs_each_point_by_its_own_gradient(backend, method):
    """Liger #968: gradients for reduction="none" were those of the sum."""
    inputs = make_inputs(reduction="none", weights="signed")
    same(ours(inputs, backend, method), exact(inputs))


@everywhere
@every_metric
def test_bfloat16_is_rounded_once(backend, method, metric):
    """Liger #1432: rounding before the float32 cast gave 4-23 % gradient error. Here only the results are rounded."""
    inputs = make_inputs(N=64, metric=metric, dtype=torch.bfloat16)
    outcome, target = ours(inputs, backend, method), exact(inputs)
    assert outcome.loss.dtype is torch.float32
    assert relative_error(outcome.loss, target.loss) < 1e-5
    for name, grad in outcome.grads.items():
        assert grad.dtype is torch.bfloat16
        assert relative_error(grad, target.grads[name]) < torch.finfo(torch.bfloat16).eps, name


@everywhere
def test_mixed_dtypes(backend, method):
    inputs = make_inputs()
    student, teacher, W_s, W_t, b_s, b_t = inputs.operands
    mixed = (student.bfloat16(), teacher, W_s, W_t.bfloat16(), b_s.bfloat16(), b_t)
    widened = tuple(x.double() for x in mixed)
    assert loss(inputs, mixed, backend=backend, method=method).dtype is torch.float32
    expected = loss(inputs, widened, backend="reference")
    assert relative_error(loss(inputs, mixed, backend=backend, method=method), expected) < 1e-6
    one_wide = (student.bfloat16().double(), *mixed[1:])
    assert loss(inputs, one_wide, backend=backend, method=method).dtype is torch.float64


@everywhere
def test_opposite_points(backend, method):
    """Inputs of all-positive numbers hide a lost sign: cos = −1 is as far as it goes."""
    student, _, W, *_ = make_inputs(bias=False).operands
    for scale, cosine, angle in ((3.0, 0.0, 0.0), (-3.0, 2.0, torch.pi)):
        arguments = (student, scale * student, W, W)
        options = {"backend": backend, "method": method}
        found = kd.projection_alignment_loss(*arguments, metric="cosine", **options)
        assert abs(found.item() - cosine) < 1e-6
        found = kd.projection_alignment_loss(*arguments, metric="angular", **options)
        assert abs(found.item() - angle) < 2e-3  # acos(1 − 1e-7) is 4.5e-4


@everywhere
@every_metric
def test_gradients_are_finite_at_zero_vectors(backend, method, metric):
    inputs = make_inputs(regime="zero", metric=metric)
    assert all(x.isfinite().all() for x in ours(inputs, backend, method).tensors().values())


# ---- invariances


@everywhere
@properties
@given(seed=st.integers(0, 99), metric=st.sampled_from(METRICS), weights=st.sampled_from([None, "signed"]))
def test_the_order_of_points_does_not_matter(backend, method, seed, metric, weights):
    inputs = make_inputs(seed=seed, metric=metric, weights=weights, reduction="none")
    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
    student, teacher, *rest = inputs.operands
    point_weights = None if weights is None else inputs.weights[order]
    operands = (student[order], teacher[order], *rest)
    shuffled = loss(inputs, operands, weights=point_weights, backend=backend, method=method)
    assert relative_error(shuffled, loss(inputs, backend=backend, method=method)[order]) < 1e-6


@everywhere
@properties
@given(seed=st.integers(0, 99), power=st.integers(-12, 12), metric=st.sampled_from(["cosine", "angular"]))
def test_angles_do_not_know_lengths(backend, method, seed, power, metric):
    inputs = make_inputs(seed=seed, metric=metric, bias=False)
    student, *rest = inputs.operands
    scaled = loss(inputs, (student * 2.0**power, *rest), backend=backend, method=method)
    assert relative_error(scaled, loss(inputs, backend=backend, method=method)) < 1e-6


@everywhere
@properties
@given(seed=st.integers(0, 99), power=st.integers(-6, 6))
def test_mse_grows_with_the_square(backend, method, seed, power):
    inputs = make_inputs(seed=seed, metric="mse", bias=False)
    student, teacher, *rest = inputs.operands
    scale = 2.0**power
    scaled = loss(inputs, (student * scale, teacher * scale, *rest), backend=backend, method=method)
    assert relative_error(scaled, loss(inputs, backend=backend, method=method) * scale**2) < 1e-6


@everywhere
@properties
@given(cut=st.integers(0, 37), metric=st.sampled_from(METRICS), weights=st.sampled_from([None, "signed"]))
def test_chunks_add_up(backend, method, cut, metric, weights):
    inputs = make_inputs(metric=metric, weights=weights, reduction="sum")
    student, teacher, *rest = inputs.operands
    parts = 0
    for part in (slice(cut), slice(cut, None)):
        point_weights = None if weights is None else inputs.weights[part]
        operands = (student[part], teacher[part], *rest)
        parts += loss(inputs, operands, weights=point_weights, backend=backend, method=method)
    assert relative_error(parts, loss(inputs, backend=backend, method=method)) < 2e-6


@everywhere
@properties
@given(
    N=st.integers(0, 40), d_s=st.integers(1, 33), d_t=st.integers(1, 33), D=st.integers(1, 70),
    metric=st.sampled_from(METRICS), sides=st.sampled_from(["both", "student", "teacher"]), bias=st.booleans(),
)  # fmt: skip
def test_any_size(backend, method, N, d_s, d_t, D, metric, sides, bias):
    inputs = make_inputs(N, d_s, d_t, D, metric=metric, sides=sides, bias=bias, dtype=torch.float64)
    if not applies(backend, method, inputs):
        method = "auto"
    found = ours(inputs, backend, method).tensors()
    for name, x in exact(inputs).tensors().items():  # absolute: where D = 1, the gradient of an angle is 0
        torch.testing.assert_close(found[name], x, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.native
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("case", [{}, {"N": 2100, "d_s": 40, "d_t": 30}, {"N": 60, "d_s": 300, "d_t": 20, "D": 700}])
@every_metric
def test_the_same_bits_for_every_thread_count_and_run(method, case, metric):
    inputs = make_inputs(metric=metric, weights="signed", **case)
    outcomes = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        outcomes.append(ours(inputs, "native", method).tensors())
    for outcome in outcomes[1:]:
        assert all(torch.equal(outcome[name], x) for name, x in outcomes[0].items())


# ---- frozen projections: what is kept is never stale


EDITS = {
    "add_": lambda w, other: w.add_(other),
    "copy_": lambda w, other: w.copy_(other),
    "one element": lambda w, other: w[1, 0].add_(3.0),
    "data.mul_": lambda w, other: w.data.mul_(-1.5),
    "data.copy_": lambda w, other: w.data.copy_(other),
    "data, one element": lambda w, other: w.data[1, 1].add_(3.0),
    "numpy, one row": lambda w, other: w.numpy().__setitem__(2, 0.25),
    "set_": lambda w, other: w.set_(other),
    "data =": lambda w, other: setattr(w, "data", other),
}


@everywhere
@pytest.mark.parametrize("which", ["student_proj", "teacher_proj", "teacher"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("metric", ["cosine", "mse"])
def test_an_edit_in_place_shows(backend, method, which, edit, metric):
    inputs = make_inputs(metric=metric, bias=False, frozen=("student", *schema.NAMES[1:]))
    changed = inputs.operands[schema.NAMES.index(which)]
    before = [loss(inputs, backend=backend, method=method) for _ in range(4)]
    assert len({x.item() for x in before}) == 1  # what is kept changes no bit
    with torch.no_grad():
        EDITS[edit](changed, torch.randn(changed.shape, generator=torch.Generator().manual_seed(7)))
    after = loss(inputs, backend=backend, method=method)
    assert relative_error(after, exact(inputs).loss) < 1e-6
    assert after != before[1]


@everywhere
def test_a_loaded_state_dict_shows(backend, method):
    layer, other = torch.nn.Linear(11, 60), torch.nn.Linear(11, 60)
    layer.requires_grad_(False)
    student, teacher, _, W_t, *_ = make_inputs().operands

    def value():
        return kd.projection_alignment_loss(
            student, teacher, layer.weight, W_t, student_bias=layer.bias, backend=backend, method=method
        )

    value()
    layer.load_state_dict(other.state_dict())
    found = value()
    plain = eager_losses(student, teacher, other.weight, W_t, other.bias, metric="cosine").mean()
    assert relative_error(found, plain) < 1e-6


@everywhere
def test_a_new_tensor_in_an_old_place_shows(backend, method):
    """A freed projection's address, and its id, soon belong to another one."""
    student, teacher, _, W_t, *_ = make_inputs().operands
    for seed in range(20):
        weight = torch.randn(60, 11, generator=torch.Generator().manual_seed(seed))
        found = kd.projection_alignment_loss(student, teacher, weight, W_t, backend=backend, method=method)
        assert relative_error(found, eager_losses(student, teacher, weight, W_t, metric="cosine").mean()) < 1e-6
        del weight


@everywhere
def test_the_same_projection_in_other_roles_and_dtypes(backend, method):
    """What is kept for (W, V) is not that of (V, W), (W, W) or of float64."""
    inputs = make_inputs(bias=False, d_s=9, d_t=9)
    student, teacher, W, V, *_ = inputs.operands
    for operands in ((student, teacher, W, V), (student, teacher, V, W), (student, teacher, W, W)):
        for dtype in (torch.float32, torch.float64):
            given = (operands[0].to(dtype), *operands[1:], None, None)
            wide = tuple(None if x is None else x.double() for x in given)
            found = loss(inputs, given, backend=backend, method=method)
            assert relative_error(found, loss(inputs, wide, backend="reference")) < 1e-6


@everywhere
def test_learned_after_frozen(backend, method):
    """Thawing a projection gives it its gradient; freezing it again gives none."""
    inputs = make_inputs(bias=False)
    W = inputs.operands[2]
    for thawed in (False, True, False):
        W.requires_grad_(thawed)
        value = loss(inputs, backend=backend, method=method)
        assert value.requires_grad == thawed
        if thawed:
            (grad,) = torch.autograd.grad(value, W)
            plain = eager_losses(*inputs.operands[:4], metric="cosine").mean()
            assert relative_error(grad, torch.autograd.grad(plain, W)[0]) < 1e-5
    assert relative_error(value, exact(inputs).loss) < 1e-6


# ---- wrong input


S, T, W_S, W_T = torch.ones(4, 3), torch.ones(4, 5), torch.ones(7, 3), torch.ones(7, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((S, T, W_S.T, W_T), ValueError, r"student_proj has shape \(3, 7\), but must be \(D, d_s\)"),
        ((S, T, W_S, torch.ones(8, 5)), ValueError, r"teacher_proj has shape \(8, 5\), .* D = 7, as in student_proj"),
        ((S, T), ValueError, r"teacher has shape \(4, 5\), but must be \(\.\.\., D\) with D = 3, as in student"),
        ((S, T[:3], W_S, W_T), ValueError, r"teacher has shape \(3, 5\), .* \.\.\. = \(4\), as in student"),
        ((S.long(), T, W_S, W_T), TypeError, "student has dtype torch.int64"),
        ((S, None), TypeError, "teacher|argument"),
        ((S, T, W_S, [1.0]), TypeError, "teacher_proj is list, but must be a torch.Tensor"),
    ],
)
def test_wrong_operands_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        kd.projection_alignment_loss(*arguments, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "l2"}, ValueError, "metric is 'l2', but must be one of 'cosine', 'mse', 'angular'"),
        ({"reduction": "max"}, ValueError, "reduction is 'max', but must be one of 'mean', 'sum', 'none'"),
        ({"method": "fast"}, ValueError, "method is 'fast', but must be one of 'auto', 'direct', 'gram'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', but must be one of"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3\), .* \.\.\. = \(4\), as in student"),
        ({"weights": [1, 1, 1, 1]}, TypeError, "weights is list, but must be a torch.Tensor"),
        ({"weights": torch.ones(4).requires_grad_()}, ValueError, "weights requires grad, but no gradient flows"),
        ({"student_bias": torch.ones(6)}, ValueError, r"student_bias has shape \(6\), but must be \(D\) with D = 7"),
        ({"teacher_bias": torch.ones(7).half().int()}, TypeError, "teacher_bias has dtype torch.int32"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        kd.projection_alignment_loss(S, T, W_S, W_T, **options)


def test_a_bias_without_a_projection_is_refused():
    with pytest.raises(ValueError, match="teacher_bias was given, but teacher_proj was not"):
        kd.projection_alignment_loss(S, torch.ones(4, 7), W_S, teacher_bias=torch.ones(7))


@pytest.mark.native
def test_gram_without_projections_says_so():
    with pytest.raises(ValueError, match="method='gram' does not apply: "):
        kd.projection_alignment_loss(S, S, method="gram", backend="native")


@pytest.mark.native
def test_a_forward_mode_derivative_is_refused_not_lost():
    draw = torch.Generator().manual_seed(0)
    point, other, tangent = (torch.randn(6, 4, generator=draw) for _ in range(3))

    def value(s, backend):
        return kd.projection_alignment_loss(s, other, backend=backend)

    with pytest.raises(RuntimeError, match=r"forward-mode jvp.*use backend='reference'"):
        torch.func.jvp(lambda s: value(s, "native"), (point,), (tangent,))
    _, derivative = torch.func.jvp(lambda s: value(s, "reference"), (point,), (tangent,))
    step = 1e-3 * tangent
    assert abs(derivative - (value(point + step, "native") - value(point - step, "native")) / 2e-3) < 1e-3


@everywhere
def test_any_float64_operand_makes_the_loss_float64(backend, method):
    student, teacher, W_s, W_t, b_s, _ = make_inputs().operands
    found = kd.projection_alignment_loss(
        student, teacher, W_s, W_t, student_bias=b_s.double(), backend=backend, method=method
    )
    assert found.dtype is torch.float64


def test_shapes_alone_are_enough_on_meta():
    with torch.device("meta"):
        operands = (torch.empty(8192, 768), torch.empty(8192, 1280), torch.empty(64, 768), torch.empty(64, 1280))
    assert kd.projection_alignment_loss(*operands).shape == ()
    assert kd.explain(kd.projection_alignment_loss, *operands).costs[0].flops > 0


def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match=r"weights has dtype torch\.complex64, but must be real"):
        kd.projection_alignment_loss(torch.ones(3, 2), torch.ones(3, 2), weights=torch.ones(3, dtype=torch.complex64))


@pytest.mark.native
def test_batches_cut_from_one_tensor_do_not_pile_up():
    from kdkernels.ops.projection_alignment.frozen import CAPACITY_VALUES
    from kdkernels.ops.projection_alignment.native import derived

    student, _, W_s, W_t, *_ = make_inputs().operands
    N, d_t = student.shape[0], W_t.shape[1]
    epoch = torch.randn((CAPACITY_VALUES + 20) * N, d_t)
    for i in range(CAPACITY_VALUES + 20):
        kd.projection_alignment_loss(student, epoch[i * N : (i + 1) * N], W_s, W_t, method="gram")
    assert len(derived._entries) <= CAPACITY_VALUES
    del epoch
    assert len(derived._entries) <= 50
