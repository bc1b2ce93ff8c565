"""`balanced_truncation`: its certificate, stability, ranks, re-diagonalisation, transport, errors."""

import pytest
import torch

import kdkernels as kd
from kdkernels.ops.hankel import reference, truncation, well_conditioned
from kdkernels.ops.hankel.systems import System
from kdkernels.testing.hankel.inputs import FAMILIES, SSM, frequency_response, make_systems


def circle(*poles, dense=200):
    """A dense grid of |z| = 1, with points packed around the angle of every pole."""
    grid = [torch.linspace(-torch.pi, torch.pi, dense, dtype=torch.float64)]
    for pole in torch.cat([p.reshape(-1) for p in poles]).to(torch.complex128):
        near = (1 - pole.abs()).clamp(1e-8) * torch.tensor([-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10], dtype=torch.float64)
        grid.append(pole.angle() + near)
    angle = torch.cat(grid)
    return torch.polar(torch.ones_like(angle), angle)


def measured_error(system, reduced):
    """The largest ‖G(z) − G_r(z)‖ on the circle."""
    z = circle(system.Lambda, reduced.Lambda)
    G = frequency_response(*system, z) - frequency_response(reduced.Lambda, reduced.B, reduced.C, z)
    return torch.linalg.matrix_norm(G, 2).max().item()


def single(family, n, m, p, seed, dtype=torch.complex128):
    return SSM(*(x[0] for x in make_systems(family, 1, n, m, p, dtype=dtype, seed=seed)))


def check(system, reduced):
    error, bound = measured_error(system, reduced), reduced.error_bound.item()
    assert error <= bound, (error, bound, reduced.rank)
    assert (reduced.Lambda.abs() < 1).all()
    return error, bound


