"""The linear distillation loss on GPUs: the products are cuBLAS's or rocBLAS's, all between them Triton kernels.

    per block of points and teacher: y_k = t_k W_kᵀ (matmul) | but for the last `linear_distillation_absorb_kernel`:
        y_k -> the mixture | `linear_distillation_diverge_kernel`: the student's logits, the last teacher's and the
        mixture -> losses, the gradient of the student's | ∂x = gradient W, ∂W += gradientᵀ x (matmuls)

A row of logits is read twice for the forward KL divergence and its gradient, thrice for the others; logits that were
given are read where they are, and their gradient is written where it belongs. The gradient of products has the dtype of
states and head. Sums are float32, in a fixed order, without atomics; nothing waits for the device.
"""

from collections.abc import Sequence
from math import log, log1p

import torch
from torch import Tensor

from kdkernels import products
from kdkernels.launch import on_its_device, power_of_2
from kdkernels.ops.linear_distillation import kernels, stream
from kdkernels.ops.linear_distillation.call import Call, Side

BLOCK_BYTES = 2**30  # of logits: points enough that reading heads and adding to their gradients is cheap
# Columns at a time, and warps. At least 4 elements a thread: none belongs to two, so rows may be overwritten in place.
NARROWEST, WIDEST = 512, 2048
STAGES = 3


def loss_and_gradients(call: Call, total: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Fill `total` and each gradient that has room (see `schema.linear_distillation`)."""
    losses = total.new_empty(call.student.states.shape[0])
    _run(call, losses, grads)
    torch.sum(losses, 0, out=total)


def losses(call: Call, losses: Tensor) -> None:
    """Fill `losses` (N,) with weights · loss."""
    _run(call, losses, [None] * 5)


def _run(call: Call, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
    call = call._replace(student=_in_one_dtype(call.student), teachers=[_in_one_dtype(side) for side in call.teachers])
    with on_its_device(losses):
        stream.run(call, Kernels(call), losses, grads)


class Kernels:
    """See `stream.Kernels`."""

    compacts = False  # which points count is known to the device alone
    in_place = False

    def __init__(self, call: Call) -> None:
        self.block_bytes = BLOCK_BYTES
        self.V = V = call.student.width
        self.columns = min(max(power_of_2(V), NARROWEST), WIDEST)
        self.warps = 8 if self.columns == WIDEST else 4
        self.factor = 1 / call.temperature
        soft, hard = call.alpha != 0, call.alpha != 1
        of_all = call.temperature == 1 and call.excluded is None
        self.options = (soft, hard, hard and not (soft and of_all))
        self.numbers = (
            call.beta, log(call.beta), log1p(-call.beta), call.alpha * call.temperature**2 / call.divisor,
            call.alpha * call.temperature / call.divisor, (1 - call.alpha) / call.divisor,
        )  # fmt: skip

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        if a.dtype is not b.dtype:
            common = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(common), b.to(common)
        products.multiply(a, b, out, accumulate)

    def absorb(
        self, call: Call, teacher: Side, rows: Tensor, bias: Tensor | None, mixture: Tensor, first: bool
    ) -> None:
        kernels.absorb(
            (len(rows),), (rows, mixture, bias, call.excluded),
            (teacher.scale, teacher.softcap, *self._part(call, teacher)),
            (*rows.stride(), mixture.stride(0), _stride(bias)),
            (
                self.V, self._within(rows), self._within(mixture), call.mixture, first, teacher.softcap != 0,
                self.columns,
            ),
            self.warps, STAGES,
        )  # fmt: skip

    def diverge(
        self, call: Call, student: Tensor, teacher: Tensor, bias: Tensor | None, mixture: Tensor | None,
        labels: Tensor | None, weights: Tensor | None, losses: Tensor, gradient: Tensor | None,
    ) -> None:  # fmt: skip
        own, last = call.student, call.teachers[-1]
        rows = (student, teacher, mixture, gradient)
        kernels.diverge(
            (len(student),), (*rows, own.bias, bias, call.excluded, labels, weights, losses),
            (
                own.scale, own.softcap, last.scale, last.softcap, self.factor, self.factor if mixture is None else 1.0,
                *self._part(call, last), *self.numbers,
            ),
            (
                *student.stride(), *teacher.stride(),
                *map(_stride, (mixture, gradient, own.bias, bias, labels, weights)),
            ),
            (
                self.V, *map(self._within, rows), call.divergence, "none" if mixture is None else call.mixture,
                *self.options, own.softcap != 0, last.softcap != 0, self.columns,
            ),
            self.warps, STAGES,
        )  # fmt: skip

    def _part(self, call: Call, teacher: Side) -> tuple[float, float]:
        """Factor and offset of a teacher's part in the mixture."""
        if call.mixture == "geometric":
            return teacher.share * self.factor, 0.0
        return self.factor, log(teacher.share)

    def _within(self, x: Tensor | None) -> int:
        """Columns of a row that may be touched: all of its last vector, where what follows V belongs to nobody."""
        V = self.V
        wide = stream.padded(V)
        if x is None or wide == V or x.stride(1) != 1 or x.stride(0) < wide:
            return V
        last = x.storage_offset() + (len(x) - 1) * x.stride(0) + wide
        return wide if last * x.element_size() <= x.untyped_storage().nbytes() else V


def _in_one_dtype(side: Side) -> Side:
    """States and head that differ in dtype in their common one: the head once, not for each block."""
    if side.weight is None or side.weight.dtype is side.states.dtype:
        return side
    common = torch.promote_types(side.states.dtype, side.weight.dtype)
    return side._replace(states=side.states.to(common), weight=side.weight.to(common))


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
