"""What is decided once for a kind of call: that its arguments fit, and what serves it.

Checks and choices depend on what tensors are, not on what they hold. A training loop asks the same again at every
step, so the answer is kept by what it was made from. Where something watches the call, or sizes are symbols, it is made
anew.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST = 1024  # kinds kept; sizes that never repeat must not fill the memory
PLAIN = (Tensor, torch.nn.Parameter)

Decision = TypeVar("Decision")


class Plans:
    """The decisions of one operator."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def find(self, tensors: Sequence[Any], options: tuple[Any, ...], decide: Callable[[], Decision]) -> Decision:
        """`decide()`, or what it returned for tensors of the same kind and equal options of the same types.

        What raises is not kept, nor is it where an option cannot be hashed.
        """
        if not undisturbed():
            return decide()
        try:
            key = (*options, *map(type, options), *map(kind, tensors))
            found = self._made.get(key)
        except (AttributeError, RuntimeError, TypeError):  # no tensor, or none with a shape: `decide` says so
            return decide()
        if found is None:
            found = decide()
            if len(self._made) >= MOST:
                self._made.clear()
            self._made[key] = found
        return found


def kind(x: Any) -> Any:
    """All that a decision may ask of an operand."""
    if x is None:
        return None
    return type(x), x.shape, x.dtype, x.device, x.layout, x.requires_grad


def watching() -> bool:
    """Whether a compiler, a transform or a mode must see what is done."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def undisturbed() -> bool:
    """Whether nobody is watching, no tracer or forward derivative either: decisions depend on them."""
    return not (watching() or forward_ad._current_level >= 0 or torch._C._get_tracing_state())
