"""A diagonal state-space layer, h_t = Λ h_{t−1} + B u_t and y_t = Re(C h_t), whose states are never in memory at once.

The N·T·n states of a layer are its largest tensor by far, and a pass over it costs more than the arithmetic on it. They
live in a block that stays in the cache: a product makes B u of some sequences (or of some steps of one), the recurrence
turns it into states where it lies, another product reads y. Backward makes them again, and needs of the forward pass
the inputs and, where sequences are cut, the state at each cut.

A complex number is two neighbours throughout, so that all products are real: B is (2n, H) with rows re, im of each
state, C is (p, 2n) with columns re, −im.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backend as backends
from kdkernels.contract import without_autocast
from kdkernels.library import needs as needed
from kdkernels.library import operator
from kdkernels.ops.linear_recurrence import reference
from kdkernels.ops.linear_recurrence.schema import BATCHED, implementation, linear_recurrence

BLOCK_BYTES = {"cpu": 4 << 20}  # of a block of states: what two cores keep near (measured: 1 MiB and 16 MiB are slower)
BLOCK_BYTES_OF_OTHERS = 256 << 20  # what fills a GPU
LINE = 64  # bytes: rows of many states begin at multiples of it, by states that stay 0 (133 took longer than 144)
MANY = 64  # of fewer the zeros cost as much


def state_space(
    input: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """y (N, T, p) and h_T (N, n) of inputs (N, T, H), Λ (n), B (2n, H), C (p, 2n) and h_0 (N, n) or None.

    Any of them is differentiable, any number of times. The backends are those of `linear_recurrence`.
    """
    chosen = backends.choose("linear_recurrence", backend, input.device.type, (Lambda.dtype,)).backend
    if chosen == "reference":
        return composed(
            input, Lambda, B, C, initial_state, lambda *x: reference.linear_recurrence(x[0], x[1], x[2], False)
        )
    backends.refuse_tangents("LRU", (x for x in (input, Lambda, B, C, initial_state) if x is not None))
    n = Lambda.shape[0]
    more = -n % (LINE // Lambda.itemsize) if n >= MANY else 0
    if more:
        Lambda, B, C = F.pad(Lambda, (0, more)), F.pad(B, (0, 0, 0, 2 * more)), F.pad(C, (0, 2 * more))
        initial_state = None if initial_state is None else F.pad(initial_state, (0, more))
    y, last = layer(input, Lambda, B, C, initial_state, chosen)
    return y, last[:, :n] if more else last


def composed(
    input: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, recurrence: Any
) -> tuple[Tensor, Tensor]:
    """y (N, T, p) and h_T (N, n), by operations that can be differentiated any way, with all states in memory."""
    N, n = input.shape[0], Lambda.shape[0]
    h = recurrence(Lambda, torch.view_as_complex((input @ B.mT).unflatten(-1, (n, 2))), initial_state)
    start = h.new_zeros(N, n) if initial_state is None else initial_state
    return torch.view_as_real(h).flatten(-2) @ C.mT, h[:, -1] if h.shape[1] else start


@operator("kdkernels::state_space", visible=slice(2))
def layer(
    input: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, T, H), (n), (2n, H), (p, 2n), (N, n) -> y (N, T, p), h_T (N, n), and the states at the cuts (N, cuts, n)."""
    y, last, cuts = _outputs(input, Lambda, C)
    last.zero_() if initial_state is None else last.copy_(initial_state)
    room = _block(input, Lambda)
    with without_autocast():
        for rows, steps in _blocks(input, Lambda):
            start = None if initial_state is None else initial_state[rows]
            for k, part in enumerate(steps):
                if k:
                    start = cuts[rows, k - 1] = last[rows]
                _, h = _states(input[rows, part], Lambda, B, start, backend, room)
                torch.mm(_pairs(h), C.mT, out=y[rows, part].view(-1, C.shape[0]))
                last[rows] = h[:, -1]
    return y, last, cuts


