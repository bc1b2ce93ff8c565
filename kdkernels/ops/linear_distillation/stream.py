"""The loss and its gradients, block by block of points: what native and triton share.

Of a block of points each head's product makes logits, a kernel makes the block's losses of them and the gradient of the
student's, which may overwrite them, and two more products make the gradients of the states and of the head. Memory is
O(block · V), whatever N and K are: the student's logits, a teacher's, the mixture of the teachers before it, and the
gradient where its dtype is another. Logits that were given are nowhere copied where the kernels can read them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkernels.ops.linear_distillation import reference
from kdkernels.ops.linear_distillation.call import Call, Side
from kdkernels.products import Total

Block = slice | Tensor  # rows, or their indices
FEWEST = 64  # rows of a block: fewer would make slow products
WHOLE = 16  # numbers: rows of buffers begin at a multiple of them, so that products and kernels read whole vectors


class Kernels(Protocol):
    """What an implementation brings."""

    block_bytes: int  # of logits
    compacts: bool  # points that do not count are left out; else they are computed, and masked
    in_place: bool  # the student's logits are contiguous rows of the sums' dtype, which their gradient overwrites

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """out = a b, or out += a b, in the dtype of out."""

    def absorb(
        self, call: Call, teacher: Side, rows: Tensor, bias: Tensor | None, mixture: Tensor, first: bool
    ) -> None:
        """Add a teacher's raw logits (n, V) to the mixture (n, V), or begin it."""

    def diverge(
        self, call: Call, student: Tensor, teacher: Tensor, bias: Tensor | None, mixture: Tensor | None,
        labels: Tensor | None, weights: Tensor | None, losses: Tensor, gradient: Tensor | None,
    ) -> None:  # fmt: skip
        """Fill `losses` (n,) and, where there is room, the gradient (n, V) of the student's raw logits.

        The room may be the student's logits themselves; else it has any dtype, which only `in_place` forbids.
        """


