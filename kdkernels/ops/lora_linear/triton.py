"""The low-rank adapter on GPUs: the base layer's matmuls are cuBLAS's or rocBLAS's, the rest is Triton.

    S = x̂ Aᵀ         `lora_linear_project_kernel`   x is read once for all siblings
    Y = x Wᵀ + b + α S Bᵀ
                     `lora_linear_expand_kernel`    as `fuses` decides: a matmul with the adapter in its accumulators,
                                                    or a pass over cuBLAS's x Wᵀ, which is rounded once more
    dS = α dY B, dB = α dYᵀ S
                     `lora_linear_adapter_kernel`   one pass over dY; at high ranks project and reduce, a pass each
    dA = dSᵀ x̂       `lora_linear_reduce_kernel`    x is read once for all siblings
    dX = Σ dY W + mask ⊙ dS A / (1 − p)
                     `lora_linear_expand_kernel`    a pass over cuBLAS's Σ dY W, for all siblings

Sums that many programs share end in `lora_linear_sum_kernel`, one launch for all that are known by then. What kernels
write is contiguous, as small operands are; so strides are those of activations and weights alone.

Masks are drawn in the kernels (kdkernels.philox), from states that stay on the device: nothing waits for it. Sums are
float32, in an order that depends on the shapes alone, without atomics: sums over points are first of chunks, then of
the chunks' results.

Precision: two operands of the same 16-bit dtype meet as they are. Otherwise both are widened to float32 in registers,
and multiplied as float32 matmuls are (`torch.set_float32_matmul_precision`) where the result is float32: with float32
adapters beside a bfloat16 base too, since their gradients keep those digits, and eager's do. Where the result has 16
bits, tf32 is enough: it holds every bit of the 16-bit operand and as many of S and dS as float16 has, which is what
eager rounds them to. AMD's matrix units multiply float32 as it is.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.contract import resolved
from kdkernels.launch import cdiv, on_its_device, power_of_2
from kdkernels.ops.lora_linear import kernels
from kdkernels.ops.lora_linear.call import NUMBERS, TENSORS, gradient_room, readable, room, sharing
from kdkernels.ops.lora_linear.plan import (
    ADAPTER,
    MAX_RANK,
    Mask,
    adapter_plan,
    batches,
    dropping,
    expand_plan,
    project_plans,
    reduce_plans,
    scaled,
)  # fmt: skip

LOSS = 0.5  # of Triton's matmul against cuBLAS's, as a share of its time
PROGRAMS = 512  # enough to fill a large GPU: sums over points are cut until there are as many
SUM = (16, 128)  # summands and columns at a time


def fuses(d_in: int, dtype: torch.dtype) -> bool:
    """Whether x Wᵀ + b + α S Bᵀ is one Triton matmul, or cuBLAS's x Wᵀ and a pass over Y.

    The pass reads and writes Y: 2 · size bytes for each element. Triton's matmul is taken to need half as long again as
    cuBLAS's 2 · d_in FLOPs: LOSS · 2 · d_in. With the ratio of a GPU's FLOPs to its bytes the smaller one is found: the
    fused matmul for small d_in, where both are bound by memory. No GPU has measured this: LOSS is a guess, the ratios
    are an A100's data sheet's. Tests run both ways.
    """
    ratio = 160 if dtype.itemsize == 2 else 80 if _precision(dtype) == "tf32" else 10
    return LOSS * 2 * d_in < 2 * dtype.itemsize * ratio


def forward(tensors: Sequence[Tensor | None], numbers: Sequence[float], states: Tensor | None) -> list[Tensor]:
    """Y of each layer, then S (see `schema.lora_linear`)."""
    found = room(tensors)
    outputs, projected = found[: len(found) // 2], found[len(found) // 2 :]
    input, weights, lora_A, lora_B, biases, scalings, rates = _columns(readable(tensors), numbers)
    with on_its_device(input):
        _project(input, lora_A, projected, dropping(rates), states, False)
        for same in sharing(weights):
            W = weights[same[0]]
            fused = len(same) == 1 and fuses(W.shape[1], input.dtype)
            # of those that share a product the last is finished in place
            base = input if fused else torch.mm(input, W.t(), out=outputs[same[-1]])
            for k in same:
                adapter = [projected[k]], [lora_B[k]], outputs[k], scaled(scalings[k])
                _expand(base, W if fused else None, biases[k], *adapter, None, True)
    return found


def backward(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    states: Tensor | None,
    projected: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `tensors` that are needed."""
    grads = gradient_room(tensors, needs)
    arriving = [resolved(dY) for dY in grad_outputs]
    input, weights, lora_A, lora_B, _, scalings, rates = _columns(readable(tensors), numbers)
    grad_input, grad_weights, grad_A, grad_B, grad_biases, *_ = _columns(grads, numbers)
    K = range(len(weights))
    with on_its_device(input):
        points: list[Tensor | None] = [
            None if grad_input is None and grad_A[k] is None else torch.empty_like(projected[k]) for k in K
        ]  # each dS
        first, later = Sums(), Sums()  # what the next kernels read, and what nobody here does
        for k, dY in enumerate(arriving):
            _adapter(dY, lora_B[k], projected[k], scalings[k], points[k], grad_B[k], first, later)
            if (dW := grad_weights[k]) is not None:
                torch.mm(dY.t(), input, out=dW)
            if (db := grad_biases[k]) is not None:
                torch.sum(dY, 0, out=db)
        first.run()
        masks = dropping(rates)
        trained = [k for k in K if grad_A[k] is not None]
        dA, of_dA = [grad_A[k] for k in trained], tuple([masks[k] for k in trained])
        _reduce(input, [points[k] for k in trained], dA, of_dA, states, False, later)
        later.run()
        if grad_input is not None:
            for i, same in enumerate(sharing(weights)):
                dY = arriving[same[0]]
                for k in same[1:]:
                    dY = dY + arriving[k]
                W = weights[same[0]]
                if i == 0:
                    torch.mm(dY, W, out=grad_input)
                else:
                    torch.addmm(grad_input, dY, W, out=grad_input)
            for batch in batches(len(weights), kernels.MAX_SIBLINGS):
                _expand(grad_input, None, None, points[batch], lora_A[batch], grad_input, masks[batch], states, False)
    return grads


