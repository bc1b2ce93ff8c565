"""The benchmark cases of the linear distillation loss: forward and backward, each variant on the same tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdkernels import explain, linear_distillation_loss
from kdkernels.backend import Cost, Explanation
from kdkernels.testing.compare import INCOMING, Deviation, Outcome, deviations, errors

OP = "linear_distillation_loss"
ROWS = 128  # points in a block of the float64 run
CHUNK = 256  # points in a chunk of trl's loss
IGNORE = -100

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """One case's sizes and options. All gradients of the student but, where `frozen_head`, that of its head."""

    N: int
    V: int
    d_s: int
    d_t: tuple[int, ...]  # of each teacher
    dtype: torch.dtype = torch.float32
    divergence: str = "forward_kl"
    temperature: float = 2.0
    frozen_head: bool = False


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its tensors."""

    name: str
    shape: Shape
    op: str = OP

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run."""
        draw, shape = torch.Generator().manual_seed(0), self.shape

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(rows, columns, generator=draw)).to(device, shape.dtype)

        return Session(
            shape,
            normal(shape.N, shape.d_s).requires_grad_(),
            normal(shape.V, shape.d_s, 2 / shape.d_s**0.5).requires_grad_(not shape.frozen_head),
            [normal(shape.N, d) for d in shape.d_t],
            [normal(shape.V, d, 2 / d**0.5) for d in shape.d_t],
        )


@dataclass
class Session:
    """A case's tensors, kept from step to step."""

    shape: Shape
    student: Tensor
    head: Tensor
    teachers: list[Tensor]
    teacher_heads: list[Tensor]

    def refresh(self) -> None:
        """Nothing changes between two steps."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the matmuls."""
        return self.shape.dtype

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """One forward and backward of each contender, the baseline first."""
        torch.compiler.reset()
        losses: dict[str, Loss] = {
            "eager": eager_loss,
            "torch.compile": torch.compile(eager_loss, fullgraph=True, dynamic=False),
        }
        if len(self.teachers) == 1 and self.shape.divergence != "tvd":
            losses["trl, chunked"] = chunked_loss
            if find_spec("liger_kernel") is not None:
                losses["Liger, chunked"] = liger_loss
        losses["kdkernels"] = kdkernels_loss
        return {name: lambda loss=loss: self.step(loss) for name, loss in losses.items()}  # type: ignore[misc]

    def step(self, loss: Loss) -> Outcome:
        """The loss and the wanted gradients."""
        value = loss(self.student, self.head, self.teachers, self.teacher_heads, self.shape)
        wanted = {"student": self.student} | ({} if self.shape.frozen_head else {"student_head": self.head})
        grads = torch.autograd.grad(value, list(wanted.values()), torch.full_like(value, INCOMING))
        return Outcome(value.detach(), dict(zip(wanted, grads, strict=True)))

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Each variant's errors against float64, beside twice those of eager."""
        target = self.exact()
        yardstick = errors(outcomes["eager"], target)
        yardstick["loss"] = max(yardstick["loss"], self.spread())
        return {name: deviations(outcome, target, yardstick) for name, outcome in outcomes.items()}

    def spread(self) -> float:
        """Eager's error of a point's loss, over the loss: that of the mean is luck, since its points cancel."""
        few = slice(ROWS)
        narrow = self.student.detach()[few], self.head.detach(), [x[few] for x in self.teachers], self.teacher_heads
        student, head, teachers, heads = narrow
        wide = student.double(), head.double(), [x.double() for x in teachers], [W.double() for W in heads]
        exact = eager_points(*wide, self.shape)
        return ((eager_points(*narrow, self.shape).double() - exact).abs().sum() / exact.sum()).item()

    def exact(self) -> Outcome:
        """The mean loss and its gradients in float64, block by block of points to bound memory."""
        head = self.head.detach().double().requires_grad_(not self.shape.frozen_head)
        teacher_heads = [W.double() for W in self.teacher_heads]
        loss: Any = 0.0
        head_grad: Any = 0.0
        student_grads = []
        for start in range(0, self.shape.N, ROWS):
            block = slice(start, start + ROWS)
            student = self.student.detach()[block].double().requires_grad_()
            teachers = [x[block].double() for x in self.teachers]
            part = Session(self.shape, student, head, teachers, teacher_heads).step(eager_loss)
            share = len(student) / self.shape.N
            loss = loss + share * part.loss
            student_grads.append(share * part.grads["student"])
            head_grad = head_grad + share * part.grads.get("student_head", 0.0)
        grads = {"student": torch.cat(student_grads)} | ({} if self.shape.frozen_head else {"student_head": head_grad})
        return Outcome(loss, grads)

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of what the variant runs; chunks are eager's steps."""
        method = self.explain().method if variant == "kdkernels" else "eager"
        return next(cost for cost in self.explain().costs if cost.method == method)

    def explain(self) -> Explanation:
        """What the operator runs here."""
        return explain(
            OP, self.student, self.head, self.teachers, self.teacher_heads, divergence=self.shape.divergence,
            temperature=self.shape.temperature,
        )  # fmt: skip


