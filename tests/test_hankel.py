"""Gramian factors, Hankel singular values and energy: 50 digits, gradients, lists, horizons, transforms, errors."""

import math

import pytest
import torch

import kdkernels as kd
from kdkernels.ops.hankel import schema
from kdkernels.ops.hankel.native import LARGEST
from kdkernels.testing.hankel.checks import CASES, checks, compare_case, elsewhere, largest_error, suits
from kdkernels.testing.hankel.inputs import FAMILIES, SSM, make_systems, reference_values

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
OPS = ("gramian_factors", "hankel_singular_values", "hankel_energy")


def gramians(Lambda, B, C):
    z = Lambda.unsqueeze(-1) * Lambda.conj().unsqueeze(-2)
    return (B @ B.mH) / (1 - z), (C.mH @ C) / (1 - z.conj())


def dense_values(A, B, C):
    """From Lyapunov equations of a dense system, solved as linear ones: nothing of the operators is in them."""
    n = len(A)
    eye = torch.eye(n * n, dtype=A.dtype)

    def lyapunov(A, X):  # P = A P Aᴴ + X
        return torch.linalg.solve(eye - torch.kron(A, A.conj()), X.reshape(-1)).reshape(n, n)

    P, Q = lyapunov(A, B @ B.mH), lyapunov(A.mH, C.mH @ C)
    return torch.linalg.eigvals(P @ Q).abs().sqrt().sort(descending=True)[0]


# ---- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "backend"), [
    ("gramian_factors", "reference"), ("hankel_energy", "reference"),
    pytest.param("gramian_factors", "native", marks=native_only),
    pytest.param("hankel_singular_values", "native", marks=native_only),
])  # fmt: skip
def test_error_against_the_reference(op, backend, case, dtype):
    if not suits(op, CASES[case], dtype):
        pytest.skip("this family is complex, or the operator has no such option")
    wrong = [d for d in compare_case(op, dict(CASES[case]), backend, dtype, "cpu") if not d.ok]
    assert not wrong, wrong


@native_only
@pytest.mark.parametrize("m", (1, 2, 8))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_singular_value_against_50_digits(family, m):
    """1e-3 of each in float32 and 1e-9 in float64, down to what the dtype can hold."""
    n = 16
    for narrow, budget in ((torch.complex64, 1e-3), (torch.complex128, 1e-9)):
        dtype = narrow.to_real() if family in ("mamba", "real") else narrow
        system = make_systems(family, 1, n, m, dtype=dtype)
        exact = reference_values(*(x[0] for x in system))[None]
        found = kd.hankel_singular_values(*system, backend="native")
        assert largest_error(found, exact) <= budget
        large = exact > 1e-9 * exact[:, :1]
        reference = kd.hankel_singular_values(*system, backend="reference")
        assert ((reference - exact).abs() / exact)[large].max() <= max(budget, 1e-5)


