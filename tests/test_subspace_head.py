"""kdkernels.nn.SubspaceHead: what it computes, what it stores, what it refuses."""

import copy
import io
import math
import pickle

import pytest
import torch
from safetensors.torch import load, save

import kdkernels as kd
from kdkernels.nn import ProjectionAlignment, SubspaceHead

D, K, CLASSES, N = 12, 4, 3, 40
KINDS = ("johnson_lindenstrauss", "pca", "learned")


def features(*leading, seed=0, dtype=torch.float64):
    """With a mean that is not 0, and directions of different length."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, D, generator=generator, dtype=torch.float64)
    return (x * torch.linspace(3, 0.1, D, dtype=torch.float64) + 1).to(dtype)


def head(projection="johnson_lindenstrauss", dtype=torch.float64, **options):
    """Ready to be used."""
    torch.manual_seed(5)
    made = SubspaceHead(D, K, CLASSES, projection=projection, dtype=dtype, **options)
    return made.fit(features(N)) if projection == "pca" else made


# What it computes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_logits_are_what_the_formula_says(kind, bias, leading):
    made, h = head(kind, bias=bias), features(*leading, seed=1)
    mean = made.map.mean if kind == "pca" else 0
    z = torch.einsum("kd,...d->...k", made.R, h - mean)
    logits = torch.einsum("vk,...k->...v", made.classifier.weight, z) + (made.classifier.bias if bias else 0)
    torch.testing.assert_close(made.project(h), z)
    torch.testing.assert_close(made(h), logits)
    torch.testing.assert_close(made.from_projected(z), logits)
    assert (made.classifier.bias is None) is not bias


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    made, h = head(kind), features(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (h, *made.parameters()))
    trained = {name for name, _ in made.named_parameters()}
    assert trained == {"classifier.weight", "classifier.bias"} | ({"map.weight"} if kind == "learned" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_has_the_projected_features_has_no_alignment_loss(kind):
    """R and offset are what `projection_alignment_loss` takes of the head."""
    made, h = head(kind), features(6, seed=1)
    z = made.project(h).detach()
    loss = kd.projection_alignment_loss(z, h, None, made.R, teacher_bias=made.offset, metric="mse")
    assert loss.item() < 1e-20
    worse = kd.projection_alignment_loss(z + 0.1, h, None, made.R, teacher_bias=made.offset, metric="mse")
    assert worse.item() == pytest.approx(0.01)


def test_a_drawn_projection_keeps_norms_in_expectation():
    made = SubspaceHead(2000, 1000, 2, dtype=torch.float64)
    h = torch.randn(20, 2000, dtype=torch.float64)
    ratios = made.project(h).square().sum(-1) / h.square().sum(-1)
    assert (ratios - 1).abs().max() < 0.3  # standard deviation √(2/1000) = 0.045
    assert made.R.std().item() == pytest.approx(1000**-0.5, rel=0.01)


def test_the_drawn_projection_is_that_of_an_alignment_with_the_same_seed():
    options = {"student_projection": "none", "teacher_projection": "johnson_lindenstrauss", "seed": 9}
    alignment = ProjectionAlignment(((0, 0),), K, D, K, dtype=torch.float64, **options)
    assert torch.equal(head(seed=9).R, alignment.teacher_projections[0].weight)


def test_principal_directions_are_those_of_the_data():
    """By an SVD of the centred points: what eigh of the covariance must agree with."""
    points = features(N)
    made = head("pca")
    centred = points - points.mean(0)
    Vh = torch.linalg.svd(centred, full_matrices=False).Vh[:K]
    torch.testing.assert_close(made.map.mean, points.mean(0))
    torch.testing.assert_close((made.R * Vh).sum(1).abs(), torch.ones(K, dtype=torch.float64))
    torch.testing.assert_close(made.R @ made.R.mT, torch.eye(K, dtype=torch.float64))
    assert (made.R.gather(1, made.R.abs().argmax(1, keepdim=True)) > 0).all()
    variances = made.project(points).var(0)
    assert (variances[:-1] > variances[1:]).all()
    torch.testing.assert_close(made.project(points).mean(0), torch.zeros(K, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(made.offset, -made.R @ points.mean(0))


def test_a_fit_in_float32_has_directions_found_in_float64():
    points = features(N, dtype=torch.float32) + 1000  # in float32 the covariance of such points is lost
    made = head("pca", dtype=torch.float32)
    R = SubspaceHead(D, K, CLASSES, projection="pca", dtype=torch.float64).fit(points.double()).R
    assert torch.equal(made.fit(points).R, R.float())
    assert made.fit(points.view(4, 10, D)) is made and torch.equal(made.R, R.float())


# What it stores


def test_a_drawn_projection_comes_from_its_seed_alone():
    torch.manual_seed(1)
    one = SubspaceHead(D, K, CLASSES, seed=3)
    torch.manual_seed(1)
    other = SubspaceHead(D, K, CLASSES, seed=4)
    assert torch.equal(one.classifier.weight, other.classifier.weight), "torch's generator was touched"
    assert not torch.equal(one.R, other.R)
    assert torch.equal(one.R, SubspaceHead(D, K, CLASSES, seed=3, dtype=torch.float64).R.float())


def test_a_drawn_projection_is_not_stored_but_its_seed_is():
    made = head(seed=7)
    state = made.state_dict()
    assert set(state) == {"map._extra_state", "classifier.weight", "classifier.bias"}
    assert state["map._extra_state"].numel() == 1 and state["map._extra_state"].item() == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("through", ["as it is", "torch.save", "safetensors"])
def test_state_dict_round_trip(kind, seed, through):
    made, h = head(kind, seed=seed), features(5, seed=1)
    state = made.state_dict()
    if through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        state = torch.load(io.BytesIO(file.getvalue()))
    elif through == "safetensors":
        state = load(save(state))
    torch.manual_seed(100)
    other = SubspaceHead(D, K, CLASSES, projection=kind, seed=1, dtype=torch.float64)
    other.load_state_dict(state)
    assert torch.equal(other(h), made(h))
    assert other.seed == made.seed == (seed if kind == "johnson_lindenstrauss" else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_compute_the_same(kind, copied):
    made, h = head(kind, seed=3), features(5, seed=1)
    other = copied(made)
    assert torch.equal(other(h), made(h)) and other.seed == made.seed
    if copied is not copy.copy:
        other.R.detach().zero_()
        assert made.R.any(), "a copy shares R"


@pytest.mark.parametrize("kind", KINDS)
def test_moved_to_another_dtype(kind):
    made, h = head(kind), features(5, seed=1)
    expected = made(h)
    assert {x.dtype for x in (made.to(torch.float32).R, made.classifier.weight, made.map(h.float()))} == {torch.float32}
    torch.testing.assert_close(made(h.float()).double(), expected, atol=1e-5, rtol=1e-5)
    if kind == "johnson_lindenstrauss":
        assert torch.equal(made.R, head(kind, dtype=torch.float32).R)


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_then_loaded(kind):
    made, h = head(kind, seed=5), features(5, seed=1)
    with torch.device("meta"):
        other = SubspaceHead(D, K, CLASSES, projection=kind, dtype=torch.float64)
    assert other.map.weight.is_meta
    other.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert torch.equal(other(h), made(h))


def test_reset_parameters():
    for kind in KINDS:
        made = head(kind)
        R, W = made.R.clone(), made.classifier.weight.clone()
        if kind == "johnson_lindenstrauss":
            made.R.zero_()
        made.reset_parameters()
        assert torch.equal(made.R, R) is (kind != "learned") and not torch.equal(made.classifier.weight, W)


# How it runs


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind):
    made, h = head(kind), features(5, seed=1)
    assert torch.equal(torch.compile(made, fullgraph=True, backend="eager")(h), made(h))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    made, h = head(kind, dtype=torch.float32), features(5, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(h)
    assert logits.dtype is torch.bfloat16
    torch.testing.assert_close(logits.float(), made(h), atol=0.2, rtol=0.05)


def test_the_classifier_serves_as_a_head():
    made, z = head(), features(5, seed=1)[:, :K]
    teacher = made.from_projected(z)
    loss = kd.linear_distillation_loss(z, kd.nn.head_of(made.classifier), [teacher], [None])
    assert loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_is(kind):
    shown = repr(head(kind, seed=4))
    assert f"12, subspace=4, classes=3, projection={kind!r}" in shown
    assert ("seed=4" in shown) is (kind == "johnson_lindenstrauss")
    assert ("fitted=True" in shown) is (kind == "pca")


# What it refuses


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"features": 0}, ValueError, "features is 0, but must be a whole number of at least 1"),
        ({"subspace": 2.5}, ValueError, "subspace is 2.5, but must be a whole number of at least 1"),
        ({"subspace": 13}, ValueError, "subspace is 13, but must be at most features, 12"),
        ({"classes": -1}, ValueError, "classes is -1, but must be a whole number of at least 1"),
        ({"projection": "jl"}, ValueError, "projection is 'jl', but must be one of 'johnson_lindenstrauss', 'pca'"),
        ({"seed": 1.5}, TypeError, "seed is 1.5, but must be a whole number"),
        ({"seed": 2**64}, ValueError, f"seed is {2**64}, but must be at least"),
    ],
)
def test_wrong_options_are_named(options, kind, message):
    arguments = {"features": D, "subspace": K, "classes": CLASSES} | options
    with pytest.raises(kind, match=f"^{message}"):
        SubspaceHead(**arguments)


@pytest.mark.parametrize(
    "method, value, kind, message",
    [
        ("forward", torch.ones(2, K), ValueError, r"features has shape \(2, 4\), but must be \(\.\.\., 12\)"),
        ("forward", torch.tensor(1.0), ValueError, r"features has shape \(\), but must be \(\.\.\., 12\)"),
        ("forward", [1.0], TypeError, "features is list, but must be a torch.Tensor"),
        ("forward", torch.ones(2, D), TypeError, "features has dtype torch.float32, but must have the head's, torch.f"),
        ("project", torch.ones(2, D).long(), TypeError, "features has dtype torch.int64, but must be a floating-point"),
        ("from_projected", torch.ones(2, D), ValueError, r"projected has shape \(2, 12\), but must be \(\.\.\., 4\)"),
        ("from_projected", torch.ones(2, K), TypeError, "projected has dtype torch.float32, but must have the head's"),
        ("fit", torch.ones(2, K), ValueError, r"features has shape \(2, 4\), but must be \(\.\.\., 12\)"),
        ("fit", torch.ones(K, D), ValueError, "features has 4 points, but must have more than subspace, 4"),
        ("fit", torch.full((9, D), math.nan), ValueError, "features holds numbers that are not finite"),
    ],
)
def test_wrong_tensors_are_named(method, value, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        getattr(head("pca"), method)(value)


@pytest.mark.parametrize("kind", ["johnson_lindenstrauss", "learned"])
def test_only_principal_directions_are_fitted(kind):
    with pytest.raises(ValueError, match=f"^projection is '{kind}', but must be 'pca' for fit"):
        head(kind).fit(features(N))


def test_directions_that_are_not_there_are_missed():
    made = SubspaceHead(D, K, CLASSES, projection="pca")
    for h in (torch.ones(2, D), torch.ones(0, D)):
        with pytest.raises(RuntimeError, match=r"call fit\(features\) first"):
            made(h)
    for name in ("R", "offset"):  # with which a student would be aligned
        with pytest.raises(RuntimeError, match=r"call fit\(features\) first"):
            getattr(made, name)
    other = SubspaceHead(D, K, CLASSES, projection="pca")
    other.load_state_dict(made.state_dict())
    with pytest.raises(RuntimeError, match=r"call fit\(features\) first"):
        other(torch.ones(2, D))
