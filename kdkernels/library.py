"""Operators that torch.library knows, and that are called without it where nothing watches.

Compilers, transforms, modes and tensor subclasses see an operator through torch.library. That costs some tenths of a
millisecond a call, and the first differentiable call of a process imports torch's compiler, which takes seconds. Where
none of them is at work, the same functions run as a plain `torch.autograd.Function`, and where no gradient is needed
as the plain function.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from kdkernels.plans import PLAIN, watching

All = slice(None)


def operator(name: str, visible: Callable[..., slice] | slice = All) -> Callable[[Callable[..., Any]], "Operator"]:
    """A decorator, as `torch.library.custom_op(name, mutates_args=())`.

    `visible` is, or says for the arguments, which of several outputs a call hands on. The others are for
    `setup_context` alone.
    """
    return lambda function: Operator(name, function, visible)


class Operator:
    """A function of tensors, lists of tensors and plain values. Its derivative, if it has one, is registered.

    Outputs and members of lists may be None: in torch's operator, `seen`, empty tensors stand in their place.
    """

    def __init__(self, name: str, function: Callable[..., Any], visible: Callable[..., slice] | slice = All) -> None:
        self.function = function
        self.visible = visible
        self.plain: Any = None
        self.seen = torch.library.custom_op(name, filled(function), mutates_args=())

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """As for `torch.library.custom_op`; outputs may be None here too."""
        self.seen.register_fake(filled(fake))

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Both as for `torch.library.custom_op`, but they ask `needs(ctx)` which gradients are needed."""
        self.seen.register_autograd(backward, setup_context=setup_context)
        function, handed = self.function, self._handed

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, arguments: tuple[Any, ...], needs: list[Any], *leaves: Tensor) -> Any:
                output = function(*arguments)
                ctx.needs = needs
                ctx.count = len(output) if isinstance(output, (list, tuple)) else 1
                ctx.is_list = isinstance(output, list)
                if setup_context is not None:
                    setup_context(ctx, arguments, output)
                found = handed(arguments, output)
                return tuple(found) if isinstance(found, list) else found

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
                all_grads = [*grads, *[None] * (ctx.count - len(grads))]
                found = backward(ctx, all_grads) if ctx.is_list else backward(ctx, *all_grads)
                result: list[Tensor | None] = [None, None]
                for grad, need in zip(found if isinstance(found, tuple) else (found,), ctx.needs, strict=True):
                    if need is True:
                        result.append(grad)
                    elif need:
                        members = [None] * len(need) if grad is None else grad
                        result += [g for g, wanted in zip(members, need, strict=True) if wanted]
                return tuple(result)

        self.plain = super(torch.autograd.Function, Plain).apply  # without a look for what torch.func left behind

    def __call__(self, *arguments: Any) -> Any:
        """The function's visible results."""
        return self.route(flattened(arguments))(*arguments)

    def route(self, tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
        """What a call on such tensors runs. It follows from what plans are found by, so plans keep it."""
        if watched(tensors):
            return self._by_library
        return self._by_autograd if self.plain is not None and differentiated(tensors) else self._directly

    def whole(self, *arguments: Any) -> Any:
        """All results, for a backward that may itself be differentiated."""
        tensors = flattened(arguments)
        if watched(tensors) or differentiated(tensors):
            return self.seen(*present(arguments))
        return self.function(*arguments)

    def _by_library(self, *arguments: Any) -> Any:
        return self._handed(arguments, self.seen(*present(arguments)))

    def _by_autograd(self, *arguments: Any) -> Any:
        needs, leaves = wanted(arguments)
        return self.plain(arguments, needs, *leaves)

    def _directly(self, *arguments: Any) -> Any:
        return self._handed(arguments, self.function(*arguments))

    def _handed(self, arguments: tuple[Any, ...], output: Any) -> Any:
        if self.visible is All:
            return output
        return output[self.visible if isinstance(self.visible, slice) else self.visible(*arguments)]


def needs(ctx: Any) -> Sequence[Any]:
    """Whether each argument needs its gradient: for a list of tensors a list, for what is no tensor anything."""
    return getattr(ctx, "needs", None) or ctx.needs_input_grad


def differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether some gradient may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def flattened(arguments: Iterable[Any]) -> list[Tensor | None]:
    """Tensors, and the members of lists that hold them."""
    flat: list[Tensor | None] = []
    for x in arguments:
        if isinstance(x, Tensor):
            flat.append(x)
        elif holds_tensors(x):
            flat += x
    return flat


def holds_tensors(x: Any) -> bool:
    """Whether it is a list that begins with a tensor, or with one that is absent."""
    return type(x) is list and bool(x) and (x[0] is None or isinstance(x[0], Tensor))


def present(arguments: Sequence[Any]) -> list[Any]:
    """The arguments with an empty tensor for each absent member of a list: torch.library's autograd knows no others."""
    found = []
    for x in arguments:
        if holds_tensors(x) and any(y is None for y in x):
            like = next(y for y in x if y is not None)
            x = [like.new_empty(0) if y is None else y for y in x]
        found.append(x)
    return found


def wanted(arguments: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """Whether each argument needs its gradient, of a list's members each, and the tensors that do."""
    needs: list[Any] = []
    leaves: list[Tensor] = []
    for x in arguments:
        if type(x) in PLAIN:  # no other tensors come here
            needs.append(x.requires_grad)
            if x.requires_grad:
                leaves.append(x)
        elif holds_tensors(x):
            flags = [y is not None and y.requires_grad for y in x]
            needs.append(flags)
            leaves += compress(x, flags)
        else:
            needs.append(None)
    return needs, leaves


def filled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with an empty tensor for every output that is None, on the device of its first tensor."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        output = function(*arguments)
        if not isinstance(output, (list, tuple)) or not any(x is None for x in output):
            return output
        like = next(x for x in flattened(arguments) if x is not None)
        return type(output)(like.new_empty(0) if x is None else x for x in output)

    return call


def watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a compiler, a transform, a mode or a tensor subclass must see what is done with these tensors.

    Tensors without storage are those of batches of gradients (`is_grads_batched`).
    """
    if watching():
        return True
    return any(x is not None and (type(x) not in PLAIN or not torch._C._has_storage(x)) for x in tensors)
