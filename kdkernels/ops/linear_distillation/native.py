"""The linear distillation loss in C++ on the CPU, and who multiplies there.

The kernels are in csrc/cpu/linear_distillation.cpp, their formulas in csrc/include/kdkernels/linear_distillation.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import _native, products
from kdkernels.contract import without_autocast
from kdkernels.gemm import vendor_multiplies
from kdkernels.ops.linear_distillation import stream
from kdkernels.ops.linear_distillation.call import Call, Side

# Of logits: enough points that reading the heads for each block is cheap. bfloat16's products are faster, so that
# reading weighs more (with AMX, of Whisper's shape: 1.69 s at 96 MiB, 1.34 s at 192, 1.15 s at 384).
BLOCK_BYTES, NARROW_BLOCK_BYTES = 128 * 2**20, 256 * 2**20


def loss_and_gradients(call: Call, total: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Fill `total` and each gradient that has room (see `schema.linear_distillation`)."""
    sum_of_losses = torch.zeros((), dtype=torch.float64)
    losses = torch.empty(call.student.states.shape[0], dtype=call.dtype)
    _run(call, losses, grads, sum_of_losses)
    total.copy_(sum_of_losses)


def losses(call: Call, losses: Tensor) -> None:
    """Fill `losses` (N,) with weights · loss."""
    _run(call, losses, [None] * 5, None)


def _run(call: Call, losses: Tensor, grads: Sequence[Tensor | None], total: Tensor | None) -> None:
    stream.check_labels(call.labels, call.weights, call.student.width)
    with without_autocast():
        stream.run(call, Kernels(call, total), losses, grads)


class Kernels:
    """See `stream.Kernels`."""

    compacts = True
    in_place = True

    def __init__(self, call: Call, total: Tensor | None) -> None:
        self.module, self.threads, self.total = _native.module(), torch.get_num_threads(), total
        student = call.student
        self.block_bytes = NARROW_BLOCK_BYTES if student.states.dtype is torch.bfloat16 else BLOCK_BYTES
        # As autograd would: what is differentiated meets bfloat16 states and heads in bfloat16. Their own products
        # are exact, and sums are float32.
        self.rounds = student.weight is not None and student.weight.dtype is student.states.dtype is torch.bfloat16
        self.options = (call.divergence, call.mixture, call.temperature, call.beta, call.alpha)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        if a.dtype is b.dtype is out.dtype and vendor_multiplies(a.dtype, a.numel() * b.shape[1]):
            products.multiply(a, b, out, accumulate)
            return
        narrow = b.dtype is torch.bfloat16 and a.dtype is not torch.float64 and out.dtype is torch.float32
        rounds = narrow and (self.rounds or a.dtype is torch.bfloat16)
        self.module.multiply(a, b, out, accumulate, rounds, self.threads)

    def absorb(
        self, call: Call, teacher: Side, rows: Tensor, bias: Tensor | None, mixture: Tensor, first: bool
    ) -> None:
        self.module.linear_distillation_absorb(
            self.options, rows, bias, _numbers(teacher), call.excluded, mixture, first, self.threads
        )

    def diverge(
        self, call: Call, student: Tensor, teacher: Tensor, bias: Tensor | None, mixture: Tensor | None,
        labels: Tensor | None, weights: Tensor | None, losses: Tensor, gradient: Tensor | None,
    ) -> None:  # fmt: skip
        self.module.linear_distillation_diverge(
            self.options, student, call.student.bias, _numbers(call.student), teacher, bias,
            _numbers(call.teachers[-1]), call.excluded, mixture, labels, weights, call.divisor, losses, self.total,
            gradient is not None, self.threads,
        )  # fmt: skip


def _numbers(side: Side) -> tuple[float, float, float]:
    return side.scale, side.softcap, side.share
