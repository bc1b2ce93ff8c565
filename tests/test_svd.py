"""`svd` and `svdvals`: against float64 and torch.linalg, gradients, transforms, NaN, shapes, errors.

Gradients at equal singular values are in test_svd_gradient.py, what a caller of torch.linalg expects in
test_svd_drop_in.py.
"""

import pytest
import torch
from conftest import ISAS
from torch.autograd import forward_ad

import kdkernels as kd
from kdkernels.ops.svd import lapack, native, schema
from kdkernels.testing.svd.checks import CASES, QUICK, checks, compare_case
from kdkernels.testing.svd.inputs import make_matrices

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
WIDE = (torch.float64, torch.complex128)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


# ---- numbers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", ("svd", "svdvals"))
def test_error_against_float64(op, case, dtype, backend):
    wrong = [d for d in compare_case(op, {"dtype": dtype} | CASES[case], backend) if not d.ok]
    assert not wrong, wrong


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_singular_values_of_graded_columns_are_right(dtype):
    """Columns over 30 decades: the singular values of a well-conditioned matrix times a diagonal, each to a few digits
    fewer than the dtype has."""
    matrix = make_matrices(4, 16, 16, kind="graded", dtype=dtype)
    found = kd.svdvals(matrix, backend="native").double()
    exact = torch.tensor([graded_values(x) for x in matrix], dtype=torch.float64)
    assert ((found - exact).abs() / exact).max() < 1e4 * torch.finfo(dtype).eps


def graded_values(matrix):
    import mpmath as mp

    with mp.workdps(60):
        x = mp.matrix([[mp.mpmathify(entry) for entry in row] for row in matrix.tolist()])
        return sorted((float(mp.re(value)) for value in mp.svd_c(x, compute_uv=False)), reverse=True)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("normal", "graded", "repeated", "low rank", "zero"))
def test_vectors_are_orthonormal_whatever_the_values(kind, dtype):
    for rows, cols in ((9, 9), (14, 6), (6, 14), (3, 1)):
        matrix = make_matrices(5, rows, cols, kind=kind, dtype=dtype)
        U, S, Vh = kd.svd(matrix, False, backend="native")
        eye, eps = torch.eye(min(rows, cols), dtype=dtype), torch.finfo(dtype).eps
        assert largest(U.mH @ U - eye) < 50 * eps and largest(Vh @ Vh.mH - eye) < 50 * eps
        assert largest((U * S.unsqueeze(-2)) @ Vh - matrix) <= 50 * eps * max(largest(matrix), 1e-30)
        assert (S >= 0).all() and (S.diff() <= 0).all()


@native_only
def test_above_the_crossover_the_batch_is_parallel_and_equal():
    n = native.CROSSOVER[torch.float64]
    matrix = make_matrices(5, n + 9, n + 4, dtype=torch.float64)
    expected = torch.linalg.svd(matrix, full_matrices=False)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = kd.svd(matrix, False, backend="native")
        assert torch.get_num_threads() == threads
        torch.testing.assert_close(found.S, expected.S)
        torch.testing.assert_close((found.U * found.S[:, None]) @ found.Vh, matrix)
        torch.testing.assert_close(kd.svdvals(matrix, backend="native"), expected.S)