def test_peers_miss_what_ours_finds():
    """eig(PQ) in float32 on a Mamba-like spectrum: it has less than half of the values within a tenth."""
    system = make_systems("mamba", 1, 16, 1, dtype=torch.float32)
    exact = reference_values(*(x[0] for x in system))
    P, Q = gramians(*(x[0] for x in system))
    eig = torch.linalg.eigvals(P @ Q).real.sqrt().nan_to_num(0).sort(descending=True)[0]
    assert ((eig - exact).abs() < 0.1 * exact).sum() < 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_gramians_are_those_of_the_lyapunov_equations(backend):
    """CompreSSM's `chol` forgets a conjugate; on this system that gives other values."""
    system = make_systems("LRU", 1, 5, 2, dtype=torch.complex128, seed=3)
    Lambda, B, C = (x[0] for x in system)
    found, expected = kd.hankel_singular_values(Lambda, B, C, backend=backend), dense_values(Lambda.diag(), B, C)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    P, Q = gramians(Lambda, B, C)
    L_c, L_o = torch.linalg.cholesky(P), torch.linalg.cholesky(Q)
    forgotten = torch.linalg.svdvals(L_o.mT @ L_c)
    assert ((forgotten - expected).abs() > 1e-2 * expected).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_observability_gramian_belongs_to_the_conjugate(backend):
    """lru-reduction gives it λ instead of λ*; on a system doubled by its conjugate that gives other values."""
    half = make_systems("LRU", 1, 3, 2, dtype=torch.complex128, seed=5)
    Lambda, B, C = (x[0] for x in half)
    found = kd.hankel_singular_values(Lambda, B, C, real_output=True, backend=backend)
    A = torch.block_diag(Lambda.diag(), Lambda.conj().diag())
    B2, C2 = torch.cat([B, B.conj()]), torch.cat([C, C.conj()], -1) / 2
    expected = dense_values(A, B2, C2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    P, _ = gramians(A.diagonal(), B2, C2)
    wrong = (C2.mH @ C2) / (1 - A.diagonal()[:, None] * A.diagonal().conj())
    wrong = torch.linalg.eigvals(P @ wrong).abs().sqrt().sort(descending=True)[0]
    assert ((wrong - expected).abs() > 1e-2 * expected).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_re_of_the_output_is_a_real_system(backend):
    """Impulse responses of (Λ, B, C/2) beside its conjugate are Re(C Λ^k B), and the block-Hankel matrix has its σ."""
    Lambda, B, C = (x[0] for x in make_systems("LRU", 1, 3, 2, dtype=torch.complex128))
    Lambda = 0.7 * Lambda
    markov = torch.stack([((C * Lambda**k) @ B).real for k in range(199)])
    S = kd.hankel_svd(markov, 6).S
    torch.testing.assert_close(
        kd.hankel_singular_values(Lambda, B, C, real_output=True, backend=backend), S, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", (1, 2, 7, 64))
def test_a_horizon_counts_its_steps_and_serves_any_pole(backend, horizon):
    system = make_systems("LRU", 2, 5, 3, dtype=torch.complex128)
    system = SSM(system.Lambda * 1.03, *system[1:])
    powers = [system.Lambda**k for k in range(horizon)]
    P = sum((w[..., None] * system.B) @ (w[..., None] * system.B).mH for w in powers)
    Q = sum((system.C * w[:, None]).mH @ (system.C * w[:, None]) for w in powers)
    values = torch.linalg.eigvals(P @ Q).abs().sqrt().sort(-1, descending=True)[0]
    found = kd.hankel_singular_values(*system, horizon=horizon, backend=backend)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-6 * values.max().item())
    energy = kd.hankel_energy(*system, horizon=horizon)
    torch.testing.assert_close(energy, (P @ Q).diagonal(dim1=-2, dim2=-1).sum(-1).real, rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_energy_and_ranks(family, backend):
    system = make_systems(family, 2, 12, 2, dtype=torch.complex128)
    sigma = kd.hankel_singular_values(*system, backend=backend)
    torch.testing.assert_close(kd.hankel_energy(*system), sigma.square().sum(-1), rtol=1e-8, atol=0)
    factors = kd.gramian_factors(*system, backend=backend)
    for tolerance in (1e-1, 1e-4, 1e-12):
        for rank, L, residual in zip(factors.ranks(tolerance), factors[:2], factors[2:], strict=True):
            for k, r in enumerate(rank.tolist()):
                trace = residual[k, 0]
                assert residual[k, r] <= tolerance * trace and (r == 0 or residual[k, r - 1] > tolerance * trace)
                left = trace - L[k, :, :r].abs().square().sum()
                assert left.abs() <= tolerance * trace + 1e-13 * trace


@native_only
def test_the_same_bits_for_every_thread_count_and_batch():
    system = make_systems("LRU", 37, 12, 2, dtype=torch.complex64)
    expected = kd.hankel_singular_values(*system, backend="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kd.hankel_singular_values(*system, backend="native"), expected)
    torch.set_num_threads(1)
    for k in (0, 20, 36):
        assert torch.equal(kd.hankel_singular_values(*(x[k] for x in system), backend="native"), expected[k])


# ---- gradients


def real_step(function, tensors, step=1e-6):
    """Central differences along one random direction of every tensor, and the gradient's inner product with it."""
    draw = torch.Generator().manual_seed(11)
    directions = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in tensors]
    directions = [d * x.abs().clamp(min=1e-3) for d, x in zip(directions, tensors, strict=True)]
    with torch.no_grad():
        ends = [function(*(x + s * d for x, d in zip(tensors, directions, strict=True))) for s in (step, -step)]
    leaves = [x.detach().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves), leaves)
    inner = sum((g.conj() * d).sum().real for g, d in zip(grads, directions, strict=True))
    return (ends[0] - ends[1]) / (2 * step), inner


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", (None, 9))
def test_gradcheck(backend, horizon):
    system = tuple(make_systems("LRU", 2, 4, 2, dtype=torch.complex128).leaves())
    assert torch.autograd.gradcheck(lambda *x: kd.hankel_singular_values(*x, horizon=horizon, backend=backend), system)
    real = tuple(make_systems("real", 1, 3, 3, dtype=torch.float64).leaves())
    assert torch.autograd.gradcheck(lambda *x: kd.hankel_singular_values(*x, horizon=horizon, backend=backend), real)
    assert torch.autograd.gradcheck(lambda *x: kd.hankel_energy(*x, horizon=horizon), system)


def test_what_is_differentiable_twice():
    system = tuple(make_systems("LRU", 1, 3, 2, dtype=torch.complex128).leaves())
    assert torch.autograd.gradgradcheck(lambda *x: kd.hankel_singular_values(*x, backend="reference"), system)
    assert torch.autograd.gradgradcheck(kd.hankel_energy, system)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("power", (0.5, 1, 3))
def test_gradients_against_finite_differences(family, power, backend):
    """Of Σσ^power. A square root is held to the values whose differences float64 can see."""
    if family == "near circle" or (power == 0.5 and backend == "reference"):
        pytest.skip("differences of size 1e-6 leave the unit circle; the smallest values are LAPACK's rounding")
    system = make_systems(family, 2, 7, 2, dtype=torch.complex128)

    def function(*x):
        sigma = kd.hankel_singular_values(*x, backend=backend)
        return sigma.clamp(min=1e-4).pow(power).sum()

    found, expected = real_step(function, system, 1e-8 if family == "clustered" else 1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_at_repeated_values(backend):
    """Two copies of one system side by side: every σ twice."""
    one = make_systems("LRU", 1, 3, 2, dtype=torch.complex128)
    Lambda = torch.cat([one.Lambda, one.Lambda], -1)
    B = torch.cat([torch.cat([one.B, 0 * one.B], -1), torch.cat([0 * one.B, one.B], -1)], -2)
    C = torch.cat([torch.cat([one.C, 0 * one.C], -1), torch.cat([0 * one.C, one.C], -1)], -2)
    sigma = kd.hankel_singular_values(Lambda, B, C, backend=backend)
    torch.testing.assert_close(sigma[:, ::2], sigma[:, 1::2])
    for power in (1, 2):
        found, expected = real_step(
            lambda *x, power=power: kd.hankel_singular_values(*x, backend=backend).pow(power).sum(), (Lambda, B, C)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreachable_states_contribute_nothing(backend):
    system = make_systems("LRU", 1, 4, 2, dtype=torch.complex128)
    padded = SSM(
        torch.cat([system.Lambda, 0.3 * torch.ones(1, 2)], -1).to(torch.complex128),
        torch.nn.functional.pad(system.B, (0, 0, 0, 2)),
        torch.nn.functional.pad(system.C, (0, 2)),
    ).leaves()
    sigma = kd.hankel_singular_values(*padded, backend=backend)
    assert (sigma[:, 4:] == 0).all()
    grads = torch.autograd.grad(sigma[:, :4].sum(), padded)
    leaves = system.leaves()
    expected = torch.autograd.grad(kd.hankel_singular_values(*leaves, backend=backend).sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[0][:, :4], expected[0])
    torch.testing.assert_close(grads[1][:, :4], expected[1])
    torch.testing.assert_close(grads[2][..., :4], expected[2])


@native_only
def test_only_requested_gradients_and_dtypes(monkeypatch):
    from kdkernels.ops.hankel import gradient

    asked = []
    backward = gradient.backward
    monkeypatch.setattr(gradient, "backward", lambda *a: asked.append(list(a[-1])) or backward(*a))
    Lambda, B, C = make_systems("LRU", 1, 4, 2, dtype=torch.complex64)
    for wanted in range(3):
        tensors = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((Lambda, B, C))]
        kd.hankel_singular_values(*tensors, backend="native").sum().backward()
        assert asked.pop() == [i == wanted for i in range(3)]
    real = B.real.detach().requires_grad_()  # real B beside complex poles; one Lambda for a batch
    pole = Lambda[0].detach().requires_grad_()
    kd.hankel_singular_values(pole, real.expand(3, 4, 2), C, backend="native").sum().backward()
    assert real.grad.dtype is torch.float32 and real.grad.shape == real.shape and pole.grad.shape == pole.shape


@native_only
def test_a_second_derivative_of_native_is_an_error_that_says_what_to_do():
    system = make_systems("LRU", 1, 4, 2, dtype=torch.complex128).leaves()
    sigma = kd.hankel_singular_values(*system, backend="native")
    grads = torch.autograd.grad(sigma.sum(), system, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grads[1].abs().sum().backward()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        kd.gramian_factors(*system, backend="native")[0].abs().sum().backward()


# ---- batches and lists


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_broadcast(backend):
    Lambda, B, C = make_systems("LRU", 6, 5, 2, dtype=torch.complex128)
    for op in OPS:
        if op == "hankel_energy" and backend == "native":
            continue
        function = getattr(kd, op)
        found = function(Lambda[0], B.reshape(2, 3, 5, 2), C[:3], backend=backend)
        single = function(Lambda[0], B[4], C[1], backend=backend)
        pairs = zip(found, single, strict=True) if op == "gramian_factors" else ((found, single),)
        for x, y in pairs:
            assert x.shape == (2, 3, *y.shape)
            torch.testing.assert_close(x[1, 1], y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", (None, 20))
def test_a_list_is_its_systems(backend, horizon):
    sizes = ((3, 1, 2), (16, 2, 1), (4, 3, 3), (0, 1, 1), (1, 1, 1), (15, 1, 1), (33, 2, 2))
    systems = [make_systems("LRU", 1, n, m, p, dtype=torch.complex128, seed=m) for n, m, p in sizes]
    systems = [SSM(*(x[0] for x in s)) for s in systems[:-1]] + [systems[-1]]
    for op in OPS:
        if (op == "hankel_energy" and backend == "native") or (op == "gramian_factors" and horizon):
            continue
        function = getattr(kd, op)
        options = {"backend": backend} | ({} if op == "gramian_factors" else {"horizon": horizon})
        together = function(*(list(x) for x in zip(*systems, strict=True)), **options)
        assert len(together) == len(systems)
        for system, found in zip(systems, together, strict=True):
            expected = function(*system, **options)
            found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    leaves = [s.leaves() for s in systems]
    sigma = kd.hankel_singular_values(*(list(x) for x in zip(*leaves, strict=True)), horizon=horizon, backend=backend)
    grads = torch.autograd.grad(sum(x.sum() for x in sigma), [s.B for s in leaves])
    for s, g in zip(leaves, grads, strict=True):
        (expected,) = torch.autograd.grad(kd.hankel_singular_values(*s, horizon=horizon, backend=backend).sum(), s.B)
        torch.testing.assert_close(g, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", (5, LARGEST + 3))
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_stays_in_its_system(which, n, backend):
    system = make_systems("LRU", 3, n, 2, dtype=torch.complex64)
    clean = kd.hankel_singular_values(*system, backend=backend)
    system[which][1].view(-1)[1] = math.nan
    found = kd.hankel_singular_values(*system, backend=backend)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]])
    assert kd.hankel_energy(*system).isnan().tolist() == [False, True, False]
    if n < 10:
        assert all(
            x[1].isnan().any() and x[[0, 2]].isfinite().all() for x in kd.gramian_factors(*system, backend=backend)
        )
    leaves = system.leaves()
    grads = torch.autograd.grad(kd.hankel_singular_values(*leaves, backend=backend).sum(), leaves)
    assert all(g[1].isnan().any() and g[[0, 2]].isfinite().all() for g in grads)


@native_only
def test_views_and_strides_do_not_matter():
    system = make_systems("LRU", 4, 6, 3, dtype=torch.complex64)
    expected = kd.hankel_singular_values(*system, backend="native")
    views = SSM(system.Lambda.conj().resolve_conj().conj(), system.B.mT.contiguous().mT, system.C.mH.resolve_conj().mH)
    assert torch.equal(kd.hankel_singular_values(*views, backend="native"), expected)
    torch.testing.assert_close(kd.hankel_singular_values(*elsewhere(system), backend="native"), expected)


# ---- transforms


@native_only
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
def test_opcheck(dtype):
    system = make_systems("real", 2, 4, 2, dtype=dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for horizon in (0, 5):
        torch.library.opcheck(schema.hankel_singular_values.seen, (*system, horizon, False), test_utils=tests)
        arguments = (*system.leaves(), horizon, True)
        torch.library.opcheck(schema.hankel_singular_values.seen, arguments, test_utils=tests)
    torch.library.opcheck(schema.gramian_factors.seen, (*system,), test_utils=tests)
    _, T, W = schema.hankel_singular_values.whole(*system, 0, True)
    arguments = (torch.ones(2, 4, dtype=torch.float64), *system, T, W, 0, [True, False, True])
    torch.library.opcheck(schema.hankel_singular_values_backward.seen, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("horizon", (None, 6))
def test_compiled_as_one_graph(backend, horizon):
    def step(*x):
        total = kd.hankel_singular_values(*x, horizon=horizon, real_output=True, backend=backend).sum()
        return total if backend == "native" else total + kd.hankel_energy(*x, horizon=horizon).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=backend == "native", backend="aot_eager")
    for N in (2, 3) if backend == "native" else (2,):
        system = make_systems("LRU", N, 2 if backend == "native" else 1, 2, dtype=torch.complex128).leaves()
        grads = [torch.autograd.grad(function(*system), system) for function in (step, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_torch_func_takes_the_reference():
    system = make_systems("LRU", 3, 4, 2, dtype=torch.complex128)
    torch.testing.assert_close(
        torch.func.vmap(kd.hankel_singular_values)(*system), kd.hankel_singular_values(*system, backend="reference")
    )
    grad = torch.func.grad(lambda B: kd.hankel_singular_values(system.Lambda, B, system.C).sum())(system.B)
    leaves = system.leaves()
    (expected,) = torch.autograd.grad(kd.hankel_singular_values(*leaves, backend="reference").sum(), leaves.B)
    torch.testing.assert_close(grad, expected)


# ---- errors


UNSTABLE = torch.full((3,), 1.0 + 0j)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"Lambda": UNSTABLE}, ValueError, r"Lambda has \|λ\| = 1 at index \(0,\), but every \|λ\| must be below 1"),
        ({"Lambda": [1.0]}, TypeError, "B is Tensor, but must be a list, as Lambda is"),
        ({"Lambda": None}, TypeError, "Lambda is NoneType, but must be a torch.Tensor"),
        ({"B": None}, TypeError, "B is NoneType"),
        ({"Lambda": 0.5}, TypeError, "Lambda is float, but must be a torch.Tensor"),
        ({"Lambda": torch.ones(3, dtype=torch.int64)}, TypeError, "Lambda has dtype torch.int64"),
        ({"B": torch.ones(3, 2).bfloat16()}, TypeError, "B has dtype torch.bfloat16, but must have one of"),
        ({"B": torch.ones(4, 2)}, ValueError, r"B has shape \(4, 2\), but must be \(\.\.\., n, m\) with n = 3, as in"),
        ({"C": torch.ones(2, 4)}, ValueError, r"C has shape \(2, 4\), but must be \(\.\.\., p, n\) with n = 3"),
        ({"C": torch.ones(3)}, ValueError, r"C has shape \(3\), but must be \(\.\.\., p, n\)"),
        ({"B": torch.ones(2, 3, 2), "C": torch.ones(5, 2, 3)}, ValueError, r"C has leading dimensions \(5\).*\(2\)"),
        ({"C": torch.ones(2, 3, device="meta")}, ValueError, "C is on meta, but Lambda is on cpu"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ),
)  # fmt: skip
def test_wrong_arguments_are_named(op, change, error, message):
    arguments = {"Lambda": torch.full((3,), 0.5), "B": torch.ones(3, 2), "C": torch.ones(2, 3)} | change
    with pytest.raises(error, match=message):
        getattr(kd, op)(**arguments)


def test_a_list_says_which_system_is_wrong():
    good = [torch.full((3,), 0.5), torch.ones(3, 2), torch.ones(2, 3)]
    with pytest.raises(ValueError, match=r"Lambda\[1\] has \|λ\| = 1 at"):
        kd.hankel_singular_values([good[0], UNSTABLE], [good[1]] * 2, [good[2]] * 2)
    with pytest.raises(ValueError, match=r"B\[1\] has shape \(4, 2\).*as in Lambda\[1\]"):
        kd.hankel_singular_values([good[0]] * 2, [good[1], torch.ones(4, 2)], [good[2]] * 2)
    with pytest.raises(ValueError, match="C has 1 systems, but must have 2, as in Lambda"):
        kd.hankel_singular_values([good[0]] * 2, [good[1]] * 2, [good[2]])
    assert kd.hankel_singular_values([], [], []) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"horizon": 0}, ValueError, "horizon is 0, but must be a whole number of at least 1"),
        ({"horizon": 2.0}, ValueError, "horizon is 2.0"),
        ({"real_output": 1}, TypeError, "real_output is int, but must be a bool"),
    ),
)
@pytest.mark.parametrize("function", (kd.hankel_singular_values, kd.hankel_energy))
def test_wrong_options_are_named(function, options, error, message):
    with pytest.raises(error, match=message):
        function(torch.full((3,), 0.5), torch.ones(3, 2), torch.ones(2, 3), **options)


