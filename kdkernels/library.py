"""Operators that torch.library knows, and that are called without it where nothing watches.

Compilers, transforms, modes and tensor subclasses see an operator through torch.library. That costs some tenths of a
millisecond a call, and the first differentiable call of a process imports torch's compiler, which takes seconds. Where
none of them is at work, the same functions run as a plain `torch.autograd.Function`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def operator(name: str) -> Callable[[Callable[..., Any]], "Operator"]:
    """A decorator, as `torch.library.custom_op(name, mutates_args=())`."""
    return lambda function: Operator(name, function)


class Operator:
    """A function of tensors and plain values whose derivative, if it has one, is registered; `seen` is torch's."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.seen = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.seen.register_fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Both as for `torch.library.custom_op`."""
        self.seen.register_autograd(backward, setup_context=setup_context)
        function = self.function

        class Plain(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                if setup_context is not None:
                    setup_context(ctx, arguments, output)
                ctx.is_list = isinstance(output, list)
                return tuple(output) if ctx.is_list else output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, list(grads)) if ctx.is_list else backward(ctx, *grads)

        self.function = Plain.apply

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        call = self.seen if watched(x for x in arguments if isinstance(x, Tensor)) else self.function
        return call(*arguments)


def watched(tensors: Iterable[Tensor]) -> bool:
    """Whether a compiler, a transform, a mode or a tensor subclass must see what is done with these tensors.

    Tensors without storage are those of batches of gradients (`is_grads_batched`).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) not in (Tensor, torch.nn.Parameter) or not torch._C._has_storage(x) for x in tensors)
    )