@layer.register_fake
def _(
    input: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(input, Lambda, C)


@operator("kdkernels::state_space_backward")
def layer_backward(
    grad: Tensor,
    grad_last: Tensor,
    input: Tensor,
    Lambda: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cuts: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of the first five; those not in `needs` are None."""
    d_input, d_Lambda, d_B, d_C, d_initial = found = _rooms(input, Lambda, B, C, needs)
    for x in (d_B, d_C):
        x is None or x.zero_()
    sum_Lambda = torch.zeros_like(Lambda, dtype=torch.complex128)
    room, room_of_grads = _block(input, Lambda), _block(input, Lambda)
    with without_autocast():
        for rows, steps in _blocks(input, Lambda):
            arriving = grad_last[rows]
            for k, part in reversed(list(enumerate(steps))):
                start = cuts[rows, k - 1] if k else None if initial_state is None else initial_state[rows]
                u, h = _states(input[rows, part], Lambda, B, start, backend, room)
                dy = grad[rows, part].reshape(-1, C.shape[0])
                g = _as_states(torch.mm(dy, C, out=room_of_grads[: len(dy)]), h)
                g[:, -1] += arriving
                if d_C is not None:
                    d_C.addmm_(dy.mT, _pairs(h))
                wanted = [d_Lambda is not None, True, start is not None]
                part_Lambda, g, arriving = implementation(backend).backward(
                    g, Lambda.unsqueeze(0), h, start, False, wanted, in_place=True
                )
                if part_Lambda is not None:
                    sum_Lambda += part_Lambda[0]
                if d_B is not None:
                    d_B.addmm_(_pairs(g).mT, u)
                if d_input is not None:
                    torch.mm(_pairs(g), B, out=d_input[rows, part].view(-1, B.shape[1]))
            if d_initial is not None:
                d_initial[rows] = arriving
    if d_Lambda is not None:
        d_Lambda.copy_(sum_Lambda)
    return found  # type: ignore[return-value]


@layer_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    input: Tensor,
    Lambda: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cuts: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return _rooms(input, Lambda, B, C, needs)  # type: ignore[return-value]


def _outputs(input: Tensor, Lambda: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (N, T, _), n = input.shape, Lambda.shape[0]
    cuts = max(-(-T // _sizes(input, Lambda)[1]) - 1, 0)
    return input.new_empty(N, T, C.shape[0]), Lambda.new_empty(N, n), Lambda.new_empty(N, cuts, n)


def _rooms(input: Tensor, Lambda: Tensor, B: Tensor, C: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    (N, n), like = (input.shape[0], Lambda.shape[0]), (input, Lambda, B, C, Lambda)
    shapes = (input.shape, (n,), B.shape, C.shape, (N, n))
    return [x.new_empty(shape) if need else None for x, shape, need in zip(like, shapes, needs, strict=True)]


def _sizes(input: Tensor, Lambda: Tensor) -> tuple[int, int]:
    """Sequences and steps of a block: whole sequences, as many as fit, or as much of one as fits."""
    T = input.shape[1]
    steps = BLOCK_BYTES.get(input.device.type, BLOCK_BYTES_OF_OTHERS) // max(Lambda.shape[0] * Lambda.itemsize, 1)
    return max(steps // max(T, 1), 1), max(min(steps, T), 1)


def _blocks(input: Tensor, Lambda: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Sequences, and the steps of each of their blocks."""
    N, T, _ = input.shape
    sequences, steps = _sizes(input, Lambda)
    parts = [slice(t, min(t + steps, T)) for t in range(0, T, steps)]
    for i in range(0, N, sequences):
        yield slice(i, min(i + sequences, N)), parts


def _block(input: Tensor, Lambda: Tensor) -> Tensor:
    """Room for the states of one: (points, 2n)."""
    sequences, steps = _sizes(input, Lambda)
    return input.new_empty(min(sequences, input.shape[0]) * steps, 2 * Lambda.shape[0])


def _states(
    input: Tensor, Lambda: Tensor, B: Tensor, start: Tensor | None, backend: str, room: Tensor
) -> tuple[Tensor, Tensor]:
    """The inputs (points, H) and the states (N, T, n) of a block, which lie in the room."""
    u = input.reshape(-1, B.shape[1])
    x = torch.mm(u, B.mT, out=room[: len(u)])
    x = torch.view_as_complex(x.view(*input.shape[:2], -1, 2))
    return u, implementation(backend).forward(Lambda.unsqueeze(0), x, start, False, in_place=True)


def _as_states(pairs: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(*like.shape, 2))


def _pairs(states: Tensor) -> Tensor:
    """(points, 2n)."""
    return torch.view_as_real(states).view(-1, 2 * states.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor, _: Any) -> tuple[Any, ...]:
    if not torch._C._has_storage(grad):
        raise RuntimeError(BATCHED)
    *tensors, cuts = ctx.saved_tensors
    wanted = [bool(need) for need in needed(ctx)[:5]]
    if not torch.is_grad_enabled():
        found = layer_backward(grad, grad_last, *tensors, cuts, wanted, ctx.backend)
        return *(x if need else None for x, need in zip(found, wanted, strict=True)), None
    with torch.enable_grad(), without_autocast(grad):  # which is not what forward was under
        return *_composed_gradients(grad, grad_last, tensors, wanted, ctx.backend), None


def _composed_gradients(
    grad: Tensor, grad_last: Tensor, tensors: Sequence[Any], wanted: Sequence[bool], backend: str
) -> list[Tensor | None]:
    """To be differentiated again: by way of all the states."""
    input, Lambda, B, C, initial = tensors
    outputs = composed(
        input, Lambda, B, C, initial, lambda *x: linear_recurrence(x[0][None], x[1], x[2], False, backend)
    )
    leaves = [x for x, need in zip(tensors, wanted, strict=True) if need]
    reached, grads = zip(
        *((y, g) for y, g in zip(outputs, (grad, grad_last), strict=True) if y.requires_grad), strict=True
    )
    parts = iter(torch.autograd.grad(reached, leaves, grads, create_graph=True, allow_unused=True))
    return [next(parts) if need else None for need in wanted]


layer.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError("state_space's accelerated backward is differentiated by composing, not by itself")


layer_backward.register_autograd(_refuse)