def _columns(tensors: Sequence[Any], numbers: Sequence[float]) -> tuple[Any, ...]:
    """The input, then what each field of `LoRA` is in every layer."""
    fields = *(tensors[i::TENSORS] for i in range(1, 1 + TENSORS)), *(numbers[i::NUMBERS] for i in range(NUMBERS))
    return tensors[0], *map(tuple, fields)


class Sums:
    """Sums that programs of other kernels have left in parts, to be finished together."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def room(self, out: Tensor, count: int) -> Tensor:
        """Room for `count` summands of a contiguous `out`: itself for one."""
        if count == 1:
            return out
        parts = out.new_empty((count, *out.shape), dtype=torch.float32)
        self.pairs.append((parts, out))
        return parts

    def run(self) -> None:
        """Finish them."""
        BLOCK_N, BLOCK_D = SUM
        for batch in batches(len(self.pairs), kernels.MAX_SUMS):
            pairs = self.pairs[batch]
            sizes, counts = [out.numel() for _, out in pairs], [len(x) for x, _ in pairs]
            tensors = *_padded([x for x, _ in pairs], None, 8), *_padded([out for _, out in pairs], None, 8)
            scalars = *_padded(counts, 0, 8), *_padded(sizes, 0, 8)
            steps = power_of_2(cdiv(max(counts), BLOCK_N))
            grid = (cdiv(max(sizes), BLOCK_D), len(pairs))
            kernels.sum(grid, tensors, scalars, (), (len(pairs), steps, BLOCK_N, BLOCK_D), 4, 2)


def _precision(*dtypes: torch.dtype) -> str:
    """How operands widened to float32 are multiplied, for results of these dtypes."""
    exact = torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def _padded(values: Sequence[Any], filling: Any, count: int = kernels.MAX_SIBLINGS) -> list[Any]:
    return [*values, *[filling] * (count - len(values))]


def _flat(tensors: Sequence[Any]) -> list[Any]:
    """Small operands, contiguous."""
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def _project(
    x: Tensor,
    matrices: Sequence[Any],
    outs: Sequence[Any],
    masks: tuple[Mask, ...],
    states: Tensor | None,
    transposed: bool,
) -> None:
    """out = scale (mask ⊙ x) matrixᵀ for each: (N, D), (r, D) or its transpose -> (N, r)."""
    N, D = x.shape
    m = _flat(matrices)
    precision = _precision(x.dtype, *[one.dtype for one in m])
    for plan in project_plans(N, D, tuple([out.shape[1] for out in outs]), masks, transposed, precision):
        k, missing = plan.siblings, plan.missing
        tensors = (x, *m[k], *missing, *outs[k], *missing, states if plan.drops else None)
        kernels.project(plan.grid, tensors, plan.scalars, x.stride(), *plan[-3:])


def _reduce(
    x: Tensor,
    matrices: Sequence[Any],
    outs: Sequence[Any],
    masks: tuple[Mask, ...],
    states: Tensor | None,
    transposed: bool,
    sums: Sums,
) -> None:
    """out = scale matrixᵀ (mask ⊙ x) for each: (N, D), (N, r) -> (r, D) or its transpose."""
    N, D = x.shape
    m = _flat(matrices)
    precision = _precision(*[out.dtype for out in outs])
    for plan in reduce_plans(N, D, tuple([one.shape[1] for one in m]), masks, transposed, precision, PROGRAMS):
        k, missing = plan.siblings, plan.missing
        parts = [sums.room(out, plan.grid[0]) for out in outs[k]]
        tensors = (x, *m[k], *missing, *parts, *missing, states if plan.drops else None)
        kernels.reduce(plan.grid, tensors, plan.scalars, x.stride(), *plan[-3:])


def _adapter(
    dY: Tensor, B: Tensor, S: Tensor, scaling: float, dS: Tensor | None, dB: Tensor | None, first: Sums, later: Sums
) -> None:
    """dS = α dY B, dB = α dYᵀ S: whichever there is room for."""
    N, D = dY.shape
    r = B.shape[1]
    # where the result is dS, it is what the gradients of A and B are that counts: their digits
    precision = _precision(dY.dtype, B.dtype)
    tile = ADAPTER[precision]
    # at once they leave dB of every block of points, r floats for BLOCK_N elements of dY, to be written and read
    once = r <= MAX_RANK and 2 * 4 * r <= tile.BLOCK_N * dY.element_size()
    if dS is None or dB is None or not once:
        if dS is not None:
            _project(dY, [B], [dS], scaled(scaling), None, True)
        if dB is not None:
            _reduce(dY, [S], [dB], scaled(scaling), None, True, later)
        return
    grid, constants = adapter_plan(N, D, r, precision, _precision(B.dtype), PROGRAMS)
    blocks, bands = grid
    tensors = (dY, *_flat([B, S]), first.room(dS, bands), later.room(dB, blocks))
    kernels.adapter(grid, tensors, (N, float(scaling)), dY.stride(), constants, tile.num_warps, tile.num_stages)


def _expand(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    points: Sequence[Any],
    matrices: Sequence[Any],
    out: Tensor,
    masks: tuple[Mask, ...],
    states: Tensor | None,
    transposed: bool,
) -> None:
    """out = x weightᵀ + bias + Σ mask ⊙ (scale points matrix): (N, r), (r, D) or its transpose -> (N, D)."""
    ranks = tuple([p.shape[1] for p in points])
    plan = expand_plan(*out.shape, x.shape[1], weight is not None, ranks, masks, transposed, _precision(x.dtype))
    kernels.expand(
        plan.grid,
        (
            x, weight, None if bias is None else bias.contiguous(), *_flat(points), *plan.missing,
            *_flat(matrices), *plan.missing, out, states if plan.drops else None,
        ),
        plan.scalars, (*x.stride(), *((0, 0) if weight is None else weight.stride())), *plan[-3:],
    )  # fmt: skip
