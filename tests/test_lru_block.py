"""The kernels around the recurrence of a block of few features: against PyTorch's in float64, and as a part of `nn`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ISAS
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels as kd
from kdkernels.nn import LRUBlock, LRUClassifier, lru
from kdkernels.ops.linear_recurrence import block as kernels
from kdkernels.testing.compare import Outcome, deviations, errors, incoming

pytestmark = pytest.mark.native
ISA = pytest.mark.parametrize("isa", ISAS, indirect=True)
NORM = ("input", "weight", "bias")
MIX = ("x", "y", "u", "D", "value", "value_bias", "gate", "gate_bias")
MASKS = ((False, False), (True, False), (False, True), (True, True))
# (sequences, steps): within a tile, many short sequences, across tiles and the rows of a task
SHAPES = ((3, 37), (1, 1), (70, 1), (2, 1100), (33, 35))
WIDTHS = (1, 2, 7, 8, 16, 17, kernels.MOST)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_inputs(N, T, H, dtype=torch.float32, seed=0):
    shapes = ((N, T, H), (H,), (H,))
    found = [normal(*shape, dtype=dtype, seed=100 * seed + i) for i, shape in enumerate(shapes)]
    return [(3 * found[0] + 1).detach(), *found[1:]]


def mix_inputs(N, T, H, masks=(True, True), dtype=torch.float32, seed=0):
    shapes = ((N, T, H), (N, T, H), (N, T, H), (H,), (H, H), (H,), (H, H), (H,))
    found = [normal(*shape, dtype=dtype, seed=100 * seed + i) for i, shape in enumerate(shapes)]
    kept = [(normal(N, 1, H, seed=20 + i) > -1).to(dtype) / 0.8 if mask else None for i, mask in enumerate(masks)]
    return [*found, *kept]


def outcome(function, names, tensors, *others, needs=None):
    """The result and the gradients of those in `needs` (all of them by default)."""
    needs = names if needs is None else needs
    leaves = {k: x.detach().requires_grad_(k in needs) for k, x in zip(names, tensors, strict=False)}
    rest = tensors[len(names) :]
    y = function(*leaves.values(), *rest, *others)
    arriving = normal(*y.shape, dtype=y.dtype, seed=9)
    grads = torch.autograd.grad(y, [leaves[k] for k in needs], arriving) if needs else ()
    return Outcome(y.detach(), dict(zip(needs, grads, strict=True)), "out")


def wide(tensors):
    return [None if x is None else x.double() for x in tensors]


def check(ours, plain, names, draws, *others):
    """Within twice the error of PyTorch's own kernels, of all draws together: that of a single number is luck."""

    def together(function, change=list):
        found = [outcome(function, names, change(tensors), *others) for tensors in draws]
        grads = {name: torch.stack([x.grads[name] for x in found]) for name in names}
        return Outcome(torch.stack([x.loss for x in found]), grads, "out")

    exact = together(plain, wide)
    wrong = [d for d in deviations(together(ours), exact, errors(together(plain), exact)) if not d.ok]
    assert not wrong, wrong


def bits(outcome):
    return list(outcome.tensors().values())


def all_equal(a, b):
    return all(map(torch.equal, a, b))


# ---- numbers


