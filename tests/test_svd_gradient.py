"""Gradients of `svd` where singular values are equal, nearly equal or 0, against central differences in float64."""

import pytest
import torch

import kdkernels as kd
from kdkernels.ops.svd import gradient

BACKENDS = ("reference", pytest.param("native", marks=pytest.mark.native))
WIDE = (torch.float64, torch.complex128)
GAPS = (0, 1e-15, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-1)  # relative; √ε of the sum of two values is 3e-8


def inner(a, b):
    return (a.conj() * b).sum((-2, -1)).real


# Of U, S, Vh and two matrices G (rows, cols) and W (rows, rows): one number for each matrix of the batch.
FUNCTIONS = {
    "sum of A": lambda U, S, Vh, G, W: ((U * S[:, None]) @ Vh).sum((-2, -1)).real,
    "A": lambda U, S, Vh, G, W: inner(G, (U * S[:, None]) @ Vh),
    "leading half of A": lambda U, S, Vh, G, W: inner(G, (U[..., :2] * S[:, None, :2]) @ Vh[:, :2]),
    "polar factor": lambda U, S, Vh, G, W: inner(G, U @ Vh),
    "leading projector": lambda U, S, Vh, G, W: inner(W, U[..., :2] @ U[..., :2].mH),
    "leading projector of V": lambda U, S, Vh, G, W: inner(G.mH @ G, Vh[:, :2].mH @ Vh[:, :2]),
    "nuclear norm": lambda U, S, Vh, G, W: S.sum(-1),
    "Frobenius norm": lambda U, S, Vh, G, W: S.square().sum(-1).sqrt(),
    "log-determinant": lambda U, S, Vh, G, W: S.log().sum(-1),
    "square": lambda U, S, Vh, G, W: inner(W, (U * S[:, None] ** 2) @ U.mH),
    "square on both sides": lambda U, S, Vh, G, W: (
        inner(W, (U * S[:, None] ** 2) @ U.mH) + inner(G.mH @ G, (Vh.mH * S[:, None] ** 2) @ Vh)
    ),
    "exp on U": lambda U, S, Vh, G, W: inner(W, (U * S[:, None].exp()) @ U.mH),
    "exp on V": lambda U, S, Vh, G, W: inner(G.mH @ G, (Vh.mH * S[:, None].exp()) @ Vh),
    "exp": lambda U, S, Vh, G, W: inner(G, (U * S[:, None].exp()) @ Vh),
    "roots": lambda U, S, Vh, G, W: inner(G, (U * S[:, None].sqrt()) @ (S.sqrt()[..., None] * Vh)),
    "distance and nuclear norm": lambda U, S, Vh, G, W: (
        ((U * S[:, None]) @ Vh - G).abs().square().sum((-2, -1)) + S.sum(-1)
    ),
    "polar factor and norm": lambda U, S, Vh, G, W: inner(G, U @ Vh) + S.square().sum(-1),
    "square and norms": lambda U, S, Vh, G, W: inner(W, (U * S[:, None] ** 2) @ U.mH) + S.pow(3).sum(-1) + S.sum(-1),
    "projector and norm": lambda U, S, Vh, G, W: inner(W, U[..., :2] @ U[..., :2].mH) + S.pow(3).sum(-1),
}
SMOOTH_AT_ZERO = ("sum of A", "A", "square")


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_values(values, rows, cols, dtype, seed=0):
    """(N, rows, cols) with the singular values (N, k)."""
    N, k = values.shape
    U, V = (torch.linalg.qr(normal(N, n, k, dtype=dtype, seed=seed + n)).Q for n in (rows, cols + 100))
    V = torch.linalg.qr(V[:, :cols]).Q
    return (U * values[:, None]) @ V.mH


def differences(loss, x, step=1e-5):
    """The gradient of each matrix's own loss, by central differences."""
    grad = torch.zeros_like(x)
    for i in range(x.shape[-2]):
        for j in range(x.shape[-1]):
            for direction in (1, 1j) if x.is_complex() else (1,):
                e = torch.zeros_like(x)
                e[:, i, j] = step * direction
                grad[:, i, j] += direction * (loss(x + e) - loss(x - e)) / (2 * step)
    return grad


def check(name, A, backend, G=None, W=None, tolerance=2e-7):
    """Each matrix's gradient to a share of its largest element; a slope from unlucky points costs digits."""
    tolerance = 5e-6 if " and " in name else tolerance
    rows, cols = A.shape[-2:]
    G = normal(rows, cols, dtype=A.dtype, seed=5) if G is None else G
    W = normal(rows, rows, dtype=A.dtype, seed=6) if W is None else W
    exact = differences(lambda x: FUNCTIONS[name](*torch.linalg.svd(x, full_matrices=False), G, W), A)
    leaf = A.clone().requires_grad_()
    loss = FUNCTIONS[name](*kd.svd(leaf, full_matrices=False, backend=backend), G, W)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    error = (grad - exact).abs().amax((-2, -1)) / exact.abs().amax((-2, -1))
    assert (error < tolerance).all(), (name, error.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("rows", "cols"), ((4, 4), (6, 4), (4, 6)))
