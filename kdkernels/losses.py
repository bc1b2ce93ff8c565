"""Losses that compute their gradients in the forward pass: what their operators have in common.

A block's intermediate results are there only while it is computed, so a reduced loss returns its gradients beside it,
and backward scales them by the incoming scalar, on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def keep(ctx: Any, grads: Gradients, needs: Sequence[bool]) -> None:
    """For `scaled`: the gradients in `needs` alone, detached: an output that is kept as it is makes a graph that holds
    itself, which nobody frees."""
    ctx.set_materialize_grads(False)
    ctx.grads = [g.detach() if need else None for g, need in zip(grads, needs, strict=True)]  # type: ignore[union-attr]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward; of what was made in inference mode, as a teacher's states often are, a copy: it cannot be saved."""
    ctx.save_for_backward(*(x.clone() if x is not None and x.is_inference() else x for x in tensors))


def scaled(
    ctx: Any, grad_total: Tensor, grads_of_gradients: Gradients, needs: Sequence[bool], again: Callable[[], Gradients],
    twice: str,
) -> list[Tensor | None]:  # fmt: skip
    """What was kept, times the incoming gradient; `again` computes it for a graph that is walked once more.

    Raises RuntimeError(twice) where a gradient of the gradients is asked for.
    """
    if any(g is not None for g in grads_of_gradients):
        raise RuntimeError(twice)
    grads, ctx.grads = ctx.grads, None  # handed out once: whoever gets them may keep and change them
    if grads is None or torch.is_grad_enabled():
        # A graph that was kept, or a first derivative that will itself be differentiated: then `twice` shall be raised.
        found = [g * grad_total if need else None for g, need in zip(again(), needs, strict=True)]  # type: ignore
    elif not torch._C._has_storage(grad_total):  # a batch of gradients
        found = [g * grad_total if need else None for g, need in zip(grads, needs, strict=True)]
    elif _is_one(grad_total):
        found = [g if need else None for g, need in zip(grads, needs, strict=True)]
    else:
        found = [g.mul_(grad_total) if need else None for g, need in zip(grads, needs, strict=True)]
    return found


def _is_one(x: Tensor) -> bool:
    """Whether a scalar on the CPU is 1, as in `loss.backward()`: one pass over the gradients less.

    A tensor that only stands for one (while tracing) or lives on a device is not asked.
    """
    return type(x) is Tensor and x.device.type == "cpu" and x.item() == 1


def point_weights(weights: Tensor | None, grad_losses: Tensor) -> Tensor:
    """The weights that make a reduced loss's gradients those of Σ grad_losses_i · weights_i · loss_i."""
    return grad_losses if weights is None else torch.where(weights != 0, grad_losses * weights, 0)


def nonzero(total: Tensor) -> Tensor:
    """The sum of the weights, or 1 where nothing counts and the loss is 0 already."""
    return torch.where(total == 0, torch.ones_like(total), total)


def as_weights(weights: Tensor | None) -> Tensor | None:
    """Masks may be boolean or integer; weights are data, not parameters. Raises TypeError or ValueError."""
    if not isinstance(weights, Tensor):
        if weights is not None:
            raise TypeError(f"weights is {type(weights).__name__}, but must be a torch.Tensor")
        return None
    if weights.requires_grad:
        raise ValueError(
            "weights requires grad, but no gradient flows into weights: use reduction='none' and weigh the losses "
            "outside, or detach them"
        )
    if weights.is_complex() or weights.is_quantized:
        raise TypeError(f"weights has dtype {weights.dtype}, but must be real")
    if not weights.is_floating_point():
        return weights.to(torch.float32)
    if not torch.compiler.is_compiling() and weights.is_inference() and not torch.is_inference_mode_enabled():
        return weights.clone()  # which autograd can save
    return weights