def run(call: Call, kernels: Kernels, losses: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Fill `losses` (N,), and the gradients of the student's tensors that have room."""
    N, V = losses.shape[0], call.student.width
    points = _counted(call, kernels)
    if points is not None:
        for room in (losses, grads[0], grads[3]):
            if room is not None:
                room.zero_()
    count = N if points is None else len(points)
    trained = _Trained(call, kernels, grads)
    rooms = _Rooms(call, kernels, trained.gradient_dtype, count)
    biases = [_bias(side, V) for side in call.teachers]
    for block in _blocks(count, rooms.rows, points):
        n = len(block) if isinstance(block, Tensor) else block.stop - block.start
        *before, last = call.teachers
        mixture = None if rooms.mixture is None else rooms.mixture[:n]
        for k, teacher in enumerate(before):
            rows = rooms.teacher_logits(teacher, block, n)
            kernels.absorb(call, teacher, rows, biases[k], mixture, k == 0)  # type: ignore[arg-type]
        target = rooms.teacher_logits(last, block, n)
        student = rooms.student_logits(block, n)
        labels, weights = _take(call.labels, block), _take(call.weights, block)
        found = losses[block] if isinstance(block, slice) else losses.new_empty(n)
        gradient = rooms.gradient(student, n) if trained.given is None else trained.given[block]
        kernels.diverge(call, student, target, biases[-1], mixture, labels, weights, found, gradient)
        if isinstance(block, Tensor):
            losses[block] = found
        if gradient is not None and trained.given is None:
            trained.add(block, gradient, None if kernels.compacts else weights)
    trained.finish()


def check_labels(labels: Tensor | None, weights: Tensor | None, V: int) -> None:
    """Raise ValueError where a label of a point that counts is no token. On a GPU nobody waits for the answer."""
    if labels is None or labels.device.type != "cpu" or not labels.numel():
        return
    wrong = (labels < 0) | (labels >= V)
    if weights is not None:
        wrong &= weights != 0
    if wrong.any():
        raise ValueError(
            f"labels holds {labels[wrong][0].item()}, but must be at least 0 and below {V}, the size of the student's "
            "vocabulary, or ignore_index"
        )


class _Rooms:
    """The buffers that a block's logits pass through."""

    def __init__(self, call: Call, kernels: Kernels, gradient_dtype: torch.dtype | None, count: int) -> None:
        self.call, self.kernels, self.gradient_dtype = call, kernels, gradient_dtype
        self.V = call.student.width
        narrow = _narrow(call, kernels, gradient_dtype)
        self.rows = max(1, min(_rows_per_block(call, kernels, narrow), count))
        self.student, self.mixture, self.raw, self.ordered = (
            self._room(n, call.dtype) for n in _columns(call, kernels)
        )
        self.apart = None if narrow is None else self._room(self.V, narrow)

    def _room(self, columns: int, dtype: torch.dtype) -> Tensor | None:
        if columns == 0:
            return None
        return self.call.student.states.new_empty((self.rows, padded(columns)), dtype=dtype)[:, :columns]

    def student_logits(self, block: Block, n: int) -> Tensor:
        """(n, V) raw logits, to be overwritten unless they were given."""
        if self.student is None:
            return _take(self.call.student.states, block)
        room = self.student[:n]
        self._product(self.call.student, block, room)
        return room

    def gradient(self, student: Tensor, n: int) -> Tensor | None:
        """(n, V): where the gradient of the student's raw logits goes."""
        if self.gradient_dtype is None:
            return None
        return student if self.apart is None else self.apart[:n]

    def teacher_logits(self, side: Side, block: Block, n: int) -> Tensor:
        """(n, V) raw logits in the order of the student's vocabulary; excluded tokens hold anything."""
        if self.raw is None or not _made(side, self.V):
            return _take(side.states, block)[:, : self.V]
        mapped = side.columns is not None
        width = side.vocabulary if mapped else min(side.vocabulary, self.V)
        raw = self.raw[:n, : width if mapped else self.V]
        self._product(side, block, raw[:, :width])
        if not mapped:
            return raw
        assert self.ordered is not None and side.columns is not None
        return torch.index_select(raw, 1, side.columns.clamp(min=0), out=self.ordered[:n])

    def _product(self, side: Side, block: Block, out: Tensor) -> None:
        """The first columns of a side's raw logits."""
        x, width = _take(side.states, block), out.shape[1]
        if side.indices is not None:
            _spread(x, side._replace(indices=_take(side.indices, block), rest=_take(side.rest, block)), out)
        elif side.weight is None:
            out.copy_(x[:, :width])
        else:
            self.kernels.multiply(x, side.weight[:width].t(), out)
        if side.low is not None and side.low_head is not None:
            low = _take(side.low, block)
            self.kernels.multiply(low, side.low_head[:width].t().to(low.dtype), out, True)


class _Trained:
    """The gradients of the student's tensors."""

    def __init__(self, call: Call, kernels: Kernels, grads: Sequence[Tensor | None]) -> None:
        student = call.student
        self.student, self.kernels, self.grads, self.dtype = student, kernels, grads, call.dtype
        wanted = any(g is not None for g in grads)
        narrow = student.weight is not None and student.weight.dtype is student.states.dtype
        self.gradient_dtype = (student.states.dtype if narrow else call.dtype) if wanted else None
        self.given = grads[0] if _given(student, kernels) else None  # the gradient of given logits, written at once
        self.sums = [Total(g, call.dtype, kernels.multiply) for g in (grads[1], grads[2], grads[4])]

    def add(self, block: Block, gradient: Tensor, weights: Tensor | None) -> None:
        """A block's part, from the gradient (n, V) of its raw logits; `weights` mask its rows."""
        dx, dW, db, dlow, dB = self.grads
        student = self.student
        for out, weight in ((dx, student.weight), (dlow, student.low_head)):
            if out is not None:
                self._points(out, block, gradient, weight)
        sum_W, sum_b, sum_B = self.sums
        for room, total, x in ((dW, sum_W, student.states), (dB, sum_B, student.low)):
            if room is not None:
                rows = _take(x, block)
                if weights is not None:  # what a point holds that does not count must not meet a zero in a product
                    rows = rows.masked_fill((weights == 0)[:, None], 0)
                total.add_product(gradient.t(), rows)
        if db is not None:
            sum_b.add_rows(gradient)

    def _points(self, out: Tensor, block: Block, gradient: Tensor, weight: Tensor | None) -> None:
        """out[block] = gradient · weight, or the gradient itself of a student that is logits."""
        if weight is None:
            out[block] = gradient.to(out.dtype)
            return
        exact = out.dtype is self.dtype or out.dtype is gradient.dtype is weight.dtype
        direct = isinstance(block, slice) and exact
        n, d = gradient.shape[0], weight.shape[1]
        to = out[block] if direct else out.new_empty((n, d), dtype=self.dtype)
        self.kernels.multiply(gradient, weight, to)
        if not direct:
            out[block] = to.to(out.dtype)

    def finish(self) -> None:
        for total in self.sums:
            total.finish()


def _counted(call: Call, kernels: Kernels) -> Tensor | None:
    """The indices of the points that count, or None where all do or none is left out."""
    if call.weights is None or not kernels.compacts:
        return None
    found = call.weights.nonzero()[:, 0]
    return None if len(found) == len(call.weights) else found


def _blocks(count: int, rows: int, points: Tensor | None) -> Iterator[Block]:
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        yield block if points is None else points[block]


def padded(columns: int) -> int:
    """Numbers that a buffer's row takes."""
    return -(-columns // WHOLE) * WHOLE


def _columns(call: Call, kernels: Kernels) -> tuple[int, int, int, int]:
    """Of the buffers of the student's logits, the mixture, a teacher's logits, and these in the student's order."""
    V = call.student.width
    made = [side for side in call.teachers if _made(side, V)]
    return (
        0 if _given(call.student, kernels) else V,
        V if len(call.teachers) > 1 else 0,
        max((max(side.vocabulary, V) for side in made), default=0),
        V if any(side.columns is not None for side in made) else 0,
    )


def _narrow(call: Call, kernels: Kernels, gradient_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the gradient's own buffer, or None where it needs none."""
    elsewhere = kernels.in_place or _given(call.student, kernels)
    return None if elsewhere or gradient_dtype is call.dtype else gradient_dtype


def _rows_per_block(call: Call, kernels: Kernels, narrow: torch.dtype | None = None) -> int:
    """As many as `block_bytes` hold, a multiple of 16 and at least `FEWEST`; all where there are no buffers."""
    row_bytes = sum(map(padded, _columns(call, kernels))) * torch.finfo(call.dtype).bits // 8
    if narrow is not None:
        row_bytes += padded(call.student.width) * torch.finfo(narrow).bits // 8
    if row_bytes == 0:
        return call.student.states.shape[0]
    return max(FEWEST, kernels.block_bytes // row_bytes // 16 * 16)


def _given(student: Side, kernels: Kernels) -> bool:
    """Whether the student's raw logits are read where they are."""
    return student.weight is None and not kernels.in_place


def _made(side: Side, V: int) -> bool:
    """Whether a teacher's raw logits have to be made: they are not given, in the student's order."""
    given = side.weight is None and side.indices is None and side.low is None
    return not given or side.columns is not None or side.states.shape[1] < V


def _bias(side: Side, V: int) -> Tensor | None:
    """(V,): a teacher's bias in the order of the student's vocabulary."""
    if side.bias is None:
        return None
    return reference.in_students_order(side.bias[None], side, V)[0].contiguous()


def _spread(log_probs: Tensor, side: Side, out: Tensor) -> None:
    """The first columns of the logits that top-k log-probabilities stand for."""
    assert side.indices is not None
    log_probs, places = log_probs.to(out.dtype), side.indices.long()
    tails = reference.tails(log_probs, side)[:, None]
    out.copy_(tails.expand_as(out))
    if out.shape[1] == side.vocabulary:
        out.scatter_(1, places, log_probs)
        return
    # what is beyond goes to the first column, which is then put right
    out.scatter_(1, torch.where(places < out.shape[1], places, 0), log_probs)
    first = torch.where(places == 0, log_probs, reference.NONE).amax(1, keepdim=True)
    out[:, :1] = torch.where((places == 0).any(1, keepdim=True), first, tails)


def _take(x: Any, block: Block) -> Any:
    if x is None:
        return None
    return x[block] if isinstance(block, slice) else x.index_select(0, block)
