"""What `linear_distillation_loss` promises beyond its numbers: what counts, what is invariant, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import sliced, transposed
from test_linear_distillation import BACKENDS, DTYPES, every_divergence, everywhere, loss

import kdkernels as kd
from kdkernels.ops.linear_distillation.reference import DIVERGENCES
from kdkernels.testing.compare import relative_error
from kdkernels.testing.linear_distillation.inputs import exact, head_of, make_inputs, ours, run

# Examples share one call's fixtures: nothing is left behind between them.
properties = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(found, expected, tolerance=2e-6):
    for name, x in expected.tensors().items():
        assert relative_error(found.tensors()[name], x) < tolerance, name


# ---- what counts


@everywhere
@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_points_of_weight_zero_do_not_exist(backend, divergence, dtype, reduction):
    """Masks must be honoured (peers: Liger #1478, #974), and padding may be NaN."""
    inputs = make_inputs(weights="nan", divergence=divergence, dtype=dtype, reduction=reduction, K=2)
    outcome = ours(inputs, backend)
    skipped = inputs.weights == 0
    assert inputs.trained["student"].isnan().any() and skipped.any()
    assert all(x.isfinite().all() for x in outcome.tensors().values())
    assert (outcome.grads["student"][skipped] == 0).all()
    if reduction == "none":
        assert (outcome.loss[skipped] == 0).all()
    few = {"student": inputs.trained["student"][~skipped]} | {n: x for n, x in inputs.trained.items() if n != "student"}
    value = kd.linear_distillation_loss(
        few["student"], head_of(few, inputs), [x[~skipped] for x in inputs.teachers], inputs.heads,
        weights=inputs.weights[~skipped], divergence=divergence, reduction=reduction, backend=backend,
    )  # fmt: skip
    assert relative_error(outcome.loss.sum(), value.sum()) < 1e-5


@everywhere
@every_divergence
def test_ignored_labels_do_not_count(backend, divergence):
    """For soft targets either, whatever alpha is."""
    for alpha in (0.0, 0.4, 1.0):
        inputs = make_inputs(labels=True, alpha=alpha, divergence=divergence)
        outcome = ours(inputs, backend)
        ignored = inputs.labels == -100
        assert ignored.any() and (outcome.grads["student"][ignored] == 0).all()
        points = loss(inputs, reduction="none", backend=backend)
        assert (points[ignored] == 0).all()
        assert relative_error(outcome.loss, points[~ignored].mean()) < 1e-6
        other = loss(inputs, labels=inputs.labels.masked_fill(ignored, 7), ignore_index=7, backend=backend)
        kept = inputs.labels != 7
        assert relative_error(other, points[kept & ~ignored].mean()) < 1e-6


@everywhere
@every_divergence
@pytest.mark.parametrize("how", ["labels", "weights"])
def test_nothing_counts(backend, divergence, how):
    """0, and gradients of 0, whatever the points hold."""
    inputs = make_inputs(divergence=divergence, labels=True, alpha=0.5, K=2)
    inputs.trained["student"][:] = torch.nan
    what = {"labels": torch.full_like(inputs.labels, -100)} if how == "labels" else {"weights": torch.zeros(23)}
    outcome = run(inputs, lambda x: loss(inputs, x, backend=backend, **what))
    assert outcome.loss == 0
    assert all((g == 0).all() for g in outcome.grads.values())


@everywhere
@every_divergence
def test_a_nan_that_counts_comes_out(backend, divergence):
    for which in ("student", "teacher"):
        inputs = make_inputs(divergence=divergence, plain=True)
        (inputs.trained["student"] if which == "student" else inputs.teachers[0])[5, 2] = torch.nan
        points = loss(inputs, reduction="none", backend=backend)
        assert points.isnan().nonzero().tolist() == [[5]]
        grad = ours(inputs, backend).grads["student"]
        assert grad[:5].isfinite().all()
        # torch's abs has a derivative of 0 at NaN
        assert grad[5].isnan().all() or (backend, divergence, which) == ("reference", "tvd", "teacher")


@everywhere
@pytest.mark.parametrize("size", [3e38, 1e-60])
def test_a_mean_does_not_know_how_large_weights_are(backend, size):
    inputs = make_inputs(weights="signed")
    weights = inputs.weights.double() / inputs.weights.abs().max() * size
    weights = weights.float() if size > 1 else weights
    assert relative_error(loss(inputs, weights=weights, backend=backend), loss(inputs, backend=backend)) < 1e-6


@everywhere
def test_a_teacher_of_next_to_no_weight_is_none(backend):
    """0 · −∞ is no number."""
    inputs = make_inputs(K=2, given="logits", plain=True)
    inputs.teachers[0][:, 3] = -torch.inf
    for mixture in ("arithmetic", "geometric"):
        options = {"mixture": mixture, "backend": backend}
        found = loss(inputs, teacher_weights=[1e-46, 1 - 1e-46], **options)
        assert relative_error(found, loss(inputs, teacher_weights=[0, 1], **options)) < 1e-6


@everywhere
def test_mean_divides_by_the_sum_of_the_weights(backend):
    inputs = make_inputs(weights="signed")
    total = loss(inputs, reduction="sum", backend=backend)
    assert relative_error(loss(inputs, backend=backend), total / inputs.weights.sum()) < 1e-6


@everywhere
def test_reduction_none_weighs_each_point_by_its_own_gradient(backend):
    """Peers: wrong gradients for reduction="none" (Liger #968)."""
    inputs = make_inputs(reduction="none", labels=True, alpha=0.5, weights="signed", K=2, dtype=torch.float64)
    same(ours(inputs, backend), exact(inputs), 1e-12)


# ---- what is invariant


@everywhere
@properties
@given(seed=st.integers(0, 99), power=st.integers(-3, 6), divergence=st.sampled_from(DIVERGENCES))
def test_temperature_is_a_scale_of_logits_times_its_square(backend, seed, power, divergence):
    """L(y, T) = T² L(y/T, 1), exactly where T is a power of two."""
    inputs = make_inputs(seed=seed, plain=True, divergence=divergence)
    T = 2.0**power
    head = inputs.trained["student_head"]
    tempered = loss(inputs, temperature=T, backend=backend)
    heads = [kd.Head(inputs.heads[0].weight / T)]
    scaled = kd.linear_distillation_loss(
        inputs.trained["student"], head / T, inputs.teachers, heads, divergence=divergence, backend=backend
    )
    assert relative_error(tempered, T**2 * scaled) < 1e-5
    by_scale = kd.linear_distillation_loss(
        inputs.trained["student"], kd.Head(head, scale=1 / T), inputs.teachers,
        [kd.Head(inputs.heads[0].weight, scale=1 / T)], divergence=divergence, backend=backend,
    )  # fmt: skip
    assert relative_error(by_scale, scaled) < 1e-5


@everywhere
@properties
@given(seed=st.integers(0, 99), divergence=st.sampled_from(DIVERGENCES), weights=st.sampled_from([None, "signed"]))
def test_the_order_of_points_and_of_tokens_does_not_matter(backend, seed, divergence, weights):
    inputs = make_inputs(seed=seed, divergence=divergence, plain=True, weights=weights, labels=True, alpha=0.4)
    draw = torch.Generator().manual_seed(seed)
    points, tokens = torch.randperm(23, generator=draw), torch.randperm(45, generator=draw)
    places = tokens.argsort()
    labels = torch.where(inputs.labels < 0, inputs.labels, places[inputs.labels.clamp(min=0)])[points]
    found = kd.linear_distillation_loss(
        inputs.trained["student"][points], inputs.trained["student_head"][tokens], inputs.teachers[0][points],
        inputs.heads[0].weight[tokens], labels=labels, alpha=0.4, divergence=divergence,
        weights=None if weights is None else inputs.weights[points], backend=backend,
    )  # fmt: skip
    assert relative_error(found, loss(inputs, backend=backend)) < 3e-6


@everywhere
@properties
@given(
    seed=st.integers(0, 99), K=st.integers(1, 4), divergence=st.sampled_from(DIVERGENCES),
    mixture=st.sampled_from(["arithmetic", "geometric"]),
)  # fmt: skip
def test_identical_teachers_are_one(backend, seed, K, divergence, mixture):
    inputs = make_inputs(seed=seed, divergence=divergence, temperature=2.0)
    one = ours(inputs, backend)
    shares = torch.rand(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    many = run(
        inputs,
        lambda x: kd.linear_distillation_loss(
            x["student"], head_of(x, inputs), inputs.teachers * K, inputs.heads * K, mixture=mixture,
            teacher_weights=(shares / shares.sum()).tolist(), divergence=divergence, temperature=2.0, backend=backend,
        ),
    )  # fmt: skip
    same(many, one, 2e-5)


@everywhere
@properties
@given(cut=st.integers(0, 23), divergence=st.sampled_from(DIVERGENCES))
def test_chunks_add_up(backend, cut, divergence):
    inputs = make_inputs(divergence=divergence, reduction="sum", labels=True, alpha=0.5, plain=True)
    student, head = inputs.trained.values()
    parts = sum(
        kd.linear_distillation_loss(
            student[part], head, inputs.teachers[0][part], inputs.heads[0], labels=inputs.labels[part], alpha=0.5,
            divergence=divergence, reduction="sum", backend=backend,
        )
        for part in (slice(cut), slice(cut, None))
    )  # fmt: skip
    assert relative_error(parts, loss(inputs, backend=backend)) < 3e-6


@everywhere
@properties
@given(
    N=st.integers(0, 20), d_s=st.integers(1, 20), V=st.integers(1, 70), d_t=st.integers(1, 20), K=st.integers(1, 3),
    divergence=st.sampled_from(DIVERGENCES), plain=st.booleans(),
    given_as=st.sampled_from(["states", "logits", "each"]),
)  # fmt: skip
def test_any_size(backend, N, d_s, V, d_t, K, divergence, plain, given_as):
    if divergence == "reverse_kl" and given_as == "each":
        given_as = "states"
    inputs = make_inputs(
        N, d_s, V, K, d_t, divergence=divergence, plain=plain, given=given_as, dtype=torch.float64, temperature=2.0
    )
    found = ours(inputs, backend).tensors()
    for name, x in exact(inputs).tensors().items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-11, msg=name)


# ---- layout


@everywhere
@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given_as", ["states", "logits"])
def test_strides_do_not_matter(backend, layout, dtype, given_as):
    inputs = make_inputs(dtype=dtype, weights="signed", K=2, given=given_as, temperature=2.0)

    def strided(x):
        if not isinstance(x, torch.Tensor):
            return x
        return layout(x[:, None])[:, 0] if x.dim() == 1 else layout(x)

    trained = {name: strided(x).requires_grad_() for name, x in inputs.trained.items()}
    heads = [None if head is None else kd.Head(*map(strided, head)) for head in inputs.heads]
    value = kd.linear_distillation_loss(
        trained["student"], head_of(trained, inputs), [strided(x) for x in inputs.teachers], heads,
        weights=strided(inputs.weights), temperature=2.0, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(value, list(trained.values()))
    expected = [x.requires_grad_() for x in inputs.trained.values()]
    plain = loss(inputs, backend=backend)
    assert relative_error(value, plain) < 1e-6
    for g, e in zip(grads, torch.autograd.grad(plain, expected), strict=True):
        assert relative_error(g, e) < (1e-6 if dtype is not torch.bfloat16 else 8e-3)


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leading", [(), (1,), (24,), (2, 3, 4), (0,), (4, 0)])
def test_leading_dimensions(backend, reduction, leading):
    N = torch.Size(leading).numel()
    inputs = make_inputs(N, labels=True, alpha=0.5, reduction=reduction, K=3, given="each")

    def shaped(x):
        if isinstance(x, kd.TopKTeacher):
            return kd.TopKTeacher(shaped(x.log_probs), shaped(x.indices), x.vocabulary, x.tail, shaped(x.rest))
        return x.reshape((*leading, *x.shape[1:]))

    trained = inputs.trained | {"student": shaped(inputs.trained["student"])}
    leaves = {name: x.requires_grad_() for name, x in trained.items()}
    value = kd.linear_distillation_loss(
        leaves["student"], head_of(leaves, inputs), [shaped(x) for x in inputs.teachers], inputs.heads,
        labels=shaped(inputs.labels), alpha=0.5, reduction=reduction, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(value.sum(), list(leaves.values()))
    assert value.shape == (leading if reduction == "none" else ())
    assert [g.shape for g in grads] == [x.shape for x in leaves.values()]
    assert torch.equal(value.reshape(-1), loss(inputs, backend=backend).reshape(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_teacher_for_all_points(backend):
    """A stride of 0."""
    inputs = make_inputs(plain=True)
    student, head = inputs.trained.values()
    one = inputs.teachers[0][:1].expand(23, -1)
    found = kd.linear_distillation_loss(student, head, one, inputs.heads[0], backend=backend)
    dense = kd.linear_distillation_loss(student, head, one.contiguous(), inputs.heads[0], backend="reference")
    assert relative_error(found, dense) < 1e-6


# ---- vocabularies


@everywhere
@every_divergence
def test_a_longer_teacher_is_cut_and_renormalised(backend, divergence):
    """Never padded with zero logits, as peers do."""
    inputs = make_inputs(plain=True, vocabulary="longer", divergence=divergence, temperature=2.0)
    cut = kd.Head(inputs.heads[0].weight[:45])
    student, head = inputs.trained.values()
    options = {"divergence": divergence, "temperature": 2.0, "backend": backend}
    expected = kd.linear_distillation_loss(student, head, inputs.teachers, [cut], **options)
    assert relative_error(loss(inputs, backend=backend), expected) < 1e-6


@everywhere
@every_divergence
def test_a_longer_student_is_judged_by_what_is_common(backend, divergence):
    inputs = make_inputs(plain=True, vocabulary="truncated", divergence=divergence)
    outcome = ours(inputs, backend)
    student, head = inputs.trained.values()
    expected = kd.linear_distillation_loss(
        student, head[:41], inputs.teachers, inputs.heads, divergence=divergence, backend=backend
    )
    assert relative_error(outcome.loss, expected) < 1e-6
    assert (outcome.grads["student_head"][41:] == 0).all()


@everywhere
def test_labels_are_over_the_whole_vocabulary_of_the_student(backend):
    inputs = make_inputs(plain=True, vocabulary="truncated", labels=True, alpha=0.0)
    inputs.labels[0] = 44  # a token that the teacher does not have
    student, head = inputs.trained.values()
    expected = F.cross_entropy(student @ head.T, inputs.labels)
    assert relative_error(loss(inputs, backend=backend), expected) < 1e-6


@everywhere
@every_divergence
def test_a_map_is_a_reordering(backend, divergence):
    inputs = make_inputs(plain=True, divergence=divergence, vocabulary="same", temperature=2.0)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(3))
    student, head = inputs.trained.values()
    shuffled = kd.Head(inputs.heads[0].weight[order])
    for places in (order.argsort(), order.argsort().int()):
        found = kd.linear_distillation_loss(
            student, head, inputs.teachers, [shuffled], vocab_map=places, divergence=divergence, temperature=2.0,
            backend=backend,
        )  # fmt: skip
        assert relative_error(found, loss(inputs, backend=backend)) < 1e-6


@everywhere
def test_a_map_that_is_edited_is_looked_at_again(backend):
    inputs = make_inputs(plain=True)
    places = torch.arange(45)
    before = loss(inputs, vocab_map=places, backend=backend)
    assert relative_error(before, loss(inputs, backend=backend)) < 1e-6
    places[3] = 45
    with pytest.raises(ValueError, match=r"vocab_map of teachers\[0\] holds 45, but must be below 45"):
        loss(inputs, vocab_map=places, backend=backend)


# ---- heads


@everywhere
def test_an_adapter_is_its_merged_weight(backend):
    """Peers drop an adapter on the head in a path that reads `.weight`."""
    inputs = make_inputs(dtype=torch.float64)
    merged = dict(inputs.trained)
    A, B = merged.pop("lora_A"), merged.pop("lora_B")
    merged["student_head"] = merged["student_head"] + inputs.scaling * B @ A
    assert relative_error(loss(inputs, backend=backend), loss(inputs, merged, backend="reference")) < 1e-12


@everywhere
def test_dropout_of_an_adapter(backend):
    inputs = make_inputs(N=200)
    head = head_of(inputs.trained, inputs)._replace(dropout_p=0.5)

    def value(seed, h):
        torch.manual_seed(seed)
        return kd.linear_distillation_loss(inputs.trained["student"], h, inputs.teachers, inputs.heads, backend=backend)

    assert torch.equal(value(0, head), value(0, head))
    assert value(0, head) != value(1, head)
    assert torch.equal(value(0, head._replace(dropout_p=0.0)), loss(inputs, backend=backend))


@everywhere
def test_a_bias_of_minus_infinity_takes_a_token_out(backend):
    inputs = make_inputs(plain=True)
    student, W = inputs.trained.values()
    out = torch.zeros(45)
    out[::4] = -torch.inf
    kept = out == 0
    grads = []
    for which in (W.clone().requires_grad_(), W[kept].clone().requires_grad_()):
        whole = len(which) == 45
        teacher = inputs.heads[0].weight
        value = kd.linear_distillation_loss(
            student, kd.Head(which, out if whole else None), inputs.teachers,
            [kd.Head(teacher, out) if whole else kd.Head(teacher[kept])], temperature=2.0, backend=backend,
        )  # fmt: skip
        grads.append((value, torch.autograd.grad(value, which)[0]))
    assert relative_error(grads[0][0], grads[1][0]) < 1e-6
    assert relative_error(grads[0][1][kept], grads[1][1]) < 1e-5
    assert (grads[0][1][~kept] == 0).all()


@everywhere
def test_a_student_that_is_logits(backend):
    inputs = make_inputs(student_logits=True, given="logits", temperature=2.0)
    y = inputs.trained["student"].clone().requires_grad_()
    expected = 4 * F.kl_div((y / 2).log_softmax(-1), (inputs.teachers[0] / 2).softmax(-1), reduction="batchmean")
    found = kd.linear_distillation_loss(y, None, inputs.teachers[0], temperature=2.0, backend=backend)
    assert relative_error(found, expected) < 1e-6
    grads = (torch.autograd.grad(x, y)[0] for x in (found, expected))
    assert relative_error(*grads) < 1e-6


# ---- wrong input


S, W, T, W_T = torch.ones(4, 3), torch.ones(7, 3), torch.ones(4, 5), torch.ones(7, 5)
TOP = kd.TopKTeacher(torch.log(torch.full((4, 2), 0.3)), torch.tensor([[0, 1]] * 4), 7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (S, W.T, T, W_T),
            ValueError,
            r"student_head has shape \(3, 7\), but must be \(V, d\) with d = 3, as in student",
        ),
        (
            (S, W, T[:3], W_T),
            ValueError,
            r"teachers\[0\] has shape \(3, 5\), but must have the leading dimensions \(4\)",
        ),
        ((S, W, T, W), ValueError, r"teacher_heads\[0\] has shape \(7, 3\), .* d = 5, as in teachers\[0\]"),
        (
            (S, W, T, W_T[:6]),
            ValueError,
            r"teachers\[0\] has a vocabulary of 6, but the student has 7: say by vocab_map",
        ),
        ((S, W, [T, T], W_T), ValueError, "teacher_heads has 1 entries, but must have one for each of 2 teachers"),
        ((S, W, [], []), ValueError, "teachers is empty"),
        ((S, W, None), TypeError, "teachers is NoneType"),
        ((S, W, [T, 3], [W_T, None]), TypeError, r"teachers\[1\] is int"),
        ((S, W, [T], [[1.0]]), TypeError, r"teacher_heads\[0\] is list"),
        ((S.long(), W, T, W_T), TypeError, "student has dtype torch.int64"),
        ((S, [1.0], T, W_T), TypeError, "student_head is list"),
        ((S, torch.ones(0, 3), T, torch.ones(0, 5)), ValueError, "student_head has no token"),
        ((S, W, TOP, W_T), ValueError, r"teacher_heads\[0\] was given, but teachers\[0\] is a TopKTeacher"),
        ((S, W, S), ValueError, r"teachers\[0\] has a vocabulary of 3, but the student has 7"),
        ((S, kd.Head(W, torch.ones(6)), T, W_T), ValueError, r"student_head.bias has shape \(6\), .* V = 7"),
        ((S, kd.Head(W, lora_A=torch.ones(2, 3)), T, W_T), ValueError, "student_head has one of lora_A and lora_B"),
        ((S, kd.Head(W, softcap=1e300), T, W_T), ValueError, "student_head.softcap is 1e.300, but must be above 0"),
        ((S, kd.Head(W, scale=1e39), T, W_T), ValueError, "student_head.scale is 1e.39, but must be above 0"),
        ((S, kd.Head(W, softcap=0.0), T, W_T), ValueError, "student_head.softcap is 0.0, but must be above 0"),
        ((S, kd.Head(W, scale=float("nan")), T, W_T), ValueError, "student_head.scale is nan"),
        ((S, W, T, kd.Head(W_T, scale="1")), TypeError, r"teacher_heads\[0\].scale is str"),
        ((S, kd.Head(W, dropout_p=1.0), T, W_T), ValueError, "student_head.dropout_p is 1.0"),
    ],
)
def test_wrong_operands_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        kd.linear_distillation_loss(*arguments, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence is 'kl', but must be one of 'forward_kl', 'reverse_kl', 'jsd'"),
        ({"mixture": "mean"}, ValueError, "mixture is 'mean', but must be one of 'arithmetic', 'geometric'"),
        ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', but must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, but must be above 0 and finite"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": torch.ones(())}, TypeError, "temperature is Tensor, but must be a number"),
        ({"beta": 1.0}, ValueError, "beta is 1.0, but must be above 0 and below 1"),
        ({"alpha": 1.5}, ValueError, "alpha is 1.5, but must be from 0 to 1"),
        ({"alpha": 0.5}, ValueError, "alpha is 0.5, so part of the loss is of labels, but labels is None"),
        ({"teacher_weights": [0.5]}, ValueError, "teacher_weights is .0.5., but must be numbers .* sum is 1, not 0.5"),
        ({"teacher_weights": [2.0, -1.0]}, ValueError, "teacher_weights has 2 entries"),
        ({"teacher_weights": 1.0}, TypeError, "teacher_weights is 1.0"),
        ({"teacher_weights": [float("nan")]}, ValueError, "teacher_weights is .nan."),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3\), .* \.\.\. = \(4\), as in student"),
        ({"weights": torch.ones(4).requires_grad_()}, ValueError, "weights requires grad, but no gradient flows"),
        ({"labels": torch.ones(4)}, TypeError, "labels has dtype torch.float32, but must be integers"),
        ({"labels": torch.ones(5).long()}, ValueError, r"labels has shape \(5\), but must be \(4\)"),
        ({"labels": torch.full((4,), 7)}, ValueError, "labels holds 7, but must be at least 0 and below 7"),
        ({"labels": torch.full((4,), -1), "alpha": 0.5}, ValueError, "labels holds -1, but must be at least 0"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5"),
        ({"vocab_map": "cut"}, ValueError, "vocab_map is 'cut', but must be tensors, 'truncate' or None"),
        ({"vocab_map": torch.ones(7)}, TypeError, r"vocab_map of teachers\[0\] has dtype torch.float32"),
        ({"vocab_map": torch.ones(6).long()}, ValueError, r"vocab_map of teachers\[0\] has shape \(6\), .* \(7\)"),
        ({"vocab_map": torch.full((7,), 9)}, ValueError, r"vocab_map of teachers\[0\] holds 9, but must be below 7"),
        ({"vocab_map": torch.full((7,), -1)}, ValueError, "vocab_map leaves no token"),
        ({"vocab_map": [None, None]}, ValueError, "vocab_map has 2 entries"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_options_are_named(backend, options, error, message):
    with pytest.raises(error, match=message):
        kd.linear_distillation_loss(S, W, T, W_T, **{"backend": backend} | options)


@pytest.mark.native
def test_a_forward_mode_derivative_is_refused_not_lost():
    tangent = torch.ones_like(S)
    with pytest.raises(RuntimeError, match=r"forward-mode jvp.*use backend='reference'"):
        torch.func.jvp(lambda s: kd.linear_distillation_loss(s, W, T, W_T, backend="native"), (S,), (tangent,))
    torch.func.jvp(lambda s: kd.linear_distillation_loss(s, W, T, W_T, backend="reference"), (S,), (tangent,))


@everywhere
def test_any_float64_operand_makes_the_loss_float64(backend):
    assert kd.linear_distillation_loss(S, W, T, W_T.double(), backend=backend).dtype is torch.float64


def test_shapes_alone_are_enough_on_meta():
    with torch.device("meta"):
        operands = (torch.empty(8192, 768), torch.empty(50000, 768), torch.empty(8192, 1280), torch.empty(50000, 1280))
    assert kd.linear_distillation_loss(*operands).shape == ()
    assert kd.explain(kd.linear_distillation_loss, *operands).costs[0].flops > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    """Each gradient has its argument's dtype."""
    inputs = make_inputs()
    trained = {name: x.bfloat16() if name in ("student", "lora_B") else x for name, x in inputs.trained.items()}
    leaves = {name: x.requires_grad_() for name, x in trained.items()}
    value = loss(inputs, leaves, backend=backend)
    grads = torch.autograd.grad(value, list(leaves.values()))
    assert value.dtype is torch.float32
    assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]
    wide = {name: x.detach().double().requires_grad_() for name, x in trained.items()}
    expected = torch.autograd.grad(loss(inputs, wide, backend="reference"), list(wide.values()))
    for g, e in zip(grads, expected, strict=True):
        assert relative_error(g, e) < (3e-6 if g.dtype is torch.float32 else 4e-3)