def kdkernels_loss(student: Tensor, head: Tensor, teachers: Any, teacher_heads: Any, shape: Shape) -> Tensor:
    """The public operator."""
    return linear_distillation_loss(
        student, head, teachers, teacher_heads, divergence=shape.divergence, temperature=shape.temperature
    )


def eager_loss(student: Tensor, head: Tensor, teachers: Any, teacher_heads: Any, shape: Shape) -> Tensor:
    """What a user writes."""
    return eager_points(student, head, teachers, teacher_heads, shape).sum() / student.shape[0]


def eager_points(student: Tensor, head: Tensor, teachers: Any, teacher_heads: Any, shape: Shape) -> Tensor:
    """(N,): logits in the dtype of the inputs."""
    T = shape.temperature
    log_q = F.log_softmax(F.linear(student, head) / T, -1)
    with torch.no_grad():
        logits = [F.linear(x, W) / T for x, W in zip(teachers, teacher_heads, strict=True)]
        if len(logits) == 1:
            log_p = F.log_softmax(logits[0], -1)
        else:
            log_p = torch.stack([z.softmax(-1) for z in logits]).mean(0).log()
    return T**2 * divergence(log_p, log_q, shape.divergence)


def divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """(N, V), (N, V) -> (N,)."""
    if kind == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - log(2)
    halves = (F.kl_div(log_m, x, reduction="none", log_target=True).sum(-1) for x in (log_p, log_q))
    return 0.5 * sum(halves)  # type: ignore[return-value]


def chunked_loss(student: Tensor, head: Tensor, teachers: Any, teacher_heads: Any, shape: Shape) -> Tensor:
    """As trl's DistillationTrainer: chunks of float32 logits, each under a checkpoint of its own."""
    T = shape.temperature

    def chunk(h: Tensor, W: Tensor, t: Tensor, W_t: Tensor) -> Tensor:
        log_q = F.log_softmax(F.linear(h, W).float() / T, -1)
        log_p = F.log_softmax(F.linear(t, W_t).float() / T, -1)
        return divergence(log_p, log_q, shape.divergence).sum()

    parts = [
        checkpoint(chunk, h, head, t, teacher_heads[0], use_reentrant=False)
        for h, t in zip(student.split(CHUNK), teachers[0].split(CHUNK), strict=True)
    ]
    return T**2 * torch.stack(parts).sum() / student.shape[0]


def liger_loss(student: Tensor, head: Tensor, teachers: Any, teacher_heads: Any, shape: Shape) -> Tensor:
    """Liger's chunked loss, which is plain PyTorch: β 0 is forward KL there, 1 is reverse. It has no T²."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}[shape.divergence]
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta, IGNORE, shape.temperature)
    labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
    return shape.temperature**2 * loss(student, head, teachers[0], teacher_heads[0], labels)


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks every size and keeps the shapes' proportions."""
    shapes = on_a_gpu() if device != "cpu" else on_a_cpu()
    if quick:
        shapes = {name: smaller(shape) for name, shape in shapes.items()}
    return [Workload(name, shape) for name, shape in shapes.items()]


def smaller(shape: Shape) -> Shape:
    """A sixteenth of every size."""
    sizes = {name: max(4, getattr(shape, name) // 16) for name in ("N", "V", "d_s")}
    return Shape(**{**vars(shape), **sizes, "d_t": tuple(d // 16 for d in shape.d_t)})


def on_a_cpu() -> dict[str, Shape]:
    """Of Whisper's shape: a vocabulary of 51865, tiny as student, large as teacher."""
    whisper: dict[str, Any] = {"N": 2048, "V": 51865, "d_s": 384, "d_t": (1280,)}
    return {
        "forward KL, Whisper tiny from large, float32": Shape(**whisper),
        "forward KL, Whisper tiny from large, bfloat16": Shape(**whisper, dtype=torch.bfloat16),
        "JSD, Whisper tiny from large, float32": Shape(**whisper, divergence="jsd"),
        "forward KL, three teachers, float32": Shape(**{**whisper, "d_t": (768, 1024, 1280)}),
        "forward KL, frozen head, float32": Shape(**whisper, frozen_head=True),
        "forward KL, small: N=64, V=512, float32": Shape(64, 512, 64, (96,)),
    }


def on_a_gpu() -> dict[str, Shape]:
    """Of Llama 3's shape, in bfloat16."""
    llama: dict[str, Any] = {"N": 8192, "V": 128256, "d_s": 4096, "d_t": (4096,), "dtype": torch.bfloat16}
    small: dict[str, Any] = {"N": 2048, "V": 51865, "d_s": 384, "d_t": (1280,), "dtype": torch.bfloat16}
    return {
        "forward KL, 8192x4096x128256, bfloat16": Shape(**llama),
        "JSD, 8192x4096x128256, bfloat16": Shape(**llama, divergence="jsd"),
        "forward KL, Whisper tiny from large, bfloat16": Shape(**small),
        "forward KL, three teachers, bfloat16": Shape(**{**small, "d_t": (768, 1024, 1280)}),
    }