@native_only
def test_the_same_bits_for_every_thread_count_and_place_in_the_batch():
    matrix = make_matrices(37, 12, 10)
    expected = kd.svd(matrix, False, backend="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, kd.svd(matrix, False, backend="native"), expected))
    torch.set_num_threads(1)
    for k in (0, 17, 36):
        assert all(
            torch.equal(a, b[k]) for a, b in zip(kd.svd(matrix[k], False, backend="native"), expected, strict=True)
        )


@native_only
@pytest.mark.parametrize("vectors", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
@pytest.mark.parametrize("n", (4, 7, 16))
def test_hard_neighbours_do_not_change_a_matrix(n, dtype, vectors):
    """Where norms cancel they are computed anew, in the lanes of those matrices alone."""
    hard = make_matrices(8, n, n, dtype=dtype)
    hard[1] = hard[1, :, :1] + 1e-4 * hard[1]
    hard[2, :, 1::2] = hard[2, :, ::2][..., : n // 2] * (1 + 1e-6)
    hard[3] = make_matrices(1, n, n, kind="graded", dtype=dtype)[0]
    hard[4] = make_matrices(1, n, n, kind="low rank", dtype=dtype)[0]
    hard[5] = torch.eye(n, dtype=dtype)
    hard[6] = 0
    hard[7] = make_matrices(1, n, n, kind="ascending", dtype=dtype)[0]
    together = kd.svd(hard, False, backend="native") if vectors else (kd.svdvals(hard, backend="native"),)
    for k in range(len(hard)):
        alone = kd.svd(hard[k], False, backend="native") if vectors else (kd.svdvals(hard[k], backend="native"),)
        assert all(torch.equal(a, b[k]) for a, b in zip(alone, together, strict=True)), k


@native_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.complex64, torch.complex128))
def test_values_alone_are_those_that_come_with_vectors(dtype):
    """Their last rotations are not carried out, and yet every value of a graded matrix is right."""
    for kind in ("normal", "graded", "repeated"):
        matrix = make_matrices(9, 24, 24, kind=kind, dtype=dtype)
        exact = kd.svd(matrix.to(torch.complex128 if dtype.is_complex else torch.float64), False, backend="native").S
        found = kd.svdvals(matrix, backend="native")
        seen = exact > 1e3 * torch.finfo(dtype).tiny
        assert ((found / exact - 1).abs()[seen] < 60 * torch.finfo(dtype).eps).all()


@native_only
@pytest.mark.parametrize(("rows", "cols"), ((16, 16), (20, 7), (7, 20), (33, 33)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_every_value_is_right_whatever_the_order_of_columns(rows, cols, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    draw = torch.Generator().manual_seed(0)
    scale = torch.stack([10.0 ** -(8 * torch.randperm(min(rows, cols), generator=draw).double()) for _ in range(20)])
    scale = scale ** (1 / min(rows, cols))
    matrix = make_matrices(20, rows, cols, dtype=wide) * (scale[:, None, :] if rows >= cols else scale[:, :, None])
    matrix = matrix.to(dtype)
    exact = torch.linalg.svdvals(matrix.to(wide))
    U, S, Vh = kd.svd(matrix, False, backend="native")
    for found in (S, kd.svdvals(matrix, backend="native")):
        assert ((found - exact).abs() < 1e-4 * exact).all()
    error, size = ((U * S.unsqueeze(-2)) @ Vh - matrix).abs(), matrix.abs()
    small = -2 if rows >= cols else -1
    assert (error.amax(small) < 1e-5 * size.amax(small)).all()  # of each column, or row, by itself


@native_only
@pytest.mark.parametrize("decades", (0, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_sparse_matrices_of_small_integers(dtype, decades):
    """Elements that are exactly, or nearly, cancelled: a phase from a square that underflows is not of length 1."""
    draw = torch.Generator().manual_seed(3)
    shape = (30000, 5, 5)
    matrix = torch.randint(-2, 3, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.5)
    matrix = matrix * 10.0 ** -torch.randint(0, decades + 1, (len(matrix), 1, 5), generator=draw)
    matrix[0] = torch.tensor(
        [[0, 0.01, 0, 0, -0.1], [0, 0, 0.002, 0, 0], [0, 0, 0, 0, -0.2], [0.02, 0, 0, 0.001, 0], [0, 0, 0, -0.002, 0]]
    )
    matrix[1] = torch.tensor(
        [[0, 0, 0, 0, 2], [0, 0, 0, -1, 0], [-1, -2, 1, -2, 0], [-1, -2, 1, 0, 0], [0, 0, 0, -1, 0]]
    )
    matrix = matrix.to(dtype) * (1 + 0.5j if dtype.is_complex else 1)
    exact = torch.linalg.svdvals(matrix.to(torch.complex128 if dtype.is_complex else torch.float64))
    U, S, Vh = kd.svd(matrix, False, backend="native")
    for values in (S, kd.svdvals(matrix, backend="native")):
        assert ((values - exact).abs() <= 4e-6 * exact[:, :1]).all()
    assert largest((U * S.unsqueeze(-2)) @ Vh - matrix) < 2e-5
    assert largest(Vh @ Vh.mH - torch.eye(5)) < 2e-5


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ((1e-25, 1e25, 1.0), (1e-30, 1e10, 1.0), (1e-36, 1e18, 1.0), (3e-38, 2e-38, 3e38)))
def test_small_values_beside_the_largest_of_the_range_are_right(values, dtype, isa):
    """Scaled by the largest to 1 alone, the smallest of these would leave the range of float32."""
    for order in ((0, 1, 2), (1, 2, 0)):
        diagonal = torch.tensor(values)[list(order)]
        matrix = torch.diag(diagonal).to(dtype)
        exact = diagonal.double().sort(descending=True).values
        U, S, Vh = kd.svd(matrix, False, backend="native")
        eps = torch.finfo(dtype).eps
        seen = exact > exact[0] * 1e-70  # decades that float32 has beside the largest entry
        for found in (S, kd.svdvals(matrix, backend="native")):
            assert ((found.double() / exact - 1).abs()[seen] < 8 * eps).all()
        assert largest(U.mH @ U - torch.eye(3)) < 50 * eps and largest(Vh @ Vh.mH - torch.eye(3)) < 50 * eps


# ---- NaN


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("n", (6, 125))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_what_is_not_finite_stays_in_its_matrix(backend, value, n, dtype):
    """torch's batched svdvals swallows NaN, or raises (pytorch #187759)."""
    matrix = make_matrices(3, n, n, dtype=dtype)
    clean = kd.svd(matrix, False, backend=backend)
    matrix[1, n // 2, 0] = value
    found = kd.svd(matrix, False, backend=backend)
    for a, b in zip((*found, kd.svdvals(matrix, backend=backend)), (*clean, clean.S), strict=True):
        assert a[1].isnan().all()
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_what_is_not_finite_is_nan_and_stays_there(backend):
    matrix = make_matrices(3, 5, 4, dtype=torch.float64)
    matrix[1, 2, 2] = torch.nan
    matrix.requires_grad_()
    (grad,) = torch.autograd.grad(kd.svdvals(matrix, backend=backend).sum(), matrix)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


# ---- gradients


def gauge_free(U, S, Vh):
    """Functions of the decomposition that do not see the phases of its vectors."""
    weights = torch.arange(1.0, S.shape[-1] + 1, dtype=S.dtype)
    return S, (U * weights) @ U.mH, (Vh.mH * weights) @ Vh, (U * weights) @ Vh


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("rows", "cols"), ((4, 4), (6, 3), (3, 5), (1, 4)))
def test_gradcheck(backend, dtype, rows, cols):
    matrix = make_matrices(2, rows, cols, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gauge_free(*kd.svd(x, False, backend=backend)), matrix)
    assert torch.autograd.gradcheck(lambda x: kd.svdvals(x, backend=backend), matrix)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_gradgradcheck(backend, dtype):
    matrix = make_matrices(1, 3, 3, dtype=dtype).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: kd.svdvals(x, backend=backend), matrix)
    assert torch.autograd.gradgradcheck(lambda x: gauge_free(*kd.svd(x, backend=backend)), matrix)


# ---- transforms


@native_only
@pytest.mark.parametrize("dtype", WIDE)
def test_opcheck(dtype):
    for rows, cols in ((5, 3), (3, 5)):
        matrix = make_matrices(2, rows, cols, dtype=dtype)
        torch.library.opcheck(schema.svdvals.seen, (matrix,))
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(schema.svd.seen, (matrix.requires_grad_(),), test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", WIDE)
def test_compiled_as_one_graph_with_dynamic_shapes(backend, dtype):
    def step(x):
        values = kd.svdvals(x, backend=backend).sum()
        return values + gauge_free(*kd.svd(x, False, backend=backend))[1].abs().square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (2, 3):
        matrix = make_matrices(N, 5, 4, dtype=dtype).requires_grad_()
        a, b = (torch.autograd.grad(function(matrix), matrix)[0] for function in (step, compiled))
        torch.testing.assert_close(a, b)


def test_torch_func_takes_the_reference():
    matrix = make_matrices(3, 4, 4, dtype=torch.float64)
    grad = torch.func.grad(lambda x: kd.svdvals(x).sum())(matrix)
    U, _, Vh = torch.linalg.svd(matrix)
    torch.testing.assert_close(grad, U @ Vh)
    torch.testing.assert_close(torch.func.vmap(kd.svdvals)(matrix), kd.svdvals(matrix))


@native_only
@pytest.mark.parametrize("op", (kd.svd, kd.svdvals))
def test_forward_derivatives_are_refused_rather_than_lost(op):
    matrix, tangent = make_matrices(2, 4, 3, dtype=torch.float64), make_matrices(2, 4, 3, dtype=torch.float64, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(matrix, tangent)
        with pytest.raises(RuntimeError, match=f"{op.__name__} has no forward-mode derivative on this backend"):
            op(dual)
        S = kd.svdvals(dual, backend="reference")
        assert forward_ad.unpack_dual(S).tangent.abs().sum() > 0


# ---- shapes, strides, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (0,), (2, 0), (3,), (2, 1, 2)))
@pytest.mark.parametrize(("rows", "cols"), ((4, 3), (3, 4), (0, 3), (3, 0), (1, 1)))
def test_shapes(backend, leading, rows, cols):
    matrix = torch.randn(*leading, rows, cols, dtype=torch.complex64)
    U, S, Vh = kd.svd(matrix, False, backend=backend)
    k = min(rows, cols)
    assert U.shape == (*leading, rows, k) and S.shape == (*leading, k) and Vh.shape == (*leading, k, cols)
    assert S.dtype is torch.float32 and U.dtype is Vh.dtype is torch.complex64
    assert kd.svdvals(matrix, backend=backend).shape == (*leading, k)


@native_only
def test_strides_and_the_bits_of_views_do_not_matter():
    matrix = make_matrices(4, 7, 5, dtype=torch.complex64)
    expected = kd.svd(matrix, False, backend="native")
    views = (
        matrix.mT.contiguous().mT,
        matrix.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        matrix.conj().resolve_conj().conj(),
        torch.cat([matrix, matrix], -1)[..., :5],
    )
    for view in views:
        assert all(map(torch.equal, kd.svd(view, False, backend="native"), expected))
    real = matrix.conj().imag
    assert real.is_neg()
    torch.testing.assert_close(kd.svdvals(real, backend="native"), kd.svdvals(real.clone(), backend="native"))


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    (
        (None, TypeError, "A is NoneType, but must be a torch.Tensor"),
        ([[1.0]], TypeError, "A is list, but must be a torch.Tensor"),
        (torch.ones(2, 2, dtype=torch.bfloat16), TypeError, "A has dtype torch.bfloat16, but must have one of"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "A has dtype torch.int64"),
        (torch.ones(3), ValueError, r"A has shape \(3\), but must be \(\.\.\., rows, cols\)"),
    ),
)
@pytest.mark.parametrize("function", (kd.svd, kd.svdvals))
def test_wrong_arguments_are_named(function, matrix, error, message):
    with pytest.raises(error, match=message):
        function(matrix)


def test_backends_that_cannot_serve_are_named():
    with pytest.raises(ValueError, match="backend='triton': svd has no such implementation"):
        kd.svd(torch.ones(2, 2), backend="triton")


def test_lapack_leaves_an_empty_batch_alone():
    U, S, Vh = lapack.svd(torch.ones(0, 4, 3))
    assert (U.shape, S.shape, Vh.shape) == ((0, 4, 3), (0, 3), (0, 3, 3))


@native_only
def test_explain_says_where_jacobi_ends():
    explanation = kd.explain(kd.svd, torch.ones(2, 16, 16))
    assert (explanation.backend, explanation.method) == ("native", "jacobi")
    n = native.CROSSOVER[torch.float32] + 1
    assert kd.explain(kd.svdvals, torch.ones(2, n, n)).method == "lapack"
    assert set(QUICK) <= set(CASES)


@pytest.mark.native
def test_columns_at_the_end_of_the_range_are_no_nan():
    e = 1e-44
    for matrix in (
        torch.tensor([[1, e, 3 * e], [1, 2 * e, e], [1, 5 * e, 9 * e]]),
        torch.diag(10.0 ** torch.linspace(0, -60, 32)) @ make_matrices(1, 32, 32)[0],
    ):
        for x in (*kd.svd(matrix, False, backend="native"), kd.svdvals(matrix.mT, backend="native")):
            assert x.isfinite().all()
        torch.testing.assert_close(kd.svdvals(matrix)[0], torch.linalg.svdvals(matrix)[0])


@pytest.mark.native
def test_gradients_are_not_cast():
    matrix = make_matrices(3, 8, 8).requires_grad_()
    expected = torch.autograd.grad(kd.svdvals(matrix).sum(), matrix)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(kd.svdvals(matrix, backend="native").sum(), matrix), expected)


@pytest.mark.gpu
def test_on_a_gpu():
    found = {str(check): check.run() for check in checks(quick=True) if check.device == "cuda"}
    assert found
    assert not [(name, d) for name, report in found.items() for d in report if not d.ok]
