"""Triton's interpreter beside its compiler, in one process.

Triton decides when a kernel is defined whether it will be interpreted, and TRITON_INTERPRET=1 would decide so for the
whole process, in which test_triton_aot.py compiles the same kernels. So `interpreted_module` defines them a second
time, from the same file, with interpretation on, to be put in the place of the first for some tests only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def interpreted_module(name: str) -> Iterator[ModuleType]:
    """An operator's Triton module with interpreted kernels."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    patch_language = interpreter._patch_lang
    ours = [  # `tl.sum`, `tl.philox` and their like were defined when triton was imported
        (part, name, interpreter.InterpretedFunction(x.fn))
        for part in (tl, tl.random, tl.standard)
        for name, x in vars(part).items()
        if isinstance(x, JITFunction)
    ]

    def patch_whole_language(kernel: Any) -> Any:
        """Triton patches as it goes, and what a nested call patched stays so: patch all at once, to be undone whole."""
        scope = patch_language(kernel)
        interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(tl.core, scope)
        for part, name, function in ours:
            scope.set_attr(part, name, function)
        return scope

    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        kernels = f"{name.rpartition('.')[0]}.kernels"  # some operators have them in a file of their own
        if find_spec(kernels) is not None:
            with pytest.MonkeyPatch.context() as while_importing:
                again = _again(kernels)
                while_importing.setitem(sys.modules, kernels, again)
                while_importing.setattr(sys.modules[kernels.rpartition(".")[0]], "kernels", again, raising=False)
                module = _again(name)
        else:
            module = _again(name)
        patch.setattr(interpreter, "_patch_lang", patch_whole_language)
        patch.setattr(
            interpreter.InterpretedFunction, "__call__", lambda self, *x, **named: self.rewrite()(*x, **named)
        )
        yield module


def _again(name: str) -> ModuleType:
    """A module's file, executed once more."""
    spec = find_spec(name)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_in_place(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Where the operator looks for it, which it does only once."""
    patch.setitem(sys.modules, module.__name__, module)
    package = module.__name__.rpartition(".")[0]
    for part in [x for name, x in sys.modules.items() if name.startswith(f"{package}.")]:
        for name in ("implementation", "_implementation"):
            if found := getattr(part, name, None):
                patch.setattr(part, name, lambda backend, f=found: module if backend == "triton" else f(backend))