def test_equal_and_nearly_equal_values(rows, cols, dtype, backend):
    """A batch of two pairs of values each, from equal to well apart."""
    values = torch.tensor([[2 + 2 * gap, 2, 1 + gap, 1] for gap in GAPS], dtype=torch.float64)
    A = with_values(values, rows, cols, dtype)
    for name in FUNCTIONS:
        check(name, A, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_all_values_equal_or_a_chain_of_them(dtype, backend):
    chain = 1 + 1e-8 * torch.arange(4, 0, -1, dtype=torch.float64)  # neighbours are alike, the ends are not
    A = with_values(torch.stack([torch.full_like(chain, 3), chain]), 5, 4, dtype)
    for name in FUNCTIONS:
        if "leading" not in name and "projector" not in name:
            check(name, A, backend, tolerance=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_where_the_diagonal_is_constant_or_zero(dtype, backend):
    """Vectors that are the axes, and gradients that say the same of each, or nothing."""
    A = torch.diag_embed(torch.tensor([[2.0, 2, 2], [2 + 3e-8, 2, 2], [2, 1, 1]], dtype=torch.float64)).to(dtype)
    ones, hollow = torch.ones(3, 3, dtype=dtype), normal(3, 3, dtype=dtype).fill_diagonal_(0)
    for name in ("sum of A", "A", "square", "exp on U", "exp", "nuclear norm", "roots"):
        check(name, A, backend, ones, ones)
    for name in ("A", "roots", "polar factor"):
        check(name, A, backend, hollow)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_values_of_zero_up_to_rounding(dtype, backend):
    """What rounding leaves of a zero says as much as another value."""
    values = torch.tensor([[2, 2, 1, 0], [2, 2, 0, 0], [2, 1, 1, 0]], dtype=torch.float64)
    for rows, cols in ((4, 4), (6, 4), (4, 6)):
        A = with_values(values, rows, cols, dtype)
        assert (kd.svdvals(A)[:, -1] > 0).all()
        for name in SMOOTH_AT_ZERO:
            check(name, A, backend)


def exactly(*values, dtype=torch.float64):
    """(1, n, n): permuted axes, so that each value is what it is to the last bit."""
    return torch.diag(torch.tensor(values, dtype=torch.float64)).flip(0)[None].to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_of_exactly_zero(backend):
    for A in (exactly(2, 2, 1, 0), exactly(3, 0), exactly(0)):
        assert (kd.svdvals(A, backend=backend)[:, -1] == 0).all()
        for name in SMOOTH_AT_ZERO[:2]:
            check(name, A, backend)
    check("square", exactly(2, 2, 1, 0), backend)
    check("sum of A", exactly(2, 2, 1, 0, dtype=torch.complex128), backend)  # its phase is real


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_more_values_of_exactly_zero_give_what_is_known(dtype, backend):
    """Of U diag(S) Vh the gradient G: all but the block of the zeros, of which the diagonal in the vectors' basis."""
    for A in (exactly(2, 2, 0, 0, dtype=dtype), torch.zeros(1, 3, 3, dtype=dtype), torch.zeros(1, 3, 5, dtype=dtype)):
        G, leaf = normal(*A.shape[-2:], dtype=dtype), A.clone().requires_grad_()
        U, S, Vh = kd.svd(leaf, full_matrices=False, backend=backend)
        (grad,) = torch.autograd.grad(inner(G, (U * S[:, None]) @ Vh).sum(), leaf)
        found, expected = (U.mH @ x @ Vh.mH for x in (grad, G))
        zero = S == 0
        hidden = zero[:, None] & zero[..., None]
        torch.testing.assert_close(found[~hidden], expected[~hidden])
        torch.testing.assert_close(found[hidden], torch.diag_embed(expected.diagonal(0, 1, 2).real).to(dtype)[hidden])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64, *WIDE))
def test_every_gradient_is_finite(dtype, backend):
    """Those that do not exist too: of single vectors, and of what is not smooth at 0."""
    single = {"U": lambda U, S, Vh, G, W: U.real.sum(), "U, Vh, S": lambda U, S, Vh, G, W: (S * U[:, 0].abs()).sum()}
    for rows, cols in ((4, 4), (6, 4), (4, 6), (1, 3)):
        A = torch.stack([torch.eye(rows, cols), torch.zeros(rows, cols), torch.ones(rows, cols)]).to(dtype)
        A[2] = A[2].tril() * 0 + torch.eye(rows, cols) * (torch.arange(cols) < 1)
        for name, function in (FUNCTIONS | single).items():
            leaf = A.clone().requires_grad_()
            if name in ("log-determinant", "Frobenius norm", "roots"):
                continue  # infinite, or NaN, before they come to the decomposition
            loss = function(*kd.svd(leaf, False, backend=backend), normal(rows, cols, dtype=dtype), A[0] @ A[0].mT)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
