"""The one door to the compiled module.

Nothing is loaded until an operator needs it. If it cannot be loaded, the ImportError is kept: `auto` falls back to
the reference and says so once; a caller that asked for `native` by name gets the error.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch

HOW_TO_MEND = "reinstall with `pip install .` (a C++20 compiler is all it needs); `python -m kdkernels doctor` says more"


@cache
def load() -> tuple[ModuleType | None, ImportError | None]:
    """The compiled module, or the reason why there is none."""
    try:
        return importlib.import_module("kdkernels._C"), None
    except ImportError as error:
        return None, error


def module() -> ModuleType:
    """The compiled module. Raises ImportError, with the first cause, when it is missing."""
    native, error = load()
    if native is None:
        raise ImportError(f"kdkernels was installed without its compiled module: {HOW_TO_MEND}") from error
    return native


@torch.compiler.assume_constant_result  # what is installed does not change while a graph lives
def why_not() -> str | None:
    """None when the compiled module is there, else the reason in one line."""
    error = load()[1]
    return None if error is None else f"the compiled module cannot be loaded ({error})"


@torch.compiler.assume_constant_result
@cache
def warn_missing() -> None:
    """Say once that operators run on the reference because the compiled module is missing."""
    warnings.warn(f"kdkernels runs on plain PyTorch: {why_not()}; {HOW_TO_MEND}", RuntimeWarning, stacklevel=2)
