"""`svd` and `svdvals` in the place of `torch.linalg`'s: names, defaults, shapes, full matrices, drivers, errors."""

import pytest
import torch

import kdkernels as kd
from kdkernels.testing.svd.inputs import make_matrices

BACKENDS = ("reference", pytest.param("native", marks=pytest.mark.native))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SHAPES = ((4, 3), (3, 4), (3, 3), (1, 5), (0, 3), (3, 0), (0, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (0,), (2, 0), (2, 1, 2)))
@pytest.mark.parametrize("shape", SHAPES)
def test_names_defaults_and_shapes(shape, leading, backend):
    A = torch.randn(*leading, *shape, dtype=torch.complex64)
    for options in ({}, {"full_matrices": True}, {"full_matrices": False, "driver": None}):
        found, expected = kd.svd(A=A, **options, backend=backend), torch.linalg.svd(A=A, **options)
        for name in ("U", "S", "Vh"):
            a, b = getattr(found, name), getattr(expected, name)
            assert (a.shape, a.dtype, a.is_conj()) == (b.shape, b.dtype, b.is_conj()), (name, options)
    assert kd.svd(A, False, backend=backend).U.shape == torch.linalg.svd(A, False).U.shape
    found, expected = kd.svdvals(A=A, driver=None, backend=backend), torch.linalg.svdvals(A=A, driver=None)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("normal", "graded", "repeated", "low rank", "zero"))
def test_full_matrices_are_unitary_and_begin_with_the_reduced_ones(kind, dtype, backend):
    for rows, cols in ((9, 9), (14, 6), (6, 14), (3, 1), (4, 0), (0, 4)):
        A = make_matrices(5, rows, cols, kind=kind, dtype=dtype)
        U, S, Vh = kd.svd(A, backend=backend)
        k, eps = min(rows, cols), torch.finfo(dtype).eps
        for x, n in ((U, rows), (Vh.mH, cols)):
            assert x.shape == (5, n, n)
            assert ((x.mH @ x - torch.eye(n, dtype=dtype)).abs() < 50 * eps).all()
        reduced = kd.svd(A, full_matrices=False, backend=backend)
        assert all(map(torch.equal, (U[..., :k], S, Vh[:, :k]), reduced))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
@pytest.mark.parametrize("shape", ((5, 3), (3, 5)))
def test_what_is_beyond_the_reduced_matrices_has_no_gradient(shape, dtype, backend):
    A = make_matrices(2, *shape, dtype=dtype)

    def loss(U, S, Vh):
        hidden = U[..., 3:].abs().sum() + Vh[:, 3:].abs().sum()
        return (U[..., :3] @ Vh[:, :3]).sum().real + S.sum() + hidden

    grads = []
    for function in (lambda x: kd.svd(x, backend=backend), torch.linalg.svd):
        leaf = A.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(*function(leaf)), leaf)[0])
    torch.testing.assert_close(*grads)
    leaf = A.clone().requires_grad_()
    U, _, Vh = kd.svd(leaf, backend=backend)
    (grad,) = torch.autograd.grad((U[..., 3:].abs().sum() + Vh[:, 3:].abs().sum()), leaf)
    assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_matrices_have_empty_gradients(backend):
    for shape in ((0, 3), (2, 3, 0), (0, 2, 2)):
        for full_matrices in (False, True):
            leaf = torch.ones(shape, requires_grad=True)
            outputs = kd.svd(leaf, full_matrices, backend=backend)
            (grad,) = torch.autograd.grad(sum(x.sum() for x in outputs), leaf)
            assert grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_full_matrices(backend):
    A = make_matrices(3, 6, 4)
    clean = kd.svd(A, backend=backend)
    A[1, 2, 3] = torch.nan
    for a, b in zip(kd.svd(A, backend=backend), clean, strict=True):
        assert a[1].isnan().all()
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("driver", ("gesvd", "nonsense", 3))
def test_a_driver_is_torchs_and_so_are_its_errors(driver, backend):
    for name in ("svd", "svdvals"):
        with pytest.raises((RuntimeError, TypeError)) as expected:
            getattr(torch.linalg, name)(torch.ones(2, 2), driver=driver)
        with pytest.raises(expected.type) as found:
            getattr(kd, name)(torch.ones(2, 2), driver=driver, backend=backend)
        assert str(found.value) == str(expected.value)


@pytest.mark.native
def test_a_driver_and_the_native_backend_exclude_each_other():
    for function in (kd.svd, kd.svdvals):
        with pytest.raises(ValueError, match="driver is 'gesvd', which is torch's: backend must be"):
            function(torch.ones(2, 2), driver="gesvd", backend="native")


@pytest.mark.parametrize("wrong", (1, None, "gesvd"))
def test_full_matrices_is_a_bool(wrong):
    for function in (kd.svd, torch.linalg.svd):
        with pytest.raises(TypeError, match="full_matrices"):
            function(torch.ones(2, 2), wrong)
        with pytest.raises(TypeError, match="positional"):
            function(torch.ones(2, 2), True, None)


@pytest.mark.native
def test_explain_counts_what_completes_a_basis():
    A = torch.ones(3, 9, 4)
    for op in ("svd", kd.svd):
        full, reduced = (kd.explain(op, A, **options) for options in ({}, {"full_matrices": False}))
        assert all(a.flops > b.flops and a.bytes > b.bytes for a, b in zip(full.costs, reduced.costs, strict=True))
    square = torch.ones(3, 4, 4)
    assert kd.explain("svd", square) == kd.explain("svd", square, False)
    assert kd.explain("svd", A, driver="gesvd").backend == "reference"
    assert kd.explain("svdvals", A, driver="gesvd").method == "lapack"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_full_matrices(backend):
    def step(x):
        found = kd.svd(x, backend=backend)
        return found, (found.U[..., :3] @ found.Vh).abs().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (2, 3):
        leaf = make_matrices(N, 5, 3, dtype=torch.float64).requires_grad_()
        (a, loss_a), (b, loss_b) = step(leaf), compiled(leaf)
        assert isinstance(b, kd.SVD)
        torch.testing.assert_close(tuple(a), tuple(b))
        torch.testing.assert_close(torch.autograd.grad(loss_a, leaf), torch.autograd.grad(loss_b, leaf))


def test_torch_func_with_full_matrices():
    A = make_matrices(3, 5, 3, dtype=torch.float64)
    U, S, Vh = torch.func.vmap(kd.svd)(A)
    torch.testing.assert_close((U[..., :3] * S[:, None]) @ Vh, A)
    grad = torch.func.grad(lambda x: (kd.svd(x).U[..., :3] @ kd.svd(x).Vh).sum())(A)
    leaf = A.clone().requires_grad_()
    expected = torch.autograd.grad((kd.svd(leaf).U[..., :3] @ kd.svd(leaf).Vh).sum(), leaf)[0]
    torch.testing.assert_close(grad, expected)
