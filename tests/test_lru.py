"""`nn.LRU` and what is built of it: against a loop of complex numbers, in pieces of time, as a system, as a module."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.nn import LRU, LRUBlock, LRUClassifier
from kdkernels.ops.linear_recurrence import native, state_space
from kdkernels.testing.compare import Outcome, deviations, errors

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))
H, n = 3, 5
BLOCKS = (4 << 20, 16 * n * 6 * 3, 16 * n * 4)  # of 6 steps of float64: all sequences, three of them, a part of one


def layer(features=H, states=n, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return LRU(features, states, dtype=dtype, **options)


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def naive(lru, u, h=None):
    """y and h_T by the formula: one step after another, in complex numbers."""
    Lambda = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log)))
    B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
    gamma, outputs = torch.exp(lru.gamma_log), []
    h = torch.zeros(*u.shape[:-2], lru.states, dtype=Lambda.dtype) if h is None else h
    for step in u.unbind(-2):
        h = Lambda * h + gamma * (step.to(B.dtype) @ B.mT)
        outputs.append((h @ C.mT).real + lru.D * step)
    return torch.stack(outputs, -2), h


def outcome(function, lru, u, start):
    """Both results and the gradients of everything."""
    leaves = {"input": u} | ({} if start is None else {"start": start}) | dict(lru.named_parameters())
    y, h = function(u, start)
    arriving = normal(*y.shape, dtype=y.dtype, seed=7), normal(*h.shape, dtype=h.dtype, seed=8)
    grads = torch.autograd.grad((y, h), list(leaves.values()), arriving)
    return Outcome(y.detach(), dict(zip(leaves, grads, strict=True)), "y", {"h": h.detach()})


def ours(lru, u, start=None):
    return outcome(lambda u, h: lru(u, h, return_state=True), lru, u, start)


def loop(lru, u, start=None):
    return outcome(lambda u, h: naive(lru, u, h), lru, u, start)


def check_close(found, expected, rtol=1e-11):
    assert found.tensors().keys() == expected.tensors().keys()
    for name, x in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], x, rtol=rtol, atol=rtol, msg=lambda m, k=name: f"{k}: {m}")


@pytest.fixture
def block(request, monkeypatch):
    """How many bytes of states may be in memory at once."""
    monkeypatch.setitem(state_space.BLOCK_BYTES, "cpu", request.param)
    return request.param


# ---- numbers


@pytest.mark.parametrize("block", BLOCKS, indirect=True)
@pytest.mark.parametrize("leading", ((), (7,), (2, 4)))
@pytest.mark.parametrize("initial", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula_and_all_gradients(backend, initial, leading, block):
    lru, u = layer(backend=backend), normal(*leading, 6, H).requires_grad_()
    start = normal(*leading, n, dtype=torch.complex128).requires_grad_() if initial else None
    check_close(ours(lru, u, start), loop(lru, u, start))


@native_only
@pytest.mark.parametrize("block", (4 << 20, 8 * 40 * 50), indirect=True)
def test_error_against_float64(block):
    lru, u = layer(20, 40, torch.float32, min_radius=0.9, max_radius=0.999), normal(2, 300, 20, dtype=torch.float32)
    u, start = u.requires_grad_(), normal(2, 40, dtype=torch.complex64).requires_grad_()
    wide = [x.detach().to(kind).requires_grad_() for x, kind in ((u, torch.float64), (start, torch.complex128))]
    exact = loop(copy.deepcopy(lru).double(), *wide)
    wrong = [d for d in deviations(ours(lru, u, start), exact, errors(loop(lru, u, start), exact)) if not d.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("block", BLOCKS[::2], indirect=True)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_both_orders(backend, block):
    lru = layer(2, 2, backend=backend)
    leaves = [
        *lru.parameters(),
        normal(2, 3, 2).requires_grad_(),
        normal(2, 2, dtype=torch.complex128).requires_grad_(),
    ]

    def call(*tensors):
        parameters = dict(zip(dict(lru.named_parameters()), tensors, strict=False))
        return torch.func.functional_call(lru, parameters, tensors[-2:], {"return_state": True})

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@native_only
def test_second_derivatives_where_one_operand_is_made_of_another():
    """An initial state that is a function of the input: no path is counted twice."""
    u, W = normal(2, 6, H).requires_grad_(), normal(H, n, dtype=torch.complex128)
    found = []
    for backend in ("native", "reference"):
        y = layer(backend=backend)(u, u[:, 0].to(W.dtype) @ W)
        (grad,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), u)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@native_only
@pytest.mark.parametrize("block", BLOCKS[2:], indirect=True)
def test_only_the_gradients_that_are_asked_for(block):
    lru, u = layer(), normal(2, 6, H).requires_grad_()
    start = normal(2, n, dtype=torch.complex128).requires_grad_()
    leaves = {"input": u, "start": start} | dict(lru.named_parameters())
    expected = ours(lru, u, start).grads
    for name, leaf in leaves.items():
        for x in leaves.values():
            x.requires_grad_(x is leaf)
        y, h = lru(u, start, return_state=True)
        arriving = (normal(*y.shape, seed=7), normal(*h.shape, dtype=h.dtype, seed=8))
        reached = [(x, g) for x, g in zip((y, h), arriving, strict=True) if x.requires_grad]
        outputs, grads = zip(*reached, strict=True)
        (grad,) = torch.autograd.grad(outputs, leaf, grads)
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not lru(u).requires_grad


@native_only
@pytest.mark.parametrize("block", BLOCKS[1:], indirect=True)
def test_never_more_states_in_memory_than_a_block(block, monkeypatch):
    seen, forward, backward = [], native.forward, native.backward
    monkeypatch.setattr(native, "forward", lambda *x, **k: seen.append(x[1].nbytes) or forward(*x, **k))
    monkeypatch.setattr(native, "backward", lambda *x, **k: seen.append(x[2].nbytes) or backward(*x, **k))
    lru, u = layer(backend="native"), normal(7, 6, H).requires_grad_()
    lru(u).sum().backward()
    assert max(seen) <= block and len(seen) == 3 * (3 if block == BLOCKS[1] else 14)


@pytest.mark.parametrize("block", (4 << 20, 16 * 72 * 4), indirect=True)
@pytest.mark.parametrize("states", (64, 65, 71))
def test_many_states_whose_rows_do_not_fill_lines(states, block):
    lru, u = layer(states=states), normal(2, 9, H).requires_grad_()
    for start in (None, normal(2, states, dtype=torch.complex128).requires_grad_()):
        check_close(ours(lru, u, start), loop(lru, u, start))


@native_only
def test_a_sequence_that_is_not_finite_stays_alone():
    lru, u = layer(), normal(3, 6, H)
    clean = lru(u)
    u[1, 2, 0] = torch.nan
    y = lru(u)
    torch.testing.assert_close(y[::2], clean[::2])
    torch.testing.assert_close(y[1, :2], clean[1, :2])
    assert y[1, 2:].isnan().all()


# ---- pieces of time


@pytest.mark.parametrize("block", BLOCKS[::2], indirect=True)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_is_the_whole(backend, block):
    lru, u = layer(backend=backend), normal(2, 9, H).requires_grad_()

    def in_pieces(u, h):
        outputs = []
        for piece in u.split((4, 0, 1, 4), 1):
            y, h = lru(piece, h, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, 1), h

    start = normal(2, n, dtype=torch.complex128).requires_grad_()
    for h in (None, start):
        check_close(outcome(in_pieces, lru, u, h), ours(lru, u, h))
    assert torch.equal(lru(u), lru(u, return_state=True)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences_and_no_steps(backend):
    lru = layer(backend=backend)
    for shape in ((0, 6, H), (2, 0, H), (0, 0, H), (0, H), (2, 0, 6, H)):
        for start in (None, normal(*shape[:-2], n, dtype=torch.complex128).requires_grad_()):
            u = normal(*shape).requires_grad_()
            y, h = lru(u, start, return_state=True)
            assert y.shape == shape and h.shape == (*shape[:-2], n) and h.dtype is torch.complex128
            assert torch.equal(h, torch.zeros_like(h) if start is None else start)
            leaves = [u, *lru.parameters()]
            grads = torch.autograd.grad(y.sum() + h.abs().sum(), leaves, allow_unused=True)
            assert not any(g.any() for g in grads if g is not None)


# ---- what a system is


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_eigenvalues_begin_on_the_ring(dtype):
    lru = layer(2, 4000, dtype, min_radius=0.6, max_radius=0.9, max_phase=math.pi / 4)
    Lambda = lru.eigenvalues()
    assert Lambda.dtype is dtype.to_complex()
    size, phase = Lambda.abs(), Lambda.angle()
    assert 0.6 - 1e-6 < size.min() < 0.61 and 0.89 < size.max() < 0.9 + 1e-6
    assert -1e-6 < phase.min() < 0.01 and 0.77 < phase.max() < math.pi / 4 + 1e-6
    assert abs(size.square().mean() - (0.6**2 + 0.9**2) / 2) < 0.005  # uniform on the ring's area
    assert abs(phase.mean() - math.pi / 8) < 0.02
    torch.testing.assert_close(lru.gamma_log.exp(), (1 - size.square()).sqrt(), rtol=1e-4, atol=0)
    assert abs(lru.B_re.std() / 0.5 - 1) < 0.05 and abs(lru.C_im.std() * 4000**0.5 - 1) < 0.05
    assert not torch.equal(lru.B_re, lru.B_im) and not torch.equal(lru.C_re, lru.C_im)


def test_the_whole_disc_is_stable_and_finite():
    lru = layer(1, 4000, torch.float32)
    assert (lru.eigenvalues().abs() < 1).all() and all(p.isfinite().all() for p in lru.parameters())
    lru = layer(1, 4000, torch.float32, min_radius=0, max_radius=1e-9, max_phase=1e-9)  # no logarithm of 0
    assert all(p.isfinite().all() for p in lru.parameters())


def test_seeds_and_new_draws():
    first, again, other = layer(), layer(), layer(seed=1)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(1)
    first.reset_parameters()
    assert all(map(torch.equal, first.parameters(), other.parameters()))


def test_the_system_gives_the_impulse_response():
    lru, T = layer(max_radius=0.7), 200
    Lambda, B, C = lru.system()
    y = lru(torch.eye(H, dtype=torch.float64)[:, None] * (torch.arange(T) == 0)[:, None])  # (H, T, H): of each input
    for w in (0.0, 0.3, 2.0):
        z = torch.exp(1j * torch.tensor(w, dtype=torch.float64))
        shares = [(C / (1 - Lambda / x)) @ B for x in (z, z.conj())]
        expected = (shares[0] + shares[1].conj()) / 2 + torch.diag(lru.D)
        found = (y * (z ** -torch.arange(T))[:, None]).sum(1).mT
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hankel_singular_values_of_the_system(backend):
    lru, T = layer(max_radius=0.6), 40
    Lambda, B, C = lru.system()
    markov = torch.stack([(C * Lambda**k) @ B for k in range(2 * T)])  # (2T, p, m)
    hankel = torch.cat([torch.cat(list(markov[k : k + T]), 1) for k in range(T)])
    values = kd.hankel_singular_values(Lambda, B, C, backend=backend)
    torch.testing.assert_close(values, torch.linalg.svdvals(hankel)[:n])
    for name, grad in zip(("nu_log", "C_im"), torch.autograd.grad(values.sum(), (lru.nu_log, lru.C_im)), strict=True):
        assert grad.isfinite().all() and grad.any(), name


# ---- modules


def test_a_block_and_a_classifier_are_what_they_say():
    torch.manual_seed(0)
    model, x = LRUClassifier(4, H, [5, 2], 6, dtype=torch.float64, dropout=0.5), normal(2, 7, 4)
    assert model.states == [5, 2] and len(model.blocks) == 2
    model.eval()
    h = F.linear(x, model.encoder.weight, model.encoder.bias)
    for block in model.blocks:
        mixed, _ = naive(block.lru, F.layer_norm(h, (H,), block.norm.weight, block.norm.bias))
        a, b = (F.linear(F.gelu(mixed), part.weight, part.bias) for part in (block.value, block.gate))
        torch.testing.assert_close(block(h), h + a * torch.sigmoid(b))
        h = h + a * torch.sigmoid(b)
    torch.testing.assert_close(model(x), F.linear(h.mean(1), model.head.weight, model.head.bias))
    assert torch.equal(model(x[0]), model(x)[0]) or torch.allclose(model(x[0]), model(x)[0], rtol=1e-12)
    model.train()
    assert not torch.equal(model(x), model(x))  # dropout


def test_dropout_takes_a_feature_from_all_steps_of_a_sequence():
    torch.manual_seed(0)
    block, x = LRUBlock(32, 3, dropout=0.5), normal(4, 7, 32, dtype=torch.float32)
    unchanged = block(x) == x  # 1 in 2, and differs from sequence to sequence
    assert torch.equal(unchanged, unchanged[:, :1].expand_as(unchanged))
    assert 0.3 < unchanged.float().mean() < 0.7 and not torch.equal(unchanged[0], unchanged[1])
    alone = block(x[0]) == x[0]
    assert torch.equal(alone, alone[:1].expand_as(alone)) and alone.any()


def test_states_of_one_number_or_many():
    assert LRUClassifier(1, H, 4, 2).states == [4]
    assert LRUClassifier(1, H, 4, 2, blocks=3).states == [4, 4, 4]
    assert LRUClassifier(1, H, (4, 3), 2, blocks=2).states == [4, 3]
    small = LRUClassifier(1, H, LRUClassifier(1, H, [2, 7], 2).states, 2, max_radius=0.5)
    assert small.states == [2, 7] and small.blocks[1].lru.ring[1] == 0.5


@pytest.mark.parametrize("make", (lambda: LRU(H, n), lambda: LRUBlock(H, n), lambda: LRUClassifier(H, H, [n, 2], H)))
def test_copies_and_saved_states(make):
    model, other, x = make(), make(), normal(2, 6, H, dtype=torch.float32)
    expected = model(x)
    assert not torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    copies = (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for twin in copies:
        assert torch.equal(twin(x), expected)
        assert all(p.dtype is torch.float32 for p in twin.parameters())  # real, all of them
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)


def test_dtypes_and_devices():
    assert all(p.dtype is torch.float64 for p in LRUClassifier(2, H, n, 2, dtype=torch.float64).parameters())
    assert layer()(normal(2, 6, H, dtype=torch.float32)).dtype is torch.float64
    assert layer(dtype=torch.float32)(normal(2, 6, H).bfloat16()).dtype is torch.float32
    meta = LRUClassifier(2, H, n, 4, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    logits = meta(torch.ones(5, 6, 2, device="meta"))
    assert logits.is_meta and logits.shape == (5, 4)
    y, h = LRU(H, n, device="meta")(torch.ones(6, H, device="meta"), return_state=True)
    assert y.shape == (6, H) and h.shape == (n,)
    lru = LRU(H, n, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    lru.reset_parameters()
    assert torch.equal(lru.D, layer(dtype=torch.float32).D)
    assert repr(LRU(H, n)) == "LRU(3, states=5, radii=(0, 1), max_phase=6.28)"
    assert "backend='reference'" in repr(LRU(H, n, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_it_in_float32(backend):
    lru, u = layer(dtype=torch.float32, backend=backend), normal(2, 6, H, dtype=torch.float32).requires_grad_()
    expected = lru(u)
    grads = torch.autograd.grad(expected.square().sum(), u, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lru(u)
        assert torch.equal(y, expected)
        block = LRUBlock(H, n, backend=backend)
        assert block(u).dtype is torch.float32
    if backend == "native":  # whose second derivative names its precision, whatever backward is under
        y = lru(u)
        with torch.autocast("cpu", torch.bfloat16):
            for create_graph in (True, False):
                found = torch.autograd.grad(y.square().sum(), u, create_graph=create_graph, retain_graph=True)
                torch.testing.assert_close(found, grads, rtol=1e-5, atol=1e-5)


@native_only
def test_opcheck():
    Lambda, B, C = layer().system()
    rows, columns = (
        torch.view_as_real(B).mT.reshape(2 * n, H),
        torch.view_as_real(C.conj().resolve_conj()).reshape(H, 2 * n),
    )
    for shape, initial in (((2, 6, H), True), ((1, 4, H), False), ((2, 0, H), True)):
        u, start = normal(*shape), normal(shape[0], n, dtype=torch.complex128) if initial else None
        tensors = [None if x is None else x.detach() for x in (u, Lambda, rows, columns, start)]
        leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
        torch.library.opcheck(state_space.layer.seen, (*leaves, "native"))
        y, last, cuts = state_space.layer.seen(*tensors, "native")
        for needs in ([True] * 4 + [initial], [False, True, False, False, False]):
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")
            arguments = (y, last, *tensors, cuts, needs, "native")
            torch.library.opcheck(state_space.layer_backward.seen, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_as_one_graph(backend):
    torch.compiler.reset()
    model, dynamic = LRUClassifier(2, H, n, 4, dtype=torch.float64, backend=backend), backend == "native"
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, T in ((3, 2), (5, 2)) if backend == "reference" else ((3, 4), (5, 6)):
        x = normal(N, T, 2)
        a, b = ((y, *torch.autograd.grad(y.square().sum(), model.parameters())) for y in (model(x), compiled(x)))
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)


def test_torch_func_takes_the_reference():
    lru, u = layer(), normal(4, 6, H)
    parameters = {name: p.detach() for name, p in lru.named_parameters()}
    each = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(lru, p, (x,)).square().sum()), in_dims=(None, 0)
    )(parameters, u)
    lru(u).square().sum().backward()
    for name, p in lru.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)


@native_only
@pytest.mark.parametrize("block", BLOCKS, indirect=True)
def test_checkpointing_strides_and_repetition(block):
    lru, u = layer(), normal(7, 6, H)
    expected = ours(lru, u.requires_grad_())
    kept = u.detach().clone()
    for view in (u.mT.contiguous().mT, u.transpose(0, 1).contiguous().transpose(0, 1), u.repeat(1, 2, 2)[:, :6, :H], u):
        view = view.detach().requires_grad_()
        check_close(ours(lru, view), expected, 1e-13)
        again = outcome(lambda u, h: checkpoint(lru, u, h, return_state=True, use_reentrant=False), lru, view, None)
        assert all(map(torch.equal, again.tensors().values(), ours(lru, view).tensors().values()))
    assert torch.equal(u, kept)
    y = lru(u)
    for arriving in (torch.ones((), dtype=u.dtype).expand(y.shape), torch.ones_like(y.mT).mT):
        grads = torch.autograd.grad(y, list(lru.parameters()), arriving, retain_graph=True)
        for a, b in zip(grads, torch.autograd.grad(y.sum(), list(lru.parameters()), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_training_reduces_a_loss():
    """Which of two frequencies a noisy sequence holds."""
    torch.manual_seed(0)
    model = LRUClassifier(1, 8, [8, 8], 2, min_radius=0.8, max_radius=0.99)
    labels, phases = torch.randint(2, (64,)), 6 * torch.rand(64, 1)
    x = (torch.sin(torch.arange(48) * (0.4 + 0.5 * labels[:, None]) + phases) + 0.5 * torch.randn(64, 48))[..., None]
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 0.5 < losses[0]
    assert all((block.lru.eigenvalues().abs() < 1).all() for block in model.blocks)


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: LRU(0, n), ValueError, "features is 0, but must be a whole number of at least 1"),
        (lambda: LRU(H, 2.5), ValueError, r"states is 2\.5"),
        (lambda: LRU(H, True), ValueError, "states is True"),
        (lambda: LRU(H, n, min_radius=-0.1), ValueError, r"min_radius is -0\.1, but must be at least 0"),
        (lambda: LRU(H, n, min_radius=0.5, max_radius=0.5), ValueError, r"min_radius is 0\.5 and max_radius 0\.5"),
        (
            lambda: LRU(H, n, max_radius=1.1),
            ValueError,
            r"max_radius 1\.1, but must be 0 ≤ min_radius < max_radius ≤ 1",
        ),
        (lambda: LRU(H, n, max_radius=math.nan), ValueError, "max_radius is nan"),
        (lambda: LRU(H, n, max_radius="1"), TypeError, "max_radius is str, but must be a number"),
        (lambda: LRU(H, n, max_phase=0), ValueError, "max_phase is 0, but must be above 0"),
        (lambda: LRU(H, n, max_phase=6.3), ValueError, r"max_phase is 6\.3.*at most 2π"),
        (lambda: LRU(H, n, backend="cuda"), ValueError, "backend is 'cuda', but must be one of"),
        (lambda: LRU(H, n, dtype=torch.bfloat16), TypeError, r"dtype is torch\.bfloat16, but must be torch\.float32"),
        (lambda: LRU(H, n, dtype=torch.complex64), TypeError, r"dtype is torch\.complex64"),
        (lambda: LRU(H, n, radius=1), TypeError, "radius"),
        (lambda: LRUBlock(H, n, dropout=2), ValueError, "dropout"),
        (lambda: LRUBlock(H, 0), ValueError, "states is 0"),
        (lambda: LRUClassifier(0, H, n, 2), ValueError, "inputs is 0"),
        (lambda: LRUClassifier(1, H, n, 0), ValueError, "classes is 0"),
        (lambda: LRUClassifier(1, H, n, 2, blocks=0), ValueError, "blocks is 0"),
        (lambda: LRUClassifier(1, H, [], 2), ValueError, "states has 0 numbers"),
        (lambda: LRUClassifier(1, H, [4, 0], 2), ValueError, "states is 0"),
        (lambda: LRUClassifier(1, H, [4], 2, blocks=2), ValueError, "states has 1 numbers.*each of 2 blocks"),
    ),
)
def test_wrong_options_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((torch.ones(H),), ValueError, r"input has shape \(3\), but must be \(\.\.\., T, 3\)"),
        ((torch.ones(2, 6, 4),), ValueError, r"input has shape \(2, 6, 4\), but must be \(\.\.\., T, 3\)"),
        (([1.0],), TypeError, "input is list, but must be a torch.Tensor"),
        ((torch.ones(6, H, dtype=torch.int64),), TypeError, r"input has dtype torch\.int64"),
        ((torch.ones(6, H, dtype=torch.complex64),), TypeError, r"input has dtype torch\.complex64"),
        ((torch.ones(2, 6, H), torch.ones(n)), ValueError, r"initial_state has shape \(5\), but must be \(2, 5\)"),
        ((torch.ones(2, 6, H), torch.ones(2, 4)), ValueError, r"initial_state has shape \(2, 4\)"),
    ),
)
def test_wrong_inputs_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        LRU(H, n)(*arguments)


def test_backends_and_casts_that_cannot_serve():
    with pytest.raises(ValueError, match="backend='triton'"):
        LRU(H, n, backend="triton")(torch.ones(6, H))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"the parameters have dtype {dtype}"):
            LRU(H, n).to(dtype)(torch.ones(6, H))


@pytest.mark.native
@pytest.mark.parametrize("kind", [LRU, LRUBlock])
def test_forward_mode_is_refused_and_not_lost(kind):
    module, x = kind(3, 4), torch.randn(2, 5, 3)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="LRU has no forward-mode derivative on this backend; use backend='ref"):
            module(forward_ad.make_dual(x, torch.ones_like(x)))
        plain = kind(3, 4, backend="reference")
        assert forward_ad.unpack_dual(plain(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None


def test_dropout_is_the_modules_own():
    """On in evaluation, as for uncertainties; gone where it was replaced."""
    model, x = LRUClassifier(3, 4, 5, 2, dropout=0.5).eval(), torch.randn(2, 6, 3)
    assert torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    assert not torch.equal(model(x), model(x))
    model.train()
    model.blocks[0].dropout = torch.nn.Identity()
    assert torch.equal(model(x), model(x))


def test_parameters_of_several_dtypes_are_refused():
    layer = LRU(3, 4)
    layer.B_re.data = layer.B_re.data.double()
    with pytest.raises(TypeError, match=r"B_re has dtype torch\.float64, but D has torch\.float32"):
        layer(torch.randn(2, 5, 3))
