"""`hankel_svd` and `era`: against dense decompositions and known systems."""

import pytest
import torch

import kdkernels as kd
from kdkernels.ops.hankel import realization
from kdkernels.ops.hankel.kernel import wide
from kdkernels.testing.compare import relative_error
from kdkernels.testing.hankel import models
from kdkernels.testing.hankel.inputs import make_systems

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def markov_of(Lambda, B, C, T):
    """h_k = C Λ^(k−1) B: (T, p, m)."""
    powers = Lambda ** torch.arange(T)[:, None]
    return torch.einsum("pi,ti,im->tpm", C, powers.to(B.dtype), B)


def dense(markov):
    """The block-Hankel matrix, block by block."""
    T = len(markov)
    L = (T + 1) // 2
    return torch.cat([torch.cat([markov[i + j] for j in range(T - L + 1)], 1) for i in range(L)], 0)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def always_iterate(monkeypatch):
    """Never form the matrix."""
    monkeypatch.setattr(realization, "DENSE", 0)


# ---- hankel_svd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "p", "m"), ((9, 1, 1), (10, 2, 3), (1, 2, 2), (2, 1, 3), (31, 3, 2)))
def test_small_matrices_are_decomposed_whole(T, p, m, dtype):
    markov = noise(T, p, m, dtype=dtype)
    H = dense(markov)
    rank = min(H.shape)
    U, S, Vh = kd.hankel_svd(markov, rank)
    torch.testing.assert_close((U * S.to(U.dtype)) @ Vh, H, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(S, torch.linalg.svdvals(H), rtol=1e-4, atol=1e-4)
    assert (U.dtype, S.dtype) == (markov.dtype, markov.real.dtype)


@pytest.mark.usefixtures("always_iterate")
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
@pytest.mark.parametrize(("T", "p", "m"), ((201, 1, 2), (200, 2, 1), (151, 2, 2)))
def test_iteration_finds_the_leading_values_and_vectors(T, p, m, dtype):
    poles = (0.99 * torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).to(dtype)
    markov = markov_of(poles, noise(30, m, dtype=dtype), noise(p, 30, dtype=dtype), T) + 1e-3 * noise(
        T, p, m, dtype=dtype
    )
    H = dense(markov)
    U, S, Vh = kd.hankel_svd(markov, 6)
    torch.testing.assert_close(S, torch.linalg.svdvals(H)[:6], rtol=1e-9, atol=0)
    torch.testing.assert_close(H @ Vh.mH, U * S.to(dtype), rtol=1e-6, atol=1e-6 * S[0].item())
    torch.testing.assert_close(U.mH @ U, torch.eye(6, dtype=dtype))
    assert all(map(torch.equal, kd.hankel_svd(markov, 6), (U, S, Vh)))  # always the same start


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
@pytest.mark.parametrize("T", (1, 2, 7, 24, 25))
def test_products_are_those_of_the_matrix(T, dtype):
    markov = noise(2, T, 3, 2, dtype=dtype)
    H = realization.BlockHankel(markov)
    expected = torch.stack([dense(x) for x in markov])
    torch.testing.assert_close(H.dense(), expected)
    torch.testing.assert_close(H.norm(), expected.abs().square().sum((-2, -1)).sqrt())
    x, y = noise(2, H.shape[2], 5, dtype=dtype), noise(2, H.shape[1], 5, dtype=dtype)
    torch.testing.assert_close(H.times(x), expected @ x)
    torch.testing.assert_close(H.adjoint_times(y), expected.mH @ y)


def test_lengths_have_small_factors():
    for T in range(1, 3000, 7):
        n = realization.fast_length(T)
        assert T <= n <= max(1.34 * T, T + 1)


@pytest.mark.parametrize("iterate", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
def test_singular_values_have_a_gradient_once(iterate, dtype, request):
    if iterate:
        request.getfixturevalue("always_iterate")
    markov = markov_of(*(x[0] for x in make_systems("LRU", 1, 4, 2, 2)), T=61)
    markov = (markov if dtype.is_complex else markov.real).expand(2, 61, 2, 2).clone().requires_grad_()
    S = kd.hankel_svd(markov, 3).S
    (grad,) = torch.autograd.grad(S.pow(2).sum(), markov)
    leaf = markov.detach().requires_grad_()
    whole = torch.stack([dense(x) for x in leaf])
    expected = torch.autograd.grad(torch.linalg.svdvals(whole)[:, :3].pow(2).sum(), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())
    S = kd.hankel_svd(markov, 3).S
    (grad,) = torch.autograd.grad(S.sum(), markov, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.abs().sum().backward()
    with pytest.raises(RuntimeError, match="U and Vh have no gradient"):
        kd.hankel_svd(markov, 3).U.abs().sum().backward()
    with pytest.raises(RuntimeError, match="era has no gradient"):
        kd.era(markov, 3).A.abs().sum().backward()


# ---- era


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
@pytest.mark.parametrize(("T", "p", "m"), ((63, 1, 1), (64, 2, 3), (401, 2, 2), (1200, 1, 1)))
def test_poles_of_a_known_system_come_back(T, p, m, dtype):
    """From noiseless data to 1e-6, and with them all Markov parameters."""
    n = 6
    family = "LRU" if dtype.is_complex else "conjugate pairs"
    Lambda, B, C = (x[0] for x in make_systems(family, 1, n, m, p, seed=4))
    markov = markov_of(Lambda, B, C, T)
    markov = markov if dtype.is_complex else markov.real
    A, B_r, C_r = kd.era(markov, n)
    assert A.dtype is dtype and A.shape == (n, n) and B_r.shape == (n, m) and C_r.shape == (p, n)
    distance = (torch.linalg.eigvals(A)[:, None] - Lambda[None]).abs()
    assert distance.min(0).values.max() < 1e-6 and distance.min(1).values.max() < 1e-6
    state, scale = B_r, markov.abs().max()
    for h in markov[:50]:
        assert (C_r @ state - h).abs().max() < 1e-8 * scale
        state = A @ state


def test_batches_and_ranks_beyond_the_data():
    systems = make_systems("LRU", 4, 3, 2, 2)
    markov = torch.stack([markov_of(*(x[k] for x in systems), T=41) for k in range(4)]).reshape(2, 2, 41, 2, 2)
    A, B, C = kd.era(markov, 5)
    assert A.shape == (2, 2, 5, 5)
    one = kd.era(markov[1, 0], 5)
    for k in range(10):  # the states that the data do not have do nothing
        response = C[1, 0] @ torch.linalg.matrix_power(A[1, 0], k) @ B[1, 0]
        torch.testing.assert_close(response, markov[1, 0, k])
        torch.testing.assert_close(one.C @ torch.linalg.matrix_power(one.A, k) @ one.B, markov[1, 0, k])


@pytest.mark.parametrize("T", (41, 801))
def test_what_is_not_finite_stays_in_its_sequence(T):
    markov = torch.stack([markov_of(*(x[0] for x in make_systems("LRU", 1, 3, 1, 1)), T=T)] * 3)
    clean = kd.hankel_svd(markov, 3).S
    markov[1, 3] = torch.inf
    S = kd.hankel_svd(markov, 3).S
    assert S[1].isnan().all()
    torch.testing.assert_close(S[[0, 2]], clean[[0, 2]])
    A = kd.era(markov, 3).A
    assert A[1].isnan().all() and A[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_single_precision_data_come_back(dtype):
    """Of a large matrix too the model drops only what rounding may have made."""
    markov = models.make_markov(1025, 4, dtype, "cpu", N=1, n=32)
    found = kd.era(markov, 32)
    again = models.markov_of(*map(wide, found), 1025)
    assert relative_error(again, markov) < 1e-6


@pytest.mark.parametrize("T", (15, 801))
@pytest.mark.parametrize("scale", (1e-300, 1.0, 1e155, 1e300))
def test_data_of_any_size(scale, T):
    poles = torch.tensor([0.9, 0.5, -0.3], dtype=torch.float64)
    markov = markov_of(poles, torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64), T)
    found = torch.linalg.eigvals(kd.era(scale * markov, 3).A).real.sort(descending=True)[0]
    torch.testing.assert_close(found, poles, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", (lambda h: kd.hankel_svd(h, 2), lambda h: kd.era(h, 2)))
@pytest.mark.parametrize("T", (15, 801))
def test_a_default_device_elsewhere_does_not_matter(function, T):
    markov = noise(T, 1, 1)
    expected = function(markov)
    with torch.device("meta"):
        assert all(map(torch.equal, function(markov), expected))


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_empty_batches(dtype):
    U, S, Vh = kd.hankel_svd(torch.ones(0, 5, 2, 1, dtype=dtype), 2)
    assert (U.shape, S.shape, Vh.shape) == ((0, 6, 2), (0, 2), (0, 2, 3))
    assert kd.era(torch.ones(0, 5, 2, 1, dtype=dtype), 2).A.shape == (0, 2, 2)


@pytest.mark.parametrize("function", (kd.hankel_svd, kd.era))
@pytest.mark.parametrize(
    ("markov", "rank", "error", "message"),
    (
        (torch.ones(5, 2), 1, ValueError, r"markov has shape \(5, 2\), but must be \(\.\.\., T, p, m\)"),
        (torch.ones(5, 2, 2).bfloat16(), 1, TypeError, "markov has dtype torch.bfloat16"),
        ([1.0], 1, TypeError, "markov is list"),
        (None, 1, TypeError, "markov is NoneType, but must be a torch.Tensor"),
        (torch.ones(5, 0, 2), 1, ValueError, "T, p and m of at least 1"),
        (torch.ones(5, 1, 1), 4, ValueError, "rank is 4, but must be at most"),
        (torch.ones(5, 1, 1), 0, ValueError, "rank is 0, but must be a whole number of at least 1"),
    ),
)
def test_wrong_arguments_are_named(function, markov, rank, error, message):
    with pytest.raises(error, match=message):
        function(markov, rank)


def test_era_needs_a_block_row_to_shift():
    with pytest.raises(ValueError, match="rank is 3, but must be at most 2: p times one less than the block rows"):
        kd.era(torch.ones(5, 1, 2), 3)


@pytest.mark.parametrize(("T", "rank"), ((3, 1), (5, 1), (5, 2), (6, 2), (401, 1)))
def test_a_pure_delay_that_the_last_block_row_alone_sees(T, rank):
    markov = torch.zeros(T, 1, 1, dtype=torch.float64)
    markov[-1] = 1
    assert all(x.abs().max() <= 1 for x in kd.era(markov, rank))


def test_no_states_from_the_rounding_of_float32():
    times = torch.arange(40)
    markov = (0.9**times + 0.5**times)[:, None, None]
    poles = torch.linalg.eigvals(kd.era(markov, 6).A).abs().sort(descending=True)[0]
    torch.testing.assert_close(poles, torch.tensor([0.9, 0.5, 0, 0, 0, 0]), rtol=1e-4, atol=1e-4)
