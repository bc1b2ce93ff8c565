"""The one door to the compiled module.

It is loaded with the package. Where it cannot be, the package says so once and runs on the reference; the ImportError
is kept for a caller that asks for `native` by name.
"""

import importlib
import warnings
from types import ModuleType

import torch

HOW_TO_MEND = "reinstall with `pip install .` (it needs a C++20 compiler); `python -m kdkernels doctor` says more"

_module: ModuleType | None = None
_error: ImportError | None = None
try:
    _module = importlib.import_module("kdkernels._C")
except ImportError as error:
    _error = error
    warnings.warn(
        f"kdkernels runs on plain PyTorch: its compiled module cannot be loaded ({error}); {HOW_TO_MEND}",
        RuntimeWarning,
        stacklevel=2,
    )


def module() -> ModuleType:
    """The compiled module. Raises ImportError, with the first cause, when it is missing."""
    if _module is None:
        raise ImportError(f"kdkernels was installed without its compiled module: {HOW_TO_MEND}") from _error
    return _module


def why_not() -> str | None:
    """None when the compiled module is there, else the reason in one line."""
    return None if _error is None else f"the compiled module cannot be loaded ({_error})"


def why_not_cuda() -> str | None:
    """None when the compiled module has CUDA kernels, else the reason in one line."""
    if _module is None:
        return why_not()
    return None if _module.cuda_architectures else "the compiled module was built without CUDA (KDKERNELS_CUDA)"


def launch(name: str, device: torch.device, *arguments: object) -> None:
    """Enqueue a CUDA kernel on torch's current stream, with the scratch memory that it wants."""
    function = getattr(module(), name)
    with torch.cuda.device(device):
        size = function(*arguments, None, 0)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        function(*arguments, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream)
