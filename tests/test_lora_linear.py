"""`lora_linear` and `lora_linear_group`: against float64 and autograd, under transforms, on every instruction set."""

import itertools
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import _native
from kdkernels.ops.lora_linear import api, reference, schema
from kdkernels.philox import keep_mask, philox4x32, threshold
from kdkernels.testing.check import FLOAT64_SHARE
from kdkernels.testing.lora_linear.checks import QUICK, VARIANTS, compare_case
from kdkernels.testing.lora_linear.inputs import NAMES, exact, make_inputs, ours

native_only = pytest.mark.native
BACKENDS = ("reference", pytest.param("native", marks=native_only))
ISAS = ("avx512", "avx2", "baseline")


@pytest.fixture
def isa(request):
    """One instruction set, for this test."""
    module = _native.module()
    if request.param not in module.isas():
        pytest.skip(f"this processor or build has no {request.param}")
    before = module.isa()
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)


def operands(N=7, d_in=12, d_out=9, r=3, dtype=torch.float64, grad=True):
    draw = torch.Generator().manual_seed(3)
    shapes = ((N, d_in), (d_out, d_in), (r, d_in), (d_out, r), (d_out,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def call(x, weight, lora_A, lora_B, bias, **options):
    return kd.lora_linear(x, weight, lora_A, lora_B, bias=bias, scaling=1.5, **options)


# ---- numbers


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("case", QUICK)
def test_error_against_float64(case, dtype, variant, isa):
    if "adapter_dtype" in VARIANTS[variant] and dtype.itemsize >= 4:
        pytest.skip("adapters in float32 beside a narrower base")
    wrong = [d for d in compare_case({"dtype": dtype} | VARIANTS[variant] | QUICK[case], "native") if not d.ok]
    assert not wrong, wrong


@native_only
@pytest.mark.parametrize("p", (0.0, 0.4))
@pytest.mark.parametrize("bias", (False, True))
def test_every_combination_of_gradients_in_float64(bias, p):
    names = ("input", *NAMES) if bias else ("input", *NAMES[:3])
    for count in range(len(names) + 1):
        for needs in itertools.combinations(names, count):
            inputs = make_inputs(bias=bias, dropout_p=p, needs=needs, dtype=torch.float64)
            found, target = ours(inputs, "native"), exact(inputs)
            assert found.grads.keys() == target.grads.keys()
            for name, x in target.tensors().items():
                assert (found.tensors()[name] - x).norm() <= 1e-10 * x.norm(), (needs, name)


@native_only
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_base_products_of_the_vendor(monkeypatch, p):
    """Where the processor multiplies bfloat16, torch forms x Wᵀ and dY W, and ours adds the rest."""
    from kdkernels.ops.lora_linear import native

    monkeypatch.setattr(native, "_vendor_multiplies", lambda dtype: True)
    for dtype, case in itertools.product((torch.float32, torch.bfloat16), QUICK.values()):
        wrong = [d for d in compare_case({"dtype": dtype, "dropout_p": p} | case, "native") if not d.ok]
        assert not wrong, wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_gradcheck(backend, p):
    def seeded(*tensors):
        torch.manual_seed(1)
        return call(*tensors, dropout_p=p, backend=backend)

    assert torch.autograd.gradcheck(seeded, operands())


def test_the_reference_is_differentiable_twice():
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, backend="reference"), operands(3, 4, 3, 2))


