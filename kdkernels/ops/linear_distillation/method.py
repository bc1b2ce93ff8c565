"""What a call costs: the products of the heads, and the logits between them."""

from collections.abc import Sequence

from kdkernels.backend import Cost
from kdkernels.ops.linear_distillation.call import Call

# Passes over (N, V) numbers of the accumulation dtype. eager writes and reads logits, the same over T, log-softmaxes,
# the divergence's terms and their gradients; streamed writes each block's logits, reads them twice, and its gradient.
EAGER_PASSES, STREAMED_PASSES = (16, 8), (5, 3)  # of the student, of each teacher


def costs(call: Call, needs: Sequence[bool]) -> tuple[Cost, ...]:
    """Forward and backward: `streamed` is what runs, `eager` the steps of plain PyTorch."""
    student = call.student
    N, V = student.states.shape[0], student.width
    sides = [student, *call.teachers]
    flops = sum(2 * N * (side.states.shape[1] * side.width if side.weight is not None else 0) for side in sides)
    if student.weight is not None:
        flops += 2 * N * V * student.states.shape[1] * (needs[0] + needs[1])
    size = 8 if str(call.dtype) == "torch.float64" else 4
    operands = sum(x.numel() * x.element_size() for side in sides for x in side[:5] if x is not None)
    operands += sum(x.numel() * x.element_size() for x, need in zip(student, needs, strict=False) if need)  # type: ignore
    found = []
    for name, (own, each) in (("streamed", STREAMED_PASSES), ("eager", EAGER_PASSES)):
        found.append(Cost(name, flops, operands + N * V * size * (own + each * len(call.teachers))))
    return tuple(found)
