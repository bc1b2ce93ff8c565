"""The benchmark cases of projection alignment: forward and backward, each variant on the same tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels import explain, projection_alignment_loss
from kdkernels.backend import Cost, Explanation
from kdkernels.ops.projection_alignment import schema
from kdkernels.ops.projection_alignment.reference import eager_losses
from kdkernels.testing.compare import INCOMING, Deviation, Outcome, deviations, errors
from kdkernels.testing.projection_alignment.inputs import Inputs, exact, make_inputs

OP = "projection_alignment_loss"
ROWS = 1024  # points in a block of the float64 run
PROJECTIONS = ("student_proj", "teacher_proj")


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its tensors."""

    name: str
    arguments: dict[str, Any]
    fresh_teacher: bool = False  # a new teacher batch every step, as while training; else the same one
    op: str = OP

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        arguments: dict[str, Any] = {"bias": False, "frozen": ("teacher",), "device": device} | self.arguments
        return Session(make_inputs(**arguments), self.fresh_teacher)


@dataclass
class Session:
    """A case's tensors, kept from step to step as a training loop keeps its parameters."""

    inputs: Inputs
    fresh_teacher: bool
    leaves: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(self.inputs.operands, self.inputs.needs, strict=True)
        ]

    def refresh(self) -> None:
        """What happens between two steps, untimed: the next teacher batch (the same numbers, another tensor)."""
        if self.fresh_teacher:
            self.leaves[1] = self.inputs.operands[1].clone()  # type: ignore[union-attr]

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """One forward and backward of each contender, the baseline first."""
        metric = self.inputs.metric

        def eager(*operands: Tensor | None) -> Tensor:
            return eager_losses(*operands, metric=metric).mean()  # type: ignore[arg-type]

        def kdkernels(student: Tensor, teacher: Tensor, *rest: Tensor | None) -> Tensor:
            return projection_alignment_loss(student, teacher, **self.keywords(rest))

        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        losses = {"eager": eager, "torch.compile": compiled, "kdkernels": kdkernels}
        return {name: lambda loss=loss: self.step(loss) for name, loss in losses.items()}  # type: ignore[misc]

    def keywords(self, rest: tuple[Tensor | None, ...]) -> dict[str, Any]:
        """The operator's arguments after student and teacher."""
        return dict(zip(schema.NAMES[2:], rest, strict=True)) | {"metric": self.inputs.metric}

    def step(self, loss: Callable[..., Tensor]) -> Outcome:
        """The loss and the wanted gradients."""
        value = loss(*self.leaves)
        wanted = {n: x for n, x in zip(schema.NAMES, self.leaves, strict=True) if x is not None and x.requires_grad}
        grads = torch.autograd.grad(value, list(wanted.values()), torch.full_like(value, INCOMING))
        return Outcome(value.detach(), dict(zip(wanted, grads, strict=True)))

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Each variant's errors against float64, beside twice those of eager."""
        target = exact_in_blocks(self.inputs)
        yardstick = errors(outcomes["eager"], target)
        return {name: deviations(outcome, target, yardstick) for name, outcome in outcomes.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmuls."""
        return self.inputs.operands[0].dtype  # type: ignore[union-attr]

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of what the variant runs: the direct method, unless it is ours."""
        explanation = self.explain()
        method = explanation.method if variant == "kdkernels" else "direct"
        return next(cost for cost in explanation.costs if cost.method == method)

    def explain(self) -> Explanation:
        """What the operator runs here, and the FLOPs and bytes of each method."""
        student, teacher, *rest = self.leaves
        return explain(OP, student, teacher, **self.keywords(tuple(rest)))


def exact_in_blocks(inputs: Inputs) -> Outcome:
    """The mean loss and its gradients in float64, block by block of points to bound memory."""
    student, teacher, *rest = inputs.operands
    N = len(student)  # type: ignore[arg-type]
    blocks = [
        exact(replace(inputs, operands=(s, t, *rest), reduction="sum"))
        for s, t in zip(student.split(ROWS), teacher.split(ROWS), strict=True)  # type: ignore[union-attr]
    ]
    grads = {}
    for name in blocks[0].grads:
        parts = [block.grads[name] for block in blocks]
        grads[name] = (torch.cat(parts) if name in ("student", "teacher") else torch.stack(parts).sum(0)) / N
    return Outcome(torch.stack([block.loss for block in blocks]).sum() / N, grads)


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks every size and keeps the shapes' proportions."""
    return workloads_on_a_cpu(quick) if device == "cpu" else workloads_on_a_gpu(quick)


def workloads_on_a_gpu(quick: bool) -> list[Workload]:
    """In bfloat16 with 16384 points, and in float32 with 8192."""
    shrink = 16 if quick else 1
    widths = {"d_s": 768 // shrink, "d_t": 1280 // shrink}
    frozen = ("teacher", *PROJECTIONS)
    cases = []
    for dtype, points, D, kept in (
        (torch.bfloat16, 16384, 4096, ("teacher",)), (torch.bfloat16, 16384, 4096, frozen),
        (torch.bfloat16, 16384, 16384, frozen), (torch.float32, 8192, 4096, ("teacher",)),
        (torch.float32, 8192, 4096, frozen),
    ):  # fmt: skip
        sizes: dict[str, Any] = {"N": points // shrink // shrink, "D": D // shrink, **widths, "dtype": dtype}
        what = "projections frozen" if kept is frozen else "all gradients but the teacher's"
        name = f"cosine, N={sizes['N']}, D={sizes['D']}, {what}, {str(dtype).removeprefix('torch.')}"
        cases.append(Workload(name, sizes | {"frozen": kept}, fresh_teacher=True))
    d_s, D = 1024 // shrink, 1280 // shrink
    one_sided = {"N": 16384 // shrink // shrink, "d_s": d_s, "D": D, "sides": "student", "dtype": torch.bfloat16}
    cases.append(Workload(f"cosine, student {d_s} -> {D}, raw teacher, bfloat16", one_sided, fresh_teacher=True))
    return cases


def workloads_on_a_cpu(quick: bool) -> list[Workload]:
    """In float32, and one in bfloat16."""
    shrink = 16 if quick else 1
    widths = {"d_s": 768 // shrink, "d_t": 1280 // shrink}
    N, one_sided_N = (512, 512) if quick else (8192, 16384)
    cases = []
    for D in (4096 // shrink, 16384 // shrink):
        sizes: dict[str, Any] = {"N": N, "D": D, **widths}
        cases.append(Workload(f"cosine, D={D}, all gradients but the teacher's", sizes))
        frozen = sizes | {"frozen": ("teacher", *PROJECTIONS)}
        cases.append(Workload(f"cosine, D={D}, projections frozen, same teacher batch", frozen))
        cases.append(Workload(f"cosine, D={D}, projections frozen, fresh teacher batch", frozen, fresh_teacher=True))
    D = 4096 // shrink
    for metric in ("mse", "angular"):
        sizes = {"N": N, "D": D, **widths, "metric": metric}
        cases.append(Workload(f"{metric}, D={D}, all gradients but the teacher's", sizes))
    d_s, d_t = 1024 // shrink, 1280 // shrink
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        arguments: dict[str, Any] = {"N": one_sided_N, "d_s": d_s, "D": d_t, "sides": "student", "dtype": dtype}
        cases.append(Workload(f"cosine, student {d_s} -> {d_t}, raw teacher, {name}", arguments, fresh_teacher=True))
    small = {"N": 64, "d_s": 64, "d_t": 96, "D": 128}
    cases.append(Workload("cosine, small: N=64, 64 and 96 -> 128", small, fresh_teacher=True))
    return cases
