"""The definition of the linear distillation loss in plain PyTorch: any device, any dtype, differentiable any way.

With logits y of the student and y_k of the teachers, q = softmax(y/T) and, by weights π_k that sum to 1, the target

    arithmetic   p = Σ π_k softmax(y_k/T)          geometric   p = softmax(Σ π_k y_k/T)

the loss of a point is α T² D + (1 − α) cross-entropy(y, label), where D is

    forward_kl   Σ p (log p − log q)               reverse_kl  Σ q (log q − log p)
    jsd          β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q         tvd   ½ Σ |p − q|

Soft targets with T² are Hinton et al. 2015 (arXiv 1503.02531), the generalised JSD is Agarwal et al. 2024 (2306.13649).
"""

from contextlib import nullcontext
from math import log, log1p

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.linear_distillation.call import Call, Side

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
MIXTURES = ("arithmetic", "geometric")
NONE = float("-inf")  # the logarithm of 0


def weighted_losses(call: Call) -> Tensor:
    """(N,): weights_i · loss_i / divisor, with every step in the accumulation dtype.

    A point of weight 0 does not exist: whatever it holds (padding, NaN) reaches neither the loss nor a gradient.
    """
    device = call.student.states.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # operands were cast before
        if call.weights is None:
            return losses(call) / call.divisor
        counts = call.weights != 0
        labels = None if call.labels is None else torch.where(counts, call.labels, 0)
        sides = [_counted(side, counts) for side in (call.student, *call.teachers)]
        found = losses(call._replace(student=sides[0], teachers=sides[1:], labels=labels))
        return torch.where(counts, found * call.weights.to(call.dtype), 0) / call.divisor


def losses(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """(N,): the loss of each point, with every step in `dtype`, the accumulation dtype if it is None.

    In the dtype of the inputs it is what a user would write: the baseline of benchmarks and error budgets.
    """
    T, dtype = call.temperature, dtype or call.dtype
    y = logits(call.student, dtype)  # (N, V)
    loss = torch.zeros_like(y[:, 0])
    if call.alpha != 0:
        log_q = _shared(y / T, call.excluded).log_softmax(-1)
        log_p = log_target(call, y.shape[1], dtype)
        loss = loss + call.alpha * T**2 * divergence(log_p, log_q, call.divergence, call.beta)
    if call.alpha != 1:
        assert call.labels is not None
        loss = loss + (1 - call.alpha) * F.cross_entropy(y, call.labels, reduction="none")
    return loss


def logits(side: Side, dtype: torch.dtype) -> Tensor:
    """(N, V) of one side, over its own vocabulary."""
    x, weight, bias, low, low_head = (None if t is None else t.to(dtype) for t in side[:5])
    assert x is not None
    y = from_top_k(x, side) if weight is None else F.linear(x, weight, bias)
    if low is not None and low_head is not None:
        y = y + F.linear(low, low_head)
    y = side.scale * y
    return side.softcap * torch.tanh(y / side.softcap) if side.softcap else y


def from_top_k(log_probs: Tensor, side: Side) -> Tensor:
    """(N, V) from the log-probabilities of k tokens, and what is left for the others; logits are what they are."""
    if side.indices is None:
        return log_probs
    rest = tails(log_probs, side)[:, None].expand(-1, side.vocabulary)
    return rest.scatter(1, side.indices.long(), log_probs)


def tails(log_probs: Tensor, side: Side) -> Tensor:
    """(N,): the log-probability of each token that is not among the k."""
    others = side.vocabulary - log_probs.shape[1]
    if not side.spread or others < 1:
        return torch.full_like(log_probs[:, 0], NONE)
    left = (1 - log_probs.double().exp().sum(1)).clamp(min=0).log() if side.rest is None else side.rest.double()
    return (left - log(others)).to(log_probs.dtype)


def log_target(call: Call, V: int, dtype: torch.dtype) -> Tensor:
    """(N, V): log p of the mixture of teachers over the student's vocabulary."""
    tempered = [
        _shared(in_students_order(logits(side, dtype), side, V) / call.temperature, call.excluded)
        for side in call.teachers
    ]
    shares = [side.share for side in call.teachers]
    if call.mixture == "geometric":
        return torch.stack([share * z for share, z in zip(shares, tempered, strict=True)]).sum(0).log_softmax(-1)
    if len(tempered) == 1:
        return tempered[0].log_softmax(-1)
    parts = [z.log_softmax(-1) + log(share) for z, share in zip(tempered, shares, strict=True)]
    return torch.stack(parts).logsumexp(0)


def in_students_order(y: Tensor, teacher: Side, V: int) -> Tensor:
    """(N, V) from (N, V_k); tokens that are not common hold anything."""
    if teacher.columns is not None:
        return y[:, teacher.columns.clamp(min=0)]
    return y[:, :V] if y.shape[1] >= V else F.pad(y, (0, V - y.shape[1]))


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """(N, V), (N, V) -> (N,); a token of probability 0 adds nothing, whatever the other side says of it."""
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    possible = (log_p != NONE) | (log_q != NONE)
    own = [torch.where(possible, x, 0) for x in (log_p, log_q)]
    log_m = torch.where(possible, torch.logaddexp(own[0] + log(beta), own[1] + log1p(-beta)), NONE)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    difference = torch.where(a != 0, log_a, 0) - torch.where(a != 0, log_b, 0)
    return torch.where(a != 0, a * difference, 0).sum(-1)


def _shared(z: Tensor, excluded: Tensor | None) -> Tensor:
    return z if excluded is None else z.masked_fill(excluded != 0, NONE)


def _counted(side: Side, counts: Tensor) -> Side:
    low = None if side.low is None else torch.where(counts[:, None], side.low, 0)
    return side._replace(states=torch.where(counts[:, None], side.states, 0), low=low)
