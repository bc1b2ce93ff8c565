"""ProjectionAlignment against a plain PyTorch loop, in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.nn import FrozenProjection, ProjectionAlignment, resample_frames

PAIRS = ((0, 1), (1, 3), (-1, -1))
STUDENT_WIDTHS, TEACHER_WIDTHS, D = (5, 6, 7), (4, 8, 9, 10, 11), 12
FROZEN = ("orthogonal", "johnson_lindenstrauss")

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


def states(widths, *leading, seed=0, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(*leading, d, generator=generator, dtype=torch.float64).to(dtype) for d in widths]
    return [x.requires_grad_(requires_grad) for x in drawn]


def aligned(student_widths=STUDENT_WIDTHS, teacher_widths=TEACHER_WIDTHS, pairs=PAIRS, width=D, **options):
    torch.manual_seed(7)
    return ProjectionAlignment(pairs, student_widths, teacher_widths, width, **{"dtype": torch.float64, **options})


def plain_pair_losses(module, student_states, teacher_states, mask=None):
    """What a user would write: one pair after the other, masked points taken out by indexing."""
    losses = []
    for k, (i, j) in enumerate(module.pairs):
        s, t = student_states[i], teacher_states[j]
        if t.shape[-2] != s.shape[-2]:
            flat = t.reshape(-1, *t.shape[-2:]).mT
            resampled = F.interpolate(flat, size=s.shape[-2], mode="linear", align_corners=False).mT
            t = resampled.reshape(*t.shape[:-2], s.shape[-2], t.shape[-1])
        if mask is not None:
            s, t = s[mask], t[mask]
        projected = []
        for x, side in ((s, module.student_projections), (t, module.teacher_projections)):
            if len(side):
                projection = side[0] if module.shared else side[k]
                x = x @ projection.weight.T
                x = x if projection.bias is None else x + projection.bias
            projected.append(x)
        z_s, z_t = projected
        if module.metric == "mse":
            loss = ((z_s - z_t) ** 2).mean(-1)
        else:
            cos = (z_s * z_t).sum(-1) / (z_s.norm(dim=-1) * z_t.norm(dim=-1))
            loss = 1 - cos if module.metric == "cosine" else torch.acos(cos)
        losses.append(loss.mean())
    return torch.stack(losses)


def gradients(loss, *groups):
    wanted = [x for group in groups for x in group]
    return torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("metric", ["cosine", "mse", "angular"])
@pytest.mark.parametrize("teacher_projection", ["learned", "orthogonal", "johnson_lindenstrauss", "none"])
@pytest.mark.parametrize("student_projection", ["learned", "none"])
def test_equals_the_plain_loop(metric, teacher_projection, student_projection):
    for shared, bias, masked, resample in itertools.product((False, True), repeat=4):
        if bias and "learned" not in (student_projection, teacher_projection):
            continue
        student_widths = {"none": (D,) * 3, "learned": (6,) * 3 if shared else STUDENT_WIDTHS}[student_projection]
        teacher_widths = (D,) * 5 if teacher_projection == "none" else (8,) * 5 if shared else TEACHER_WIDTHS
        module = aligned(
            student_widths,
            teacher_widths,
            metric=metric,
            student_projection=student_projection,
            teacher_projection=teacher_projection,
            shared=shared,
            bias=bias,
            resample=resample,
            layer_weights=(3, 0.5, 1),
        )
        student = states(student_widths, 2, 3, requires_grad=True)
        teacher = states(teacher_widths, 2, 7 if resample else 3, seed=1, requires_grad=True)
        mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
        expected = plain_pair_losses(module, student, teacher, mask)
        torch.testing.assert_close(module.pair_losses(student, teacher, mask), expected, rtol=1e-10, atol=1e-12)
        total = module(student, teacher, mask)
        expected_total = (expected * torch.tensor([3, 0.5, 1], dtype=torch.float64)).sum() / 4.5
        torch.testing.assert_close(total, expected_total, rtol=1e-10, atol=1e-12)

        used = (student, [teacher[j] for j in (1, 3, 4)], list(module.parameters()))
        for ours, plain in zip(gradients(total, *used), gradients(expected_total, *used), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-11)


def test_gradcheck():
    module = aligned(pairs=((0, 0), (1, 1)), bias=True, resample=True, layer_weights=(1, 2), backend="reference")
    student, teacher = (states((5, 6), 2, 3, requires_grad=True), states((4, 8), 2, 5, seed=1, requires_grad=True))
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def loss(s0, s1, t0, t1, *values):
        replaced = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, replaced, ([s0, s1], [t0, t1]))

    assert torch.autograd.gradcheck(loss, (*student, *teacher, *parameters))


def test_widths_by_mapping_sequence_or_one_number():
    pairs = ((3, 7), (5, 2))
    by_layer = ProjectionAlignment(pairs, {3: 4, 5: 6}, {7: 8, 2: 9}, D)
    assert by_layer.student_widths == (4, 6) and by_layer.teacher_widths == (8, 9)
    assert ProjectionAlignment(pairs, 4, range(10, 20), D).teacher_widths == (17, 12)


@pytest.mark.parametrize("width", [3, 8, 20], ids=["narrower", "equal", "wider"])
def test_orthogonal_projections_are_orthonormal(width):
    module = aligned(width=width, teacher_widths=8, teacher_projection="orthogonal")
    for projection in module.teacher_projections:
        W = projection.weight
        gram = W.mT @ W if width >= 8 else W @ W.mT
        torch.testing.assert_close(gram, torch.eye(min(width, 8), dtype=torch.float64))


def test_orthogonal_projections_are_uniform():
    module = aligned([5] * 2000, 3, pairs=[(k, 0) for k in range(2000)], width=3, teacher_projection="orthogonal")
    drawn = torch.stack([p.weight for p in module.teacher_projections])  # (2000, 3, 3)
    # Of a uniformly distributed orthogonal matrix every entry has mean 0 and variance 1/3; bare QR has neither.
    assert drawn.mean(0).abs().max() < 0.06
    torch.testing.assert_close(drawn.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.04, rtol=0)


def test_johnson_lindenstrauss_keeps_norms_in_expectation():
    module = aligned(width=4000, teacher_widths=8, teacher_projection="johnson_lindenstrauss")
    x = states((8,), 50)[0]
    ratios = (x @ module.teacher_projections[0].weight.mT).square().sum(-1) / x.square().sum(-1)
    assert (ratios - 1).abs().max() < 0.15  # standard deviation sqrt(2/4000) = 0.022


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_projections_come_from_the_seed_alone(kind):
    def weights(seed, dtype=torch.float64):
        module = ProjectionAlignment(
            PAIRS, D, TEACHER_WIDTHS, D, student_projection="none", teacher_projection=kind, seed=seed, dtype=dtype
        )
        assert not list(module.parameters()) and not module.state_dict()
        return [p.weight for p in module.teacher_projections]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator was touched"
    torch.manual_seed(2)
    assert all(map(torch.equal, first, weights(3)))
    assert not any(map(torch.equal, first, weights(4)))
    assert all(torch.equal(a.float(), b) for a, b in zip(first, weights(3, torch.float32), strict=True))


def test_reset_parameters_draws_learned_anew_and_frozen_again():
    module = aligned(teacher_projection="orthogonal")
    learned = [p.clone() for p in module.parameters()]
    frozen = [p.weight.clone() for p in module.teacher_projections]
    for projection in module.teacher_projections:
        projection.weight.zero_()
    module.reset_parameters()
    assert not any(map(torch.equal, learned, module.parameters()))
    assert all(map(torch.equal, frozen, (p.weight for p in module.teacher_projections)))


def test_built_on_meta_then_made_real():
    with torch.device("meta"):
        module = ProjectionAlignment(PAIRS, STUDENT_WIDTHS, TEACHER_WIDTHS, D, teacher_projection="orthogonal", seed=5)
    module.to_empty(device="cpu").reset_parameters()
    expected = ProjectionAlignment(PAIRS, STUDENT_WIDTHS, TEACHER_WIDTHS, D, teacher_projection="orthogonal", seed=5)
    for ours, theirs in zip(module.teacher_projections, expected.teacher_projections, strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("teacher_projection", ["learned", "orthogonal"])
def test_state_dict_round_trip(teacher_projection):
    module = aligned(teacher_projection=teacher_projection, bias=True, seed=9)
    saved = copy.deepcopy(module.state_dict())
    sides = {name.split(".")[0] for name in saved}
    learned = {"student_projections"} | ({"teacher_projections"} if teacher_projection == "learned" else set())
    assert sides == learned
    torch.manual_seed(100)
    other = ProjectionAlignment(
        PAIRS, STUDENT_WIDTHS, TEACHER_WIDTHS, D,
        teacher_projection=teacher_projection, bias=True, seed=9, dtype=torch.float64,
    )  # fmt: skip
    student, teacher = states(STUDENT_WIDTHS, 4), states(TEACHER_WIDTHS, 4, seed=1)
    assert not torch.equal(other(student, teacher), module(student, teacher))
    other.load_state_dict(saved)
    assert torch.equal(other(student, teacher), module(student, teacher))


@pytest.mark.parametrize("resample", [False, True])
def test_masked_frames_reach_nothing(resample):
    module = aligned(resample=resample)
    student = states(STUDENT_WIDTHS, 2, 5)
    teacher = states(TEACHER_WIDTHS, 2, 11 if resample else 5, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)

    def loss_and_gradients(poison):
        poisoned = [x.masked_fill(~mask[..., None], poison).requires_grad_() for x in student]
        loss = module(poisoned, teacher, mask)
        return loss, *gradients(loss, poisoned, module.parameters())

    clean, nan = loss_and_gradients(0.0), loss_and_gradients(float("nan"))
    assert all(map(torch.equal, clean, nan))
    assert all((g[~mask] == 0).all() for g in nan[1:4])
    assert not torch.equal(clean[0], module(student, teacher))


def test_a_teacher_frame_only_masked_frames_need_may_be_nan():
    module = aligned(resample=True)
    student, teacher = states(STUDENT_WIDTHS, 2, 4), states(TEACHER_WIDTHS, 2, 8, seed=1)
    for x in teacher:
        x[:, 6:] = float("nan")  # frames 6 and 7 serve the student's frame 3 alone
    mask = torch.tensor([True, True, True, False]).expand(2, 4)
    assert module(student, teacher, mask).isfinite()
    assert module(student, teacher).isnan()


def test_nothing_counts():
    module = aligned()
    student, teacher = states(STUDENT_WIDTHS, 3, requires_grad=True), states(TEACHER_WIDTHS, 3, seed=1)
    loss = module(student, teacher, torch.zeros(3, dtype=torch.bool))
    assert loss == 0 and all((g == 0).all() for g in gradients(loss, student))
    assert module(states(STUDENT_WIDTHS, 0), states(TEACHER_WIDTHS, 0)) == 0


LENGTHS = [(1500, 499), (7, 3), (3, 7), (1, 4), (4, 1), (6, 6)]


@pytest.mark.parametrize("T, frames", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resampling_is_linear_interpolation(T, frames, dtype):
    x = states((6,), 2, 3, T, dtype=dtype, requires_grad=True)[0]
    ours = resample_frames(x, frames)
    assert ours.dtype is dtype

    exact = x.detach().double().requires_grad_()
    flat = exact.reshape(6, T, 6).mT
    expected = F.interpolate(flat, size=frames, mode="linear", align_corners=False).mT.reshape(2, 3, frames, 6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)

    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours.backward(grad.to(dtype))
    expected.backward(grad)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_resampling_at_long_lengths_is_no_less_exact_than_interpolate():
    T, frames = 1_000_003, 333_331
    ramp = torch.arange(T, dtype=torch.float64)[:, None]
    expected = ((torch.arange(frames).double() + 0.5) * T / frames - 0.5).clamp(0, T - 1)[:, None]
    torch.testing.assert_close(resample_frames(ramp, frames), expected, rtol=1e-14, atol=1e-9)


def test_whisper_frames():
    module = ProjectionAlignment(((0, 0),), 7, 9, D, resample=True)
    student, teacher = states((7,), 2, 499, dtype=torch.float32), states((9,), 2, 1500, seed=1, dtype=torch.float32)
    loss = module(student, teacher)
    torch.testing.assert_close(loss, plain_pair_losses(module, student, teacher)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"teacher_projection": "orthogonal", "metric": "mse", "bias": True}])
def test_compiles_as_one_graph(options):
    module = aligned(resample=True, dtype=torch.float32, **options)
    student = states(STUDENT_WIDTHS, 2, 3, dtype=torch.float32, requires_grad=True)
    teacher = states(TEACHER_WIDTHS, 2, 7, seed=1, dtype=torch.float32)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, ours = module(student, teacher, mask), compiled(student, teacher, mask)
    torch.testing.assert_close(ours, eager)
    used = (student, list(module.parameters()))
    for a, b in zip(gradients(ours, *used), gradients(eager, *used), strict=True):
        torch.testing.assert_close(a, b)


def test_low_precision_states_give_a_float32_loss():
    module = aligned(dtype=torch.bfloat16)
    student, teacher = (states(w, 9, dtype=torch.bfloat16) for w in (STUDENT_WIDTHS, TEACHER_WIDTHS))
    assert module(student, teacher).dtype is torch.float32


def test_options_reach_the_operator():
    student, teacher = states(STUDENT_WIDTHS, 2), states(TEACHER_WIDTHS, 2)
    with pytest.raises(ValueError, match="metric is 'euclid'"):
        aligned(metric="euclid")(student, teacher)
    with pytest.raises(ValueError, match="method is 'fast'"):
        aligned(method="fast")(student, teacher)
    with pytest.raises(ValueError, match="backend='triton' cannot serve"):
        aligned(backend="triton")(student, teacher)


def test_repr_tells_the_configuration():
    shown = repr(aligned(teacher_projection="orthogonal", resample=True, seed=4, layer_weights=(2, 1, 1)))
    for part in ("embedding_width=12", "metric='cosine'", "'orthogonal'", "resample=True", "seed=4", "0.5"):
        assert part in shown
    assert "FrozenProjection(in_features=8, out_features=12)" in shown


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": ()}, "pairs is empty"),
        ({"pairs": ((0, 1, 2),)}, r"pairs holds \(0, 1, 2\)"),
        ({"pairs": ((0, 5),)}, "teacher_widths has no entry for layer 5"),
        ({"student_widths": {0: 5}}, "student_widths has no entry for layer 1"),
        ({"student_widths": (5, 0, 7)}, "student_widths gives layer 1 a width of 0"),
        ({"width": 0}, "embedding_width is 0"),
        ({"width": "12"}, "embedding_width is '12', but must be a whole number"),
        ({"pairs": "ab"}, r"pairs holds \('a',\), but must hold"),
        ({"pairs": ((0, 1.0),)}, r"pairs holds \(0, 1.0\), but must hold"),
        ({"shared": True}, "student_widths holds 6, but must be 5: one width, for shared is True"),
        ({"student_projection": "none"}, "student_widths holds 5, but must be 12"),
        ({"teacher_projection": "none"}, "teacher_widths holds 8, but must be 12"),
        ({"student_projection": "orthogonal"}, "student_projection is 'orthogonal', but must be one of 'learned'"),
        ({"teacher_projection": "random"}, "teacher_projection is 'random'"),
        ({"layer_weights": (1, 2)}, "layer_weights has 2 entries, but must have one per pair: 3"),
        ({"layer_weights": (1, -1, 1)}, "layer_weights is .* must be non-negative"),
        ({"layer_weights": (0, 0, 0)}, "layer_weights is .* not all 0"),
        ({"layer_weights": (1, float("nan"), 1)}, "layer_weights is .* finite"),
        (
            {"student_widths": D, "student_projection": "none", "teacher_projection": "orthogonal", "bias": True},
            "bias is True",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        aligned(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student": states(STUDENT_WIDTHS[:1], 2, 3)}, "student_states has 1 layers, but pairs names layer 1"),
        (
            {"student": states((5, 6, 8), 2, 3)},
            r"student_states\[-1\] has shape \(2, 3, 8\), but must be \(\.\.\., 7\)",
        ),
        ({"teacher": states((4, 8, 9, 3, 11), 2, 3)}, r"teacher_states\[3\] has shape \(2, 3, 3\)"),
        ({"teacher": states(TEACHER_WIDTHS, 2, 9)}, r"teacher_states\[1\] .* as in student_states\[0\]; resample=True"),
        ({"teacher": states(TEACHER_WIDTHS, 4, 3)}, r"teacher_states\[1\] has shape .* with \.\.\. = \(2, 3\)"),
        ({"mask": torch.ones(3)}, r"mask has shape \(3\), but must be \(2, 3\)"),
    ],
)
def test_wrong_states_are_named(change, message):
    call = {"student": states(STUDENT_WIDTHS, 2, 3), "teacher": states(TEACHER_WIDTHS, 2, 3), "mask": None, **change}
    with pytest.raises(ValueError, match=message):
        aligned()(call["student"], call["teacher"], call["mask"])


def test_wrong_types_are_named():
    student, teacher = states(STUDENT_WIDTHS, 2), states(TEACHER_WIDTHS, 2)
    with pytest.raises(TypeError, match=r"teacher_states\[1\] is list"):
        aligned()(student, [x.tolist() for x in teacher])
    with pytest.raises(TypeError, match="mask is list"):
        aligned()(student, teacher, [True, True])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": "x"}, "seed is 'x', but must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5, but must be a whole number"),
        ({"seed": None}, "seed is None, but must be a whole number"),
        ({"pairs": 5}, "pairs is 5, but must hold"),
        ({"pairs": None}, "pairs is None, but must hold"),
        ({"pairs": (0, 1)}, r"pairs is \(0, 1\), but must hold \(student layer, teacher layer\) indices"),
        ({"student_widths": None}, "student_widths is None, but must be one width, or hold one by layer"),
        ({"teacher_widths": 8.0}, "teacher_widths is 8.0, but must be one width, or hold one by layer"),
        ({"teacher_widths": "abcde"}, "teacher_widths gives layer 1 a width of 'b', but it must be a whole number"),
        ({"student_widths": (5, 6.0, 7)}, "student_widths gives layer 1 a width of 6.0, but it must be a whole"),
        ({"student_widths": {0: 5, 1: None}}, "student_widths gives layer 1 a width of None"),
    ],
)
def test_wrong_types_of_arguments_are_named(options, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        aligned(**options)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_named(seed):
    with pytest.raises(ValueError, match=f"^seed is {seed}, but must be at least"):
        aligned(teacher_projection="orthogonal", seed=seed)
    aligned(teacher_projection="orthogonal", seed=2**64 - 1)
    aligned(teacher_projection="orthogonal", seed=-(2**63))


def test_widths_may_be_of_numpy():
    widths = np.array(STUDENT_WIDTHS)
    assert aligned(student_widths=widths).student_widths == (5, 6, 7)


def test_resampling_does_not_hide_another_batch():
    with pytest.raises(ValueError, match=r"teacher_states\[1\] has shape \(4, 9, 8\)"):
        aligned(resample=True)(states(STUDENT_WIDTHS, 2, 3), states(TEACHER_WIDTHS, 4, 9))


def test_exported():
    assert kd.nn.ProjectionAlignment is ProjectionAlignment
    assert issubclass(FrozenProjection, torch.nn.Module)


def test_a_pair_of_weight_zero_is_not_computed():
    module = aligned(layer_weights=(1, 0, 2))
    student, teacher = states(STUDENT_WIDTHS, 4), states(TEACHER_WIDTHS, 4)
    expected = (module.pair_losses(student, teacher)[[0, 2]] * torch.tensor([1, 2]) / 3).sum()
    student[1] = student[1] * torch.nan
    torch.testing.assert_close(module(student, teacher), expected)


@pytest.mark.parametrize("options", [{"metric": "cos"}, {"method": "gramm"}, {"backend": "cuda"}])
def test_options_of_the_operator_are_checked_at_once(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*, but must be one of"):
        aligned(**options)
