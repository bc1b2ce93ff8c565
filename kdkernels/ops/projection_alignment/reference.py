"""The definition of projection alignment in plain PyTorch: any device, any dtype, differentiable twice.

Per point, with z_s = s W_sᵀ + b_s and z_t = t W_tᵀ + b_t in the shared D-dimensional space:

    mse      ‖z_s − z_t‖² / D
    cosine   1 − cos(z_s, z_t)                       norms clamped at `EPS`, as torch's cosine_similarity
    angular  acos(clamp(cos, −1 + ANGULAR_EPS, 1 − ANGULAR_EPS))

The angular loss is that of "Logit Distillation on Manifolds" (arXiv 2606.00771).
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("cosine", "mse", "angular")
EPS = 1e-8
ANGULAR_EPS = 1e-7


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any argument is float64, else float32: the dtype of sums, and of the returned loss."""
    return torch.float64 if any(x is not None and x.dtype is torch.float64 for x in tensors) else torch.float32


def pointwise_losses(z_s: Tensor, z_t: Tensor, metric: str) -> Tensor:
    """(N, D), (N, D) -> (N,): the loss of each point, in the dtype it is given."""
    if metric == "mse":
        return (z_s - z_t).square().mean(-1)
    cos = F.cosine_similarity(z_s, z_t, dim=-1, eps=EPS)
    if metric == "cosine":
        return 1 - cos
    return torch.acos(cos.clamp(-1 + ANGULAR_EPS, 1 - ANGULAR_EPS))


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(N, d), (D, d), (D,) -> (N, D); without a weight, x already lives in the shared space."""
    return x if weight is None else F.linear(x, weight, bias)


def eager_losses(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None = None,
    teacher_proj: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    metric: str,
) -> Tensor:
    """What a user would write: every step in the dtype of its inputs. The baseline of benchmarks and error budgets."""
    z_s = project(student, student_proj, student_bias)  # (N, D)
    z_t = project(teacher, teacher_proj, teacher_bias)  # (N, D)
    return pointwise_losses(z_s, z_t, metric)


def weighted_losses(
    student: Tensor,
    teacher: Tensor,
    student_proj: Tensor | None,
    teacher_proj: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    *,
    metric: str,
) -> Tensor:
    """(N,): weights_i · loss_i, with every step in the accumulation dtype.

    A point of weight 0 does not exist: whatever it holds (padding, NaN) reaches neither the loss nor a gradient.
    """
    dtype = accumulation_dtype(student, teacher, student_proj, teacher_proj, student_bias, teacher_bias)
    device = student.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # operands were cast before
        s, t = student.to(dtype), teacher.to(dtype)
        projections = [None if x is None else x.to(dtype) for x in (student_proj, teacher_proj)]
        biases = [None if x is None else x.to(dtype) for x in (student_bias, teacher_bias)]
        if weights is None:
            return eager_losses(s, t, *projections, *biases, metric=metric)
        counts = weights != 0
        s, t = torch.where(counts[:, None], s, 0), torch.where(counts[:, None], t, 0)
        losses = eager_losses(s, t, *projections, *biases, metric=metric)
        return torch.where(counts, losses * weights.to(dtype), 0)