def test_poles_that_only_round_to_the_circle_are_inside():
    pole = torch.polar(torch.tensor(1 - 1e-12, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))[None]
    sigma = kd.hankel_singular_values(pole, torch.ones(1, 1), torch.ones(1, 1))
    torch.testing.assert_close(sigma, torch.tensor([5e11], dtype=torch.float64), rtol=1e-3, atol=0)
    with pytest.raises(TypeError, match="tolerance is str"):
        kd.gramian_factors(pole, torch.ones(1, 1), torch.ones(1, 1)).ranks("0.1")
    with pytest.raises(ValueError, match="tolerance is -1"):
        kd.gramian_factors(pole, torch.ones(1, 1), torch.ones(1, 1)).ranks(-1)


@pytest.mark.native
@pytest.mark.parametrize("n", (29, 32, 64, 100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_values_beyond_the_range_of_float32_are_no_nan(n, dtype):
    Lambda, B, C = torch.exp(-0.05 * torch.arange(1, n + 1)).to(dtype), torch.ones(n, 1), torch.ones(1, n)
    found = kd.hankel_singular_values(Lambda, B, C, backend="native").double()
    exact = kd.hankel_singular_values(Lambda.to(torch.complex128), B, C, backend="native")
    inside = exact > 1e-36
    assert ((found - exact).abs() <= 1e-3 * exact)[inside].all()
    assert (found[~inside] < 1e-35).all()


@pytest.mark.native
@pytest.mark.parametrize("scale", (1e3, 1e12, 1e25))
def test_states_in_units_that_are_far_apart(scale):
    Lambda, units = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([scale, 1, 1 / scale])
    found = kd.hankel_singular_values(Lambda, units[:, None], 1 / units[None], backend="native")
    torch.testing.assert_close(found, kd.hankel_singular_values(Lambda, torch.ones(3, 1), torch.ones(1, 3)))
    wide = [x.double().requires_grad_() for x in (Lambda, units[:, None], 1 / units[None])]
    grads = [
        torch.autograd.grad(kd.hankel_singular_values(*wide, backend=backend).sum(), wide)
        for backend in ("native", "reference")
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_poles_a_hair_apart_have_gradients_and_truncations():
    Lambda = (0.9 + 1e-8 * torch.arange(32, dtype=torch.float64)).requires_grad_()
    B = torch.ones(32, 1, dtype=torch.float64)
    (grad,) = torch.autograd.grad(kd.hankel_singular_values(Lambda, B, B.mT).sum(), Lambda)
    assert grad.isfinite().all()
    assert kd.balanced_truncation(Lambda.detach(), B, B.mT, rank=2).rank == 2


@pytest.mark.gpu
def test_on_a_gpu():
    found = {str(check): check.run() for check in checks(quick=True) if check.device == "cuda"}
    assert found
    assert not [(name, d) for name, report in found.items() for d in report if not d.ok]