@ISA
@pytest.mark.parametrize("H", WIDTHS)
def test_error_against_float64(H, isa):
    for (N, T), masks in zip(SHAPES, (*MASKS, MASKS[-1]), strict=True):
        seeds = range(1 + 16 // H)
        check(kernels.mix, kernels.composed_mix, MIX, [mix_inputs(N, T, H, masks, seed=i) for i in seeds])
        if H > 1:  # of one feature all that is left is rounding
            check(kernels.norm, kernels.composed_norm, NORM, [norm_inputs(N, T, H, seed=i) for i in seeds], 1e-5)


@ISA
def test_float64_and_every_width(isa):
    for H in range(1, kernels.MOST + 1):
        for ours, plain, names, tensors, others in (
            (kernels.mix, kernels.composed_mix, MIX, mix_inputs(3, 7, H, dtype=torch.float64), ()),
            (kernels.norm, kernels.composed_norm, NORM, norm_inputs(3, 7, H, torch.float64), (0.1,)),
        ):
            found, expected = (bits(outcome(f, names, tensors, *others)) for f in (ours, plain))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_feature_is_its_bias():
    x, weight, bias = norm_inputs(3, 50, 1)
    found = outcome(kernels.norm, NORM, (x, weight, bias), 1e-5)
    assert torch.equal(found.loss, bias.expand_as(x))
    assert not found.grads["input"].any() and not found.grads["weight"].any()


@ISA
def test_gelu_and_the_logistic_function(isa):
    """Of single numbers, far out too: V or G is 1 and all that is beside them 0."""
    zero, one = torch.zeros(1), torch.ones(1)
    s = torch.linspace(-12, 12, 4001).view(1, -1, 1)
    nothing = torch.zeros_like(s)
    found = kernels.mix(nothing, s, nothing, zero, one.view(1, 1), zero, zero.view(1, 1), 100 * one, None, None)
    exact = s.double() * 0.5 * torch.erfc(-s.double() * 0.5**0.5)  # x Φ(x), which keeps its digits below 0
    allowed = torch.finfo(torch.float32).eps * (6 + s.double().square())  # x² is rounded before e^(−x²/2)
    assert ((found - exact).abs() <= allowed * exact.abs() + 1e-36).all()
    s = torch.linspace(8, 80, 4001).view(1, -1, 1)  # where gelu(s) is s
    for sign in (1, -1):
        for shift in (0, 8, 40):  # through 0, and as far as that
            found = kernels.mix(
                nothing, s, nothing, zero, zero.view(1, 1), one, one.view(1, 1) * sign, -sign * shift * one, None, None
            )
            b = sign * (s.double() - shift)
            allowed = torch.finfo(torch.float32).eps * (6 + b.abs())
            assert ((found - b.sigmoid()).abs() <= allowed * b.sigmoid() + 1e-36).all()


@ISA
def test_what_is_not_finite_stays_in_its_row_and_its_sums(isa):
    for bad in (torch.nan, torch.inf, -torch.inf):
        for H, (ours, plain, names, make, others) in (
            (8, (kernels.mix, kernels.composed_mix, MIX, mix_inputs, ())),
            (3, (kernels.norm, kernels.composed_norm, NORM, norm_inputs, (1e-5,))),
        ):
            for name in names:
                tensors = make(2, 9, H, dtype=torch.float64)
                tensors[names.index(name)].flatten()[-2] = bad
                found, expected = (outcome(f, names, tensors, *others).tensors() for f in (ours, plain))
                for key, x in expected.items():
                    same = x.isfinite()
                    assert torch.equal(found[key].isfinite(), same), (bad, name, key)
                    torch.testing.assert_close(found[key][same], x[same])


def test_a_last_tile_that_is_not_whole_adds_nothing():
    """Lanes without a row hold gelu(0 · D), which is no number where D is infinite."""
    for name in ("D", "value_bias", "gate_bias"):
        for bad in (torch.inf, torch.nan):
            tensors = mix_inputs(1, 5, 4, dtype=torch.float64)
            tensors[MIX.index(name)][1] = bad
            found, expected = (outcome(f, MIX, tensors).tensors() for f in (kernels.mix, kernels.composed_mix))
            for key, x in expected.items():
                assert torch.equal(found[key].isnan(), x.isnan()), (name, bad, key)


@ISA
def test_the_same_bits_for_every_number_of_threads(isa):
    tensors, rows = mix_inputs(7, 1500, 8), norm_inputs(7, 1500, 8)
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append([*bits(outcome(kernels.mix, MIX, tensors)), *bits(outcome(kernels.norm, NORM, rows, 1e-5))])
    assert all(all_equal(found[0], x) for x in found[1:])


@ISA
def test_sums_of_many_rows_are_as_exact_as_those_of_few(isa):
    """More rows than one task sums in float32."""
    x, weight, bias = torch.full((1, 100_000, 2), 0.1), torch.ones(2), torch.zeros(2)
    x[..., 1] = -0.1
    y = kernels.norm(x, weight, bias.requires_grad_(), 1e-5)
    (found,) = torch.autograd.grad(y, bias, torch.full_like(y, 0.1))
    torch.testing.assert_close(found.double(), 100_000 * torch.full((2,), 0.1).double(), rtol=1e-6, atol=0)


def test_no_rows():
    for N, T in ((0, 4), (4, 0), (0, 0)):
        found = outcome(kernels.mix, MIX, mix_inputs(N, T, 3)), outcome(kernels.norm, NORM, norm_inputs(N, T, 3), 1e-5)
        for result in found:
            assert result.loss.shape == (N, T, 3) and not any(g.any() for g in result.grads.values())


def test_strides():
    tensors, rows = mix_inputs(3, 7, 5), norm_inputs(3, 7, 5)
    for names, given, function, others in ((MIX, tensors, kernels.mix, ()), (NORM, rows, kernels.norm, (1e-5,))):
        laid = [x if x is None else x.mT.contiguous().mT if x.dim() > 1 else x.repeat(2, 1).mT[:, 1] for x in given]
        assert all_equal(bits(outcome(function, names, given, *others)), bits(outcome(function, names, laid, *others)))


# ---- gradients


def test_gradcheck_of_both_orders():
    for masks in (MASKS[0], MASKS[3]):
        *tensors, inner, outer = mix_inputs(2, 3, 2, masks, torch.float64)
        leaves = [x.requires_grad_() for x in tensors]
        call = lambda *x, masks=(inner, outer): kernels.mix(*x, *masks)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    leaves = [x.requires_grad_() for x in norm_inputs(2, 3, 3, torch.float64)]
    call = lambda *x: kernels.norm(*x, 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_only_the_gradients_that_are_asked_for():
    for names, tensors, function, others in (
        (MIX, mix_inputs(3, 50, 5), kernels.mix, ()),
        (NORM, norm_inputs(3, 50, 5), kernels.norm, (1e-5,)),
    ):
        whole = outcome(function, names, tensors, *others)
        for name in names:
            alone = outcome(function, names, tensors, *others, needs=(name,))
            assert torch.equal(alone.grads[name], whole.grads[name])
        assert torch.equal(outcome(function, names, tensors, *others, needs=()).loss, whole.loss)


def test_opcheck():
    for masks in (MASKS[0], MASKS[3]):
        *tensors, inner, outer = mix_inputs(2, 3, 2, masks)
        torch.library.opcheck(kernels.mix.seen, (*[x.requires_grad_() for x in tensors], inner, outer))
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        for needs in ([True] * 7, [True, False] * 3 + [False]):
            arguments = (*[x.detach() for x in tensors], inner, outer, needs)
            torch.library.opcheck(kernels.mix_backward.seen, arguments, test_utils=tests)
    x, weight, bias = norm_inputs(2, 3, 2)
    torch.library.opcheck(kernels.norm.seen, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 0.1))
    arguments = (x.detach(), x.detach(), weight.detach(), 0.1, [True, False, True])
    torch.library.opcheck(kernels.norm_backward.seen, arguments, test_utils=tests)


# ---- in a block


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels behind the recurrence were taken."""
    made, mix = [], lru.mix
    monkeypatch.setattr(lru, "mix", lambda *x: made.append(1) or mix(*x))
    return made


def run(block, x, seed=5):
    """The output and all gradients, with the dropout of a seed."""
    torch.manual_seed(seed)
    y = block(x)
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], incoming(y))]


@pytest.mark.parametrize("leading", ((), (3,), (2, 3)))
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_a_block_is_what_its_modules_are(leading, dropout, calls, monkeypatch):
    torch.manual_seed(0)
    block = LRUBlock(5, 4, dropout=dropout, dtype=torch.float64)
    x = normal(*leading, 9, 5, dtype=torch.float64).requires_grad_()
    found = run(block, x)
    assert len(calls) == 1
    plain = copy.deepcopy(block)
    plain.lru.backend = "reference"
    for other in (plain, block):
        for a, b in zip(found, run(other, x), strict=True):
            torch.testing.assert_close(a, b)
        monkeypatch.setattr(lru, "MOST", 0)
    assert len(calls) == 1
    assert list(block.state_dict())[:2] == ["norm.weight", "norm.bias"] and len(block.state_dict()) == 14


def test_second_derivatives_of_a_block():
    """u reaches the result by way of y too: no path is counted twice."""
    torch.manual_seed(0)
    block, x = LRUBlock(3, 2, dtype=torch.float64), normal(2, 4, 3, dtype=torch.float64).requires_grad_()
    found = []
    for backend in ("native", "reference"):
        block.lru.backend = backend
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), [x, *block.parameters()], allow_unused=True)))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_what_the_kernels_do_not_do_the_modules_do(calls):
    x = normal(2, 4, 3)

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def hooked(block):
        block.gate.register_forward_hook(lambda module, inputs, y: y + 1)

    def replaced(block):
        block.value = Twice(3, 3)

    def unbiased(block):
        block.gate = torch.nn.Linear(3, 3, bias=False)

    def patched(block):
        forward = block.lru.forward
        block.lru.forward = lambda u: forward(u) + 1

    for change in (hooked, replaced, unbiased, patched):
        block = LRUBlock(3, 2)
        change(block)
        y = block(x)
        z = F.gelu(block.lru(block.norm(x)))
        assert torch.equal(y, x + block.value(z) * block.gate(z).sigmoid()) and not calls
    wide = LRUBlock(kernels.MOST + 1, 2)
    wide(normal(2, 4, kernels.MOST + 1))
    block = LRUBlock(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    with kd.use_backend("reference"):
        block(x)
    assert not calls
    with pytest.raises(RuntimeError, match="normalized_shape"):
        block(normal(2, 4, 5))


def test_without_gradients_the_same_bits(calls):
    block, x = LRUBlock(8, 4), normal(3, 20, 8)
    y = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), y)
    with torch.inference_mode():
        assert torch.equal(block(x), y)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(block(x), y) and len(calls) == 4


def test_compiled_and_fake(calls):
    torch.compiler.reset()
    model = LRUClassifier(2, 5, 3, 4, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, T in ((3, 4), (5, 6)):
        x = normal(N, T, 2, dtype=torch.float64)
        a, b = ((y, *torch.autograd.grad(y.square().sum(), model.parameters())) for y in (model(x), compiled(x)))
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
        assert y.shape == (5, 4)
        y.sum().backward()


def test_wrong_operands_are_refused():
    """By the compiled module, which must not read what is not there."""
    x, weight, bias = norm_inputs(2, 3, 4)
    with pytest.raises(ValueError, match="weight is 1 x 3, but must be 1 x 4"):
        kernels.norm(x, weight[:3], bias, 0.1)
    with pytest.raises(TypeError, match="bias has the wrong dtype"):
        kernels.norm(x, weight, bias.double(), 0.1)
    with pytest.raises(TypeError, match="input is bfloat16"):
        kernels.norm(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 0.1)
    good = mix_inputs(2, 3, 4)
    for name, wrong, message in (
        ("y", good[1][:1], "is 3 x 4, but must be|u is 6 x 4"),
        ("u", good[2][:, :2], "u is 4 x 4, but must be 6 x 4"),
        ("D", good[3][:3], "D is 1 x 3"),
        ("value", good[4][:3], "value is 3 x 4, but must be 4 x 4"),
        ("gate_bias", good[7].repeat(2), "gate_bias is 1 x 8"),
    ):
        tensors = list(good)
        tensors[MIX.index(name)] = wrong
        with pytest.raises(ValueError, match=message):
            kernels.mix(*tensors)
    with pytest.raises(ValueError, match="inner is 1 x 4, but must be 2 x 4"):
        kernels.mix(*good[:8], good[8][:1], None)
