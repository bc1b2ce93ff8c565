"""Vocabularies of different size or order: which tokens the student and all teachers have in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kdkernels.contract import show
from kdkernels.ops.linear_distillation.call import Side

TRUNCATE = "truncate"
Vocabularies = Tensor | Sequence[Tensor | None] | str | None
Maps = list[Tensor | None] | None  # None: truncate

_checked: Any = WeakTensorKeyDictionary()  # map: its version, and what was found


def as_maps(vocab_map: Any, K: int) -> Maps:
    """One map or None for each teacher. Raises TypeError or ValueError for what is none."""
    if isinstance(vocab_map, str):
        if vocab_map != TRUNCATE:
            raise ValueError(f"vocab_map is {vocab_map!r}, but must be tensors, {TRUNCATE!r} or None")
        return None
    maps = [vocab_map] * K if vocab_map is None or isinstance(vocab_map, Tensor) else vocab_map
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"vocab_map is {type(vocab_map).__name__}, but must be tensors, {TRUNCATE!r} or None")
    if len(maps) != K:
        raise ValueError(f"vocab_map has {len(maps)} entries, but must have one for each of {K} teachers")
    return list(maps)


def common(
    V: int, teachers: Sequence[Side], maps: Maps, served: Sequence[int], like: Tensor, dtype: torch.dtype
) -> tuple[list[Side], Tensor | None]:
    """The teachers in `served` with their columns, and (V,) 1 where a token is not common to student and all, or None.

    Raises TypeError or ValueError for a map that does not fit, and where there are sizes that no map explains.
    """
    if maps is None:
        found = [teachers[k] for k in served]
        shared = min(V, *(side.vocabulary for side in found))
        return found, None if shared == V else (torch.arange(V, device=like.device) >= shared).to(dtype)
    found, missing = [], None
    for k in served:
        side, columns = teachers[k], maps[k]
        if columns is None:
            if side.vocabulary != V:
                raise ValueError(
                    f"teachers[{k}] has a vocabulary of {side.vocabulary}, but the student has {V}: say by vocab_map "
                    f"which tokens are the same, or {TRUNCATE!r} if the first ones are"
                )
            found.append(side)
            continue
        _check(columns, V, side.vocabulary, f"vocab_map of teachers[{k}]", like.device)
        absent = columns < 0
        missing = absent if missing is None else missing | absent
        found.append(side._replace(columns=columns.long()))
    if missing is None:
        return found, None
    if like.device.type == "cpu" and not torch.compiler.is_compiling() and bool(missing.all()):
        raise ValueError("vocab_map leaves no token that the student and all teachers have, but there must be one")
    return found, missing.to(dtype)


def _check(columns: Any, V: int, V_k: int, what: str, device: torch.device) -> None:
    """That a teacher's map fits. What it holds is looked at once, as long as it is not changed."""
    if not isinstance(columns, Tensor):
        raise TypeError(f"{what} is {type(columns).__name__}, but must be a torch.Tensor or None")
    if columns.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{what} has dtype {columns.dtype}, but must be int32 or int64")
    if tuple(columns.shape) != (V,):
        raise ValueError(
            f"{what} has shape {show(columns.shape)}, but must be ({V}), one for each token of the student"
        )
    if columns.device != device:
        raise ValueError(f"{what} is on {columns.device}, but student is on {device}: one device, please")
    if torch.compiler.is_compiling() or device.type == "meta":
        return
    state = None if columns.is_inference() else (columns._version, V_k)
    if state is not None and _checked.get(columns) == state:
        return
    largest = int(columns.max())
    if largest >= V_k:
        raise ValueError(f"{what} holds {largest}, but must be below {V_k}, the teacher's vocabulary, or -1")
    if state is not None:
        _checked[columns] = state