@pytest.mark.parametrize("scale", (1e-25, 1.0, 1e15))
def test_float32_whatever_the_size_of_the_gradient(scale, dtype, backend):
    values = torch.tensor([[2.0, 2, 2, 1], [2.0002, 2, 1, 1]], dtype=torch.float64)
    A = with_values(values, 5, 4, torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    G, leaf = normal(5, 4, dtype=dtype), A.requires_grad_()
    U, S, Vh = kd.svd(leaf, full_matrices=False, backend=backend)
    (grad,) = torch.autograd.grad(inner(scale * G, (U * S[:, None]) @ Vh).sum(), leaf)
    assert ((grad - scale * G).abs() < 2e-3 * scale * G.abs().max()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("large", "small"), ((1e15, 1e15), (1e15, 1e-25)))
def test_float32_whatever_the_size_of_the_gradients_of_other_values(large, small, backend):
    """Of a function that no default is right for: U S² Vh plus a norm, of two values large and of two small."""
    leaf = torch.diag(torch.tensor([2.0, 2, 1, 1]))[None].requires_grad_()
    G = torch.block_diag(large * normal(2, 2), small * normal(2, 2, seed=1)).float()
    U, S, Vh = kd.svd(leaf, full_matrices=False, backend=backend)
    weights = torch.tensor([large, large, small, small])
    (grad,) = torch.autograd.grad(inner(G, (U * S[:, None] ** 2) @ Vh).sum() + (weights * S).sum(), leaf)
    even, odd = (G + G.mT) / 2, (G - G.mT) / 2
    S = S[:, None].detach()
    expected = 2 * S * even + S * odd + torch.diag(weights)
    for block, scale in ((slice(2), large), (slice(2, 4), small)):
        torch.testing.assert_close(grad[:, block, block] / scale, expected[:, block, block] / scale, rtol=2e-3, atol=0)


def test_values_apart_keep_their_formula():
    """Right above the bound the quotient is the textbook's; right below it is not looked at."""
    U = torch.eye(2, dtype=torch.float64)[None]
    dU = normal(1, 2, 2)
    for gap, textbook in ((1e-7, True), (1e-8, False)):
        S = torch.tensor([[1 + gap, 1]], dtype=torch.float64)
        skew = dU - dU.mT
        inner = torch.where(torch.eye(2) > 0, 0, skew / (S[:, None] ** 2 - S[..., None] ** 2)) * S[:, None]
        found = gradient.backward(U, S, U, dU, None, None)
        torch.testing.assert_close(found, inner, rtol=1e-6, atol=0) if textbook else None
        assert (found.abs().max() > 1e5) == textbook


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetric_functions_of_values_alone(backend):
    A = with_values(torch.tensor([[2.0, 2, 1, 1]], dtype=torch.float64), 5, 4, torch.float64)
    leaf = A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kd.svdvals(leaf, backend=backend).pow(3).sum(), leaf)
    exact = differences(lambda x: torch.linalg.svdvals(x).pow(3).sum(-1), A)
    torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.native
@pytest.mark.parametrize("power", (1, 2, 3))
def test_second_derivatives_of_values_at_repeated_values(power):
    """Along a direction, against differences of the gradient."""
    A = with_values(torch.tensor([[2.0, 2, 1, 1]], dtype=torch.float64), 5, 4, torch.float64)
    direction, leaf = normal(*A.shape), A.clone().requires_grad_()

    def differentiate(x, **options):
        S = kd.svdvals(x, backend="native")
        return torch.autograd.grad(S.pow(power).sum() if power > 1 else S.sum(), x, **options)[0]

    (found,) = torch.autograd.grad((differentiate(leaf, create_graph=True) * direction).sum(), leaf)
    ahead, behind = (differentiate((A + h * direction).requires_grad_()) for h in (1e-5, -1e-5))
    torch.testing.assert_close(found, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_compiled_and_batched_gradients_follow_the_rule(dtype, backend):
    A = torch.stack([torch.eye(3), torch.diag(torch.tensor([3.0, 2, 1]))]).to(dtype)

    def loss(x):
        U, S, Vh = kd.svd(x, full_matrices=False, backend=backend)
        return ((U * S.unsqueeze(-2)) @ Vh).sum().real

    leaf = A.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], torch.ones_like(A))
    cotangents = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (grads,) = torch.autograd.grad(loss(leaf), leaf, cotangents, is_grads_batched=True)
    torch.testing.assert_close(grads, cotangents[:, None, None, None] * torch.ones_like(A))
