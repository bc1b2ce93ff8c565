"""Dropout masks of layers with adapters: a function of a seed and a place, the same bits everywhere."""

import itertools
import shutil
import subprocess

import pytest
import torch
from conftest import ISAS, ROOT
from lora import BACKENDS, call, native_only, operands
from torch.utils.checkpoint import checkpoint

from kdkernels import _native
from kdkernels.ops.lora_linear import schema
from kdkernels.philox import draw_states, keep_mask, philox4x32, threshold


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
        _, S = schema.lora_linear.seen([x, eye, eye, eye, None], [1.0, p], state, "native")
        assert torch.equal((S != 0).double(), mask)
        ones, W = torch.ones(N, d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
        operands = ([ones], [S], [x, W, eye, eye, None], [1.0, p], state)
        dX, *_ = schema.lora_linear_backward(*operands, [True] + [False] * 4, "native")
        assert torch.equal((dX != 0).double(), mask)
        dA = schema.lora_linear_backward(*operands, [False, False, True, False, False], "native")[2]
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
    results[rank] = draw_states(1, torch.device("cpu")).tolist()
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


@native_only
@pytest.mark.parametrize("checkpointed", (False, True))
def test_compiled_code_draws_the_masks_of_eager_code(checkpointed):
    x, weight, lora_A, lora_B, bias = operands(dtype=torch.float32)

    def twice(x):  # two calls with the same arguments have different masks all the same
        return torch.stack([call(x, weight, lora_A, lora_B, bias, dropout_p=0.5) for _ in range(2)]).square()

    def step(x):
        y = checkpoint(twice, x, use_reentrant=False) if checkpointed else twice(x)
        return y, torch.autograd.grad(y.sum(), (x, lora_A, lora_B))

    torch.manual_seed(11)
    y, grads = step(x)
    assert not torch.equal(*y)
    compiled = torch.compile(lambda x: checkpoint(twice, x, use_reentrant=False) if checkpointed else twice(x))
    torch.manual_seed(11)
    z = compiled(x)
    torch.testing.assert_close(z, y)
    for a, b in zip(torch.autograd.grad(z.sum(), (x, lora_A, lora_B)), grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("state", ([-1, 3], [-5, 2**62], [12345678901234567, -5]))
def test_the_definition_compiles_to_the_same_words(state):
    state = torch.tensor(state)
    compiled = torch.compile(lambda s: keep_mask(s, 5, 9, 0.5), fullgraph=True)
    assert torch.equal(compiled(state), keep_mask(state, 5, 9, 0.5))