@native_only
def test_a_second_derivative_of_native_is_an_error_that_says_what_to_do():
    tensors = operands()
    (grad,) = torch.autograd.grad(call(*tensors, backend="native").square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@native_only
def test_the_same_bits_for_every_thread_count_and_run():
    inputs = make_inputs(N=700, d_in=300, d_out=270, r=9, K=2, dropout_p=0.2)
    torch.set_num_threads(1)
    expected = ours(inputs, "native").tensors()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        for name, x in ours(inputs, "native").tensors().items():
            assert torch.equal(x, expected[name]), (threads, name)


@native_only
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("shared", (False, True))
def test_a_group_is_its_layers(shared, p):
    """Outputs and gradients of a group equal those of single calls with the same masks."""
    inputs = make_inputs(K=3, shared=shared, dropout_p=p)
    together = ours(inputs, "native").tensors()
    for k in range(3):
        single = replace(inputs, layers=inputs.layers[k : k + 1], states=inputs.states[k : k + 1])
        expected = together["output" if k == 0 else f"output {k}"]
        torch.testing.assert_close(ours(single, "native").loss, expected, rtol=1e-5, atol=1e-6)


# ---- masks


def test_philox_is_the_published_one():
    """Test vectors of the authors' Random123 library (kat_vectors)."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in vectors:
        found = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(word) for word in found) == words
        if _native.why_not() is None:
            assert tuple(_native.module().philox4x32(counter, key)) == words


@native_only
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize(("N", "d"), ((1, 1), (5, 7), (70, 130), (300, 1030)))
def test_masks_are_the_same_bits_everywhere(N, d, dtype, isa):
    """With A = 1 and x = 1 the projected points are the mask itself, in forward and in both places of backward."""
    for seed, offset, p in ((1, 2, 0.1), (-(2**63), 2**63 - 1, 0.5), (12345678901234, -1, 0.93)):
        state = torch.tensor([[seed, offset]])
        mask = keep_mask(state[0], N, d, p).to(torch.float64)
        x, eye = torch.ones(N, d, dtype=dtype), torch.eye(d, dtype=dtype)
        _, S = schema.lora_linear(x, [eye], [x.new_empty(0)], [eye], [eye], [1.0], [p], state, "native")
        assert torch.equal((S != 0).double(), mask)
        ones, W = torch.ones(N, d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
        operands = ([ones], x, [S], [W], [x.new_empty(0)], [eye], [eye], [1.0], [p], state)
        dX, *_ = schema.lora_linear_backward(*operands, [True] + [False] * 4, "native")
        assert torch.equal((dX != 0).double(), mask)
        dA = schema.lora_linear_backward(*operands, [False, False, False, True, False], "native")[3]
        expected = mask.sum(0).expand(d, d) / (1 - p)
        torch.testing.assert_close(dA.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("p", (0.05, 0.1, 0.5, 0.9))
def test_masks_look_random(p):
    N, d = 600, 520
    masks = [keep_mask(torch.tensor(state), N, d, p).double() for state in ((1, 0), (2, 0), (1, 1), (1, 2**40))]
    count, variance = N * d, p * (1 - p)
    bound = 5 / count**0.5  # five standard deviations of a correlation
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 5 * (variance / count) ** 0.5
        for axis, n in ((0, d), (1, N)):  # no row or column is favoured
            assert ((mask.mean(axis) - (1 - p)).abs() < 6 * (variance / (count / n)) ** 0.5).all()
        centred = (mask - (1 - p)) / variance**0.5
        for shift in ((0, 1), (0, 2), (0, 4), (1, 0), (1, 1)):
            assert abs((centred * centred.roll(shift, (0, 1))).mean()) < bound
    for a, b in itertools.combinations(masks, 2):  # seeds and offsets are independent
        assert abs(((a - (1 - p)) * (b - (1 - p))).mean() / variance) < bound


def test_the_threshold_of_a_probability():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert threshold(1 - 2**-40) == 2**32 - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_follow_the_generator(backend):
    tensors = operands(20, 40, 30, 4)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append([call(*tensors, dropout_p=0.5, backend=backend) for _ in range(2)])  # two layers
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])
    assert not torch.equal(outputs[0][0], outputs[2][0])


def test_backends_draw_the_same_masks():
    if _native.why_not():
        pytest.skip(_native.why_not())
    tensors = operands(20, 40, 30, 4)
    found = []
    for backend in ("reference", "native"):
        torch.manual_seed(5)
        found.append(call(*tensors, dropout_p=0.5, backend=backend))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_recomputed_checkpoint_has_the_same_mask(backend, use_reentrant):
    tensors = operands(20, 40, 30, 4)

    def step(*t):
        return call(*t, dropout_p=0.5, backend=backend)

    grads = []
    for function in (step, lambda *t: checkpoint(step, *t, use_reentrant=use_reentrant)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.manual_seed(9)
        function(*leaves).square().sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(map(torch.equal, *grads))


def rank_mask(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    results[rank] = api.draw_states(1, torch.device("cpu")).tolist()
    torch.distributed.destroy_process_group()


def test_ranks_with_one_seed_draw_different_masks(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(rank_mask, (tmp_path / "store", results), nprocs=2)
        states = [torch.tensor(results[rank][0]) for rank in range(2)]
    masks = [keep_mask(state, 50, 50, 0.5) for state in states]
    assert not torch.equal(*masks)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_philox_compiles_for_gpus(tmp_path):
    source = tmp_path / "philox.cu"
    source.write_text(
        '#include "philox.h"\n'
        "__global__ void draw(kd::PhiloxBlock* out, unsigned key) {\n"
        "  out[threadIdx.x] = kd::philox4x32({{threadIdx.x, 0, 0, 0}}, key, 0);\n}\n"
    )
    for sm in (80, 90, 100, 120):
        command = ["nvcc", "-std=c++20", f"-arch=sm_{sm}", f"-I{ROOT / 'csrc/common'}", "-cubin", "-Xptxas=-v"]
        command += ["-o", str(tmp_path / "philox.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr


# ---- what is kept and what is computed


@native_only
@pytest.mark.parametrize("p", (0.0, 0.1))
def test_bytes_kept_for_backward(p):
    N, d_in, d_out, r = 64, 96, 80, 4
    x, weight, lora_A, lora_B, bias = operands(N, d_in, d_out, r, torch.float32)
    weight, bias = weight.detach(), bias.detach()
    parameters = {t.data_ptr() for t in (weight, lora_A, lora_B, bias)}
    kept = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x, weight, lora_A, lora_B, bias, dropout_p=p, backend="native")
    assert sum(kept.values()) <= x.numel() * 4 + N * r * 4 + N * d_in // 8


@native_only
def test_only_requested_gradients_are_computed(monkeypatch):
    from kdkernels.ops.lora_linear import native

    rooms = []
    backward = native.backward

    def spy(*arguments):
        rooms.append([arguments[9], *(group[0] for group in arguments[10:])])
        backward(*arguments)

    monkeypatch.setattr(native, "backward", spy)
    for wanted, room in enumerate((0, 1, 3, 4, 2)):  # input, weight, lora_A, lora_B and bias among backward's rooms
        tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands())]
        call(*tensors, backend="native").sum().backward()
        assert [i for i, found in enumerate(rooms.pop()) if found is not None] == [room]


# ---- transforms


@native_only
def test_opcheck():
    for K, p in ((1, 0.0), (2, 0.3)):
        inputs = make_inputs(K=K, dropout_p=p)
        weights, lora_A, lora_B, biases, scalings, dropout_p = zip(*inputs.layers, strict=True)
        groups = [[t.requires_grad_() for t in group] for group in (weights, biases, lora_A, lora_B)]
        states = inputs.states if p else inputs.states[:0]
        arguments = (inputs.input.requires_grad_(), *groups, list(scalings), list(dropout_p), states, "native")
        torch.library.opcheck(schema.lora_linear, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_compiled_as_one_graph_with_dynamic_shapes(backend, p):
    def step(*t):
        return call(*t, dropout_p=p, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (5, 8):
        tensors = operands(N)
        grads = []
        for function in (step, compiled):
            torch.manual_seed(4)
            grads.append(torch.autograd.grad(function(*tensors).square().sum(), tensors))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native_only
def test_compiled_by_inductor():
    tensors = operands(dtype=torch.float32)
    compiled = torch.compile(lambda *t: call(*t, backend="native"), fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors).square().sum(), tensors),
        torch.autograd.grad(call(*tensors, backend="native").square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_base_as_linear_does(backend):
    tensors = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*tensors, backend=backend)
        assert y.dtype is F.linear(tensors[0], tensors[1]).dtype is torch.bfloat16
        z = call(*(t.double() for t in tensors), backend=backend)
    assert z.dtype is torch.float64
    grads = torch.autograd.grad(y.float().sum(), tensors)
    assert all(g.dtype is torch.float32 for g in grads)
    torch.testing.assert_close(y.float(), call(*tensors, backend=backend), rtol=5e-2, atol=5e-2)


# ---- shapes, strides, values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", ((), (0,), (2, 0), (4,), (2, 3), (1, 1, 5)))
def test_leading_dimensions(backend, leading):
    _, weight, lora_A, lora_B, bias = operands()
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    y = call(x, weight, lora_A, lora_B, bias, backend=backend)
    assert y.shape == (*leading, 9)
    torch.testing.assert_close(y, F.linear(x, weight + 1.5 * lora_B @ lora_A, bias))
    for grad, t in zip(torch.autograd.grad(y.sum(), (x, lora_A, lora_B)), (x, lora_A, lora_B), strict=True):
        assert grad.shape == t.shape and grad.isfinite().all()


@native_only
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_strides_do_not_matter(dtype):
    tensors = operands(9, 33, 21, 5, dtype)

    def layouts(t):
        yield t
        yield t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2]
        yield torch.cat([t, t], -1)[..., : t.shape[-1]]

    def results(xs, incoming):
        leaves = [x.detach().requires_grad_() for x in xs]
        torch.manual_seed(2)
        y = call(*leaves, dropout_p=0.3, backend="native")
        return [y, *torch.autograd.grad(y, leaves, incoming)]

    incoming = torch.randn(9, 21).to(dtype)
    expected = results(tensors, incoming)
    for xs in zip(*(layouts(t) for t in tensors), strict=True):
        for dY in (incoming, incoming.T.contiguous().T):
            for a, b in zip(results(xs, dY), expected, strict=True):
                assert torch.equal(a, b)
    row = torch.randn(1, 33).to(dtype)
    a, b = (
        results([x, *tensors[1:]], torch.ones(1, 1, dtype=dtype).expand(9, 21))
        for x in (row.expand(9, 33), row.repeat(9, 1))
    )
    assert all(map(torch.equal, a, b))


@native_only
def test_a_nan_stays_in_its_row():
    x, *rest = operands(8, dtype=torch.float32)
    with torch.no_grad():
        x[3, 5] = torch.nan
    y = call(x, *rest, backend="native")
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@native_only
def test_a_dropped_element_does_not_exist_for_the_adapter():
    """NaN at a dropped place reaches Y through the base alone."""
    state = torch.tensor([[3, 4]])
    mask = keep_mask(state[0], 6, 8, 0.5)
    x = torch.where(mask, 1.0, torch.nan)
    eye, zeros = torch.eye(8), torch.zeros(8, 8)
    _, S = schema.lora_linear(x, [zeros], [x.new_empty(0)], [eye], [eye], [1.0], [0.5], state, "native")
    assert torch.equal(S, 2.0 * mask)


def test_bfloat16_is_rounded_once():
    x, weight, lora_A, lora_B, bias = operands(40, 64, 48, 8, torch.bfloat16, grad=False)
    exact = reference.adapted(*(t.double() for t in (x, weight, bias, lora_A, lora_B)), 1.5, 0.0, None)
    for backend in ("reference", "native") if _native.why_not() is None else ("reference",):
        y = call(x, weight, lora_A, lora_B, bias, backend=backend)
        assert y.dtype is torch.bfloat16
        off = (y.double() - exact).abs() > 2**-8 * exact.abs() * (1 + 2 * FLOAT64_SHARE) + 1e-4
        assert not off.any()


@native_only
def test_a_sign_that_torch_keeps_in_the_view():
    draw = torch.Generator().manual_seed(0)

    def negative(*shape):
        return torch.view_as_complex(torch.randn(*shape, 2, generator=draw)).conj().imag

    x, weight, dY = negative(9, 6), negative(5, 6), negative(9, 5)
    lora_A, lora_B = torch.randn(2, 6, generator=draw), torch.randn(5, 2, generator=draw)
    assert x.is_neg() and weight.is_neg() and dY.is_neg()
    results = []
    for backend in ("native", "reference"):
        leaf = x.detach().requires_grad_()
        y = kd.lora_linear(leaf, weight, lora_A, lora_B, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, dY)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@native_only
def test_a_scaling_that_becomes_dynamic():
    x, weight, lora_A, lora_B, _ = operands(grad=False)
    compiled = torch.compile(
        lambda x, s: kd.lora_linear(x, weight, lora_A, lora_B, scaling=s), fullgraph=True, backend="aot_eager"
    )
    for scaling in (1.0, 2.0, 3.5):
        expected = kd.lora_linear(x, weight, lora_A, lora_B, scaling=scaling)
        torch.testing.assert_close(compiled(x, scaling), expected)


def test_torch_func_takes_the_reference():
    x, weight, lora_A, lora_B, _ = operands(grad=False)
    grad = torch.func.grad(lambda x: kd.lora_linear(x, weight, lora_A, lora_B).sum())(x)
    torch.testing.assert_close(grad, (weight + lora_B @ lora_A).sum(0).expand_as(x))
    each = torch.func.vmap(lambda x: kd.lora_linear(x, weight, lora_A, lora_B))(x)
    torch.testing.assert_close(each, kd.lora_linear(x, weight, lora_A, lora_B, backend="reference"))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: kd.lora_linear(x, weight, lora_A, lora_B, backend="native").sum())(x)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"lora_B": torch.randn(9, 4)}, ValueError, r"lora_B has shape \(9, 4\).*r = 3, as in lora_A"),
        ({"lora_A": torch.randn(3, 11)}, ValueError, r"lora_A has shape \(3, 11\).*d_in = 12"),
        ({"bias": torch.randn(8)}, ValueError, r"bias has shape \(8\).*d_out = 9"),
        ({"weight": torch.randn(9, 12, 1)}, ValueError, "weight has shape"),
        ({"input": torch.ones(7, 12, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
        ({"input": [1.0]}, TypeError, "input is list"),
        ({"weight": torch.randn(9, 12).bfloat16()}, TypeError, "weight has dtype torch.bfloat16.*torch.float32"),
        ({"bias": torch.randn(9).double()}, TypeError, "bias has dtype torch.float64"),
        ({"lora_A": torch.randn(3, 12, device="meta")}, ValueError, "lora_A is on meta"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0, but must be at least 0 and below 1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p is str"),
        ({"scaling": float("inf")}, ValueError, "scaling is inf"),
        ({"scaling": 10**400}, ValueError, "scaling is 1000"),
        ({"lora_A": torch.randn(0, 12), "lora_B": torch.randn(9, 0)}, ValueError, "rank of at least 1"),
        ({"scaling": None}, TypeError, "scaling is NoneType"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"backend": "triton"}, ValueError, "triton"),
    ),
)
def test_wrong_arguments_are_named(change, error, message):
    x, weight, lora_A, lora_B, bias = operands(dtype=torch.float32, grad=False)
    arguments = {"input": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias} | change
    with pytest.raises(error, match=message):
        kd.lora_linear(**arguments)


def test_a_group_says_which_layer_is_wrong():
    x, weight, lora_A, lora_B, _ = operands(dtype=torch.float32, grad=False)
    good, bad = kd.LoRA(weight, lora_A, lora_B), kd.LoRA(weight, lora_A, lora_B[:, :2])
    with pytest.raises(ValueError, match=r"layers\[1\]\.lora_B"):
        kd.lora_linear_group(x, [good, bad])
    with pytest.raises(ValueError, match="layers is empty"):
        kd.lora_linear_group(x, [])
    assert len(kd.lora_linear_group(x, [good, tuple(good)])) == 2


@native_only
def test_a_forward_mode_derivative_is_refused_not_lost():
    tensors = operands()
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(
            lambda x: call(x, *tensors[1:], backend="native"), (tensors[0].detach(),), (torch.ones_like(tensors[0]),)
        )


@native_only
def test_explain_shows_what_would_run():
    tensors = operands()
    explanation = kd.explain(kd.lora_linear, *tensors[:4], bias=tensors[4], dropout_p=0.1)
    assert explanation.backend == "native" and explanation.method == "fused"
    costs = {cost.method: cost for cost in explanation.costs}
    assert costs["base"].bytes < costs["fused"].bytes < costs["eager"].bytes
    assert costs["base"].flops < costs["fused"].flops == costs["eager"].flops