# ---- the certificate


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_the_certificate_holds_on_random_systems(dtype):
    tight = 0
    draw = torch.Generator().manual_seed(0)
    for seed in range(200):
        n, m, p, tau = (int(torch.randint(*r, (), generator=draw)) for r in ((2, 13), (1, 4), (1, 4), (0, 3)))
        system = single("LRU", n, m, p, seed, dtype)
        reduced = kd.balanced_truncation(*system, tolerance=(1e-3, 3e-2, 0.3)[tau])
        error, bound = check(system, reduced)
        tight += reduced.reduced and error > 0.2 * bound
    assert tight > 20  # a bound that is always far away says nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_holds_on_hostile_systems(family):
    """Nine of each family, in both precisions: up to 1e-6 from the circle, and over 24 decades."""
    for seed, (n, m) in enumerate(((6, 1), (12, 1), (20, 1), (6, 2), (12, 2), (20, 3), (8, 8), (16, 4), (33, 2))):
        for dtype in (torch.complex64, torch.complex128):
            system = single(family, n, m, m, seed, dtype)
            for rank in (1, n // 3, n // 2, n - 1):
                reduced = kd.balanced_truncation(*system, rank=rank)
                assert reduced.rank >= rank
                check(system, reduced)


def test_the_bound_is_twice_the_tail_where_rounding_is_small():
    system = single("LRU", 12, 2, 2, 1)
    reduced = kd.balanced_truncation(*system, rank=5)
    sigma = kd.hankel_singular_values(*system)
    torch.testing.assert_close(reduced.singular_values, sigma)
    torch.testing.assert_close(reduced.error_bound, 2 * sigma[5:].sum(), rtol=1e-6, atol=0)


def test_the_kept_values_are_those_of_the_reduced_system():
    """In discrete time only nearly: the reduced Gramians are those of a balanced system up to the tail."""
    system = single("LRU", 10, 2, 2, 2)
    reduced = kd.balanced_truncation(*system, rank=9)
    kept = kd.hankel_singular_values(reduced.Lambda, reduced.B, reduced.C)
    assert ((kept - reduced.singular_values[:9]).abs() <= reduced.error_bound).all()


def test_a_system_that_has_a_smaller_one_in_it_gives_that_back():
    small = single("LRU", 4, 2, 2, 3)
    padded = SSM(
        torch.cat([small.Lambda, torch.tensor([0.3, 0.5, 0.1], dtype=torch.complex128)]),
        torch.nn.functional.pad(small.B, (0, 0, 0, 3)),
        torch.nn.functional.pad(small.C, (0, 3), value=1.0),
    )
    reduced = kd.balanced_truncation(*padded, tolerance=1e-10)
    assert reduced.rank == 4
    found, expected = (x[x.abs().argsort()] for x in (reduced.Lambda, small.Lambda))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    z = circle(small.Lambda)
    responses = (frequency_response(*x, z) for x in ((reduced.Lambda, reduced.B, reduced.C), small))
    torch.testing.assert_close(*responses, rtol=1e-8, atol=1e-8)


# ---- ranks


def compressm_rank(sigma, tau):
    """What CompreSSM keeps."""
    share = sigma.cumsum(-1) / sigma.sum(-1, keepdim=True)
    rank = int((share >= 1 - tau).to(torch.int64).argmax(-1)) + 1
    return rank if rank < 0.95 * len(sigma) else len(sigma)


@pytest.mark.parametrize("tau", (0.0, 1e-9, 1e-4, 0.01, 0.05, 0.2, 0.5, 0.99))
def test_tolerance_means_what_it_means_in_compressm(tau):
    for seed in range(4):
        for family in ("LRU", "real", "mamba"):
            system = single(family, 20, 2, 2, seed)
            reduced = kd.balanced_truncation(*system, tolerance=tau)
            if tau > 1e-12:
                assert reduced.rank == compressm_rank(reduced.singular_values, tau)
            if not reduced.reduced:
                assert all(map(torch.equal, (reduced.Lambda, reduced.B, reduced.C), system))
                assert reduced.error_bound == 0 and reduced.condition == 1


def test_leading_dimensions_have_one_rank_and_lists_their_own():
    systems = [single(family, 14, 2, 2, 0) for family in ("mamba", "LRU", "clustered")]
    apart = kd.balanced_truncation(*(list(x) for x in zip(*systems, strict=True)), tolerance=0.02)
    ranks = [x.rank for x in apart]
    assert len(set(ranks)) > 1
    together = kd.balanced_truncation(*(torch.stack(x) for x in zip(*systems, strict=True)), tolerance=0.02)
    assert together.rank == max(ranks) and together.B.shape == (3, max(ranks), 2)
    for k, system in enumerate(systems):
        one = truncation.BalancedTruncation(
            together.Lambda[k], together.B[k], together.C[k], together.singular_values[k], together.error_bound[k],
            together.condition[k], together.rank, together.projection[k], together.lift[k],
        )  # fmt: skip
        check(system, one)


def test_broadcast_leading_dimensions_and_empty_ones():
    Lambda, B, C = make_systems("LRU", 3, 6, 2, dtype=torch.complex128)
    reduced = kd.balanced_truncation(Lambda[0], B, C[:1], rank=3)
    assert reduced.Lambda.shape == (3, 3) and reduced.condition.shape == (3,)
    empty = kd.balanced_truncation(Lambda[:0], B[:0], C[:0], rank=3)
    assert empty.Lambda.shape == (0, 3) and empty.C.shape == (0, 2, 3)
    nothing = kd.balanced_truncation(Lambda[:, :0], B[:, :0], C[..., :0], tolerance=0.1)
    assert nothing.rank == 0 and nothing.Lambda.shape == (3, 0)


def test_a_list_of_ranks_is_one_for_each_system():
    systems = [single("LRU", n, 2, 2, n) for n in (6, 9, 12)]
    lists = [list(x) for x in zip(*systems, strict=True)]
    found = kd.balanced_truncation(*lists, rank=[2, 9, 7])
    assert [x.rank for x in found] == [2, 9, 7]
    for system, reduced in zip(systems, found, strict=True):
        check(system, reduced)
    for ranks, message in (
        ([2, 3], "rank has 2 numbers, but must have 3, as Lambda has systems"),
        ([2, 10, 3], r"rank\[1\] is 10, but must be at most n = 9, as in Lambda\[1\]"),
        ([2, 3, 0], r"rank\[2\] is 0, but must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kd.balanced_truncation(*lists, rank=ranks)


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_an_error_is_met_by_the_smallest_rank_that_meets_it(dtype):
    for family in ("LRU", "mamba", "clustered", "conjugate pairs"):
        system = single(family, 14, 2, 2, 3, dtype)
        scale = 2 * kd.hankel_singular_values(*system).double().sum().item()
        for error in (0.5 * scale, 0.05 * scale, 1e-3 * scale):
            reduced = kd.balanced_truncation(*system, error=error)
            assert check(system, reduced)[1] <= error
            if reduced.rank > 1:
                less = kd.balanced_truncation(*system, rank=reduced.rank - 1)
                assert less.rank == reduced.rank or less.error_bound > error
    assert kd.balanced_truncation(*system, error=2 * scale).rank == 1
    assert not kd.balanced_truncation(*system, error=0).reduced


def test_rounding_counts_against_an_error():
    """The tail alone would meet it at a smaller rank than the certificate does, or rounding alone exceeds it."""
    system = single("mamba", 16, 1, 1, 0, torch.complex64)
    sigma = kd.balanced_truncation(*system, rank=1).singular_values
    bounds = [kd.balanced_truncation(*system, rank=r).error_bound for r in range(1, 16)]
    rounding = min(b - 2 * sigma[r:].sum() for r, b in enumerate(bounds, 1)).item()
    hopeless = kd.balanced_truncation(*system, error=0.5 * rounding)
    assert not hopeless.reduced and hopeless.error_bound == 0
    assert int((2 * sigma.flip(0).cumsum(0).flip(0) > 0.5 * rounding).sum()) < 16


def test_errors_of_leading_dimensions_and_of_lists():
    systems = [single(family, 14, 2, 2, 0) for family in ("mamba", "LRU", "clustered")]
    apart = kd.balanced_truncation(*(list(x) for x in zip(*systems, strict=True)), error=3.0)
    ranks = [x.rank for x in apart]
    assert len(set(ranks)) > 1 and all(x.error_bound <= 3.0 for x in apart)
    together = kd.balanced_truncation(*(torch.stack(x) for x in zip(*systems, strict=True)), error=3.0)
    assert together.rank == max(ranks) and (together.error_bound <= 3.0).all()


# ---- stability and diagonalisation


def test_a_reduced_system_that_is_not_stable_is_never_returned(monkeypatch):
    """The next rank that is stable is taken, and at last the system itself."""
    system = single("LRU", 8, 2, 2, 4)
    honest, calls = torch.linalg.eig, []

    def unstable(A):
        values, vectors = honest(A)
        calls.append(A.shape[-1])
        return (values / values.abs().max() * (1 + 1e-15) if A.shape[-1] < limit else values), vectors

    monkeypatch.setattr(torch.linalg, "eig", unstable)
    for below, rank in ((6, 6), (9, 8)):
        limit = below
        calls.clear()
        reduced = kd.balanced_truncation(*system, rank=4)
        assert reduced.rank == rank and calls == list(range(4, min(rank + 1, 8)))
        check(system, reduced)
    assert torch.equal(reduced.Lambda, system.Lambda) and not reduced.reduced


def test_eigenvectors_that_do_not_span_are_refused(monkeypatch):
    system = single("LRU", 5, 2, 2, 5)
    honest = torch.linalg.eig

    def defective(A):
        values, vectors = honest(A)
        return values, vectors[..., :1].expand(vectors.shape) if A.shape[-1] < 4 else vectors

    monkeypatch.setattr(torch.linalg, "eig", defective)
    reduced = kd.balanced_truncation(*system, rank=2)
    assert reduced.rank == 4
    check(system, reduced)


def test_the_condition_is_that_of_the_eigenvectors():
    system = single("LRU", 9, 2, 2, 6)
    reduced = kd.balanced_truncation(*system, rank=5)
    T, W = truncation._balance(System(*system), "reference")[1](5)
    A = W.mH @ (system.Lambda[:, None] * T)
    X = torch.linalg.eig(A)[1]
    torch.testing.assert_close(reduced.condition, torch.linalg.cond(X))


def test_a_real_system_becomes_complex_where_its_eigenvalues_do():
    for seed in range(6):
        system = SSM(*(x[0] for x in make_systems("real", 1, 8, 2, 3, dtype=torch.float32, seed=seed)))
        for rank in (1, 4):
            reduced = kd.balanced_truncation(*system, rank=rank)
            check(system, reduced)
            assert reduced.B.dtype is (torch.complex64 if reduced.Lambda.is_complex() else torch.float32)
            if rank == 1:
                assert reduced.Lambda.dtype is torch.float32
    symmetric = SSM(system.Lambda, system.B, system.B.mT.contiguous())
    assert kd.balanced_truncation(*symmetric, rank=4).Lambda.dtype is torch.float32


# ---- many states


@pytest.mark.native
@pytest.mark.parametrize(("family", "n", "m", "served"), (("LRU", 120, 40, True), ("LRU", 120, 2, False),
    ("clustered", 110, 4, False), ("near circle", 110, 60, True), ("real", 130, 2, False)))  # fmt: skip
def test_well_conditioned_gramians_have_a_plain_factor_and_others_the_generator_s(family, n, m, served):
    system = make_systems(family, 2, n, m, m + 1, dtype=torch.complex128)
    found = well_conditioned.decompose(*system)
    assert (found is not None) == served
    if found is not None:
        for L, generator in zip(found, reference.factors(*system, None), strict=False):
            P = generator @ generator.mH
            assert ((L @ L.mH - P).abs() <= 1e-9 * P.abs().amax()).all()
        torch.testing.assert_close(found[3], reference.hankel_singular_values(*system), rtol=1e-9, atol=0)
    one = SSM(*(x[0] for x in system))
    ours, plain = (kd.balanced_truncation(*one, rank=n // 2, backend=name) for name in ("native", "reference"))
    check(one, ours)
    if served:
        torch.testing.assert_close(ours.error_bound, plain.error_bound, rtol=1e-6, atol=0)


def test_no_plain_factor_is_given_of_what_is_not_stable_or_not_finite():
    system = make_systems("LRU", 2, 20, 12, dtype=torch.complex128)
    assert well_conditioned.decompose(*system) is not None
    for name, value in (("Lambda", 1.01), ("Lambda", torch.nan), ("B", torch.inf), ("C", torch.nan), ("B", 0)):
        wrong = SSM(*(x.clone() for x in system))
        getattr(wrong, name)[1, ..., 0] = value
        if (name, value) == ("B", 0):
            wrong.B[1, 3] = 0
        assert well_conditioned.decompose(*wrong) is None


def test_the_estimate_of_the_inverse_s_norm():
    L = torch.linalg.cholesky(torch.diag(torch.logspace(-3, 0, 40, dtype=torch.float64)).to(torch.complex128))
    assert 0.5e3 < well_conditioned.inverse_norm(L[None]).item() < 1.01e3


def test_the_same_bits_for_every_number_of_threads():
    systems = [single("LRU", n, 30, 30, n) for n in (110, 40, 120)]
    lists = [list(x) for x in zip(*systems, strict=True)]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kd.balanced_truncation(*lists, rank=12))
        assert torch.get_num_threads() == count
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(map(torch.equal, (a.Lambda, a.B, a.C, a.lift), (b.Lambda, b.B, b.C, b.lift)))


# ---- transport


def test_transport():
    system = single("LRU", 10, 3, 2, 7)
    reduced = kd.balanced_truncation(*system, rank=6)
    torch.testing.assert_close(reduced.transport(system.B), reduced.B)
    torch.testing.assert_close(reduced.transport_dual(system.C), reduced.C)
    A = reduced.transport(system.Lambda[:, None] * reduced.lift)
    torch.testing.assert_close(A, reduced.Lambda.diag(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reduced.transport(reduced.lift), torch.eye(6, dtype=torch.complex128))


def test_gradients_move_as_the_docstring_says():
    """For losses of B that only see what is kept, B = lift B_r, the gradient moves by the adjoint of the lift."""
    system = single("LRU", 8, 2, 2, 8)
    reduced = kd.balanced_truncation(*system, rank=5)
    target = torch.randn(8, 2, dtype=torch.complex128)
    B_r = reduced.B.clone().requires_grad_()
    B = reduced.lift @ B_r
    B.retain_grad()
    (B - target).abs().square().sum().backward()
    torch.testing.assert_close(reduced.transport_dual(B.grad.mH).mH, B_r.grad)
    C_r = reduced.C.clone().requires_grad_()
    C = C_r @ reduced.projection
    C.retain_grad()
    (C - target.mT).abs().square().sum().backward()
    torch.testing.assert_close(reduced.transport(C.grad.mH).mH, C_r.grad)


def test_no_gradient_is_kept():
    system = single("LRU", 6, 2, 2, 9).leaves()
    assert not kd.balanced_truncation(*system, rank=3).B.requires_grad


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({}, ValueError, "rank, tolerance and error: exactly one of them must be given"),
        ({"rank": 2, "tolerance": 0.1}, ValueError, "rank, tolerance and error: exactly one"),
        ({"tolerance": 0.1, "error": 0.1}, ValueError, "rank, tolerance and error: exactly one"),
        ({"rank": [2]}, TypeError, "rank is list, but must be a whole number, as Lambda is no list"),
        ({"error": -1}, ValueError, "error is -1, but must be at least 0"),
        ({"error": None, "tolerance": True}, TypeError, "tolerance is bool, but must be a number"),
        ({"error": "0"}, TypeError, "error is str, but must be a number"),
        ({"rank": 4}, ValueError, "rank is 4, but must be at most n = 3, as in Lambda"),
        ({"rank": 0}, ValueError, "rank is 0, but must be a whole number of at least 1"),
        ({"rank": 1.5}, ValueError, "rank is 1.5"),
        ({"tolerance": -0.1}, ValueError, "tolerance is -0.1, but must be at least 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance is nan"),
        ({"tolerance": "1"}, TypeError, "tolerance is str, but must be a number"),
    ),
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        kd.balanced_truncation(torch.full((3,), 0.5), torch.ones(3, 2), torch.ones(2, 3), **options)


def test_wrong_systems_are_named():
    good = (torch.tensor([0.5, 0.2, 0.1]), torch.ones(3, 2), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Lambda has \|λ\| = 1.5"):
        kd.balanced_truncation(3 * good[0], *good[1:], rank=1)
    with pytest.raises(ValueError, match="B is not finite"):
        kd.balanced_truncation(good[0], good[1] / 0, good[2], rank=1)
    lists = tuple([x, x] for x in good)
    with pytest.raises(ValueError, match=r"Lambda\[1\] has \|λ\| = 1.5"):
        kd.balanced_truncation([good[0], 3 * good[0]], *lists[1:], rank=1)
    with pytest.raises(ValueError, match=r"C\[1\] is not finite"):
        kd.balanced_truncation(*lists[:2], [good[2], good[2] * torch.nan], rank=1)
    with pytest.raises(ValueError, match=r"rank is 3, but must be at most n = 2, as in Lambda\[1\]"):
        kd.balanced_truncation([good[0], good[0][:2]], [good[1], good[1][:2]], [good[2], good[2][:, :2]], rank=3)
