"""For every test: memory that nobody wrote reads as NaN, and the same number of threads."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from forks import ROOT, environment_of, finished, shared

from kdkernels import _native
from kdkernels.testing.compare import poisoned_memory

ISAS = ("avx512", "avx2", "baseline")
# A process that takes a file takes all of it: one of these at the end would leave the other processes without work.
LONGEST = ("test_mutations_triton", "test_mutations_native", "test_triton_aot", "test_cli", "test_cuda_host")
BF16_ISAS = ("amx", "avx512_bf16")  # avx512 and instructions for bfloat16


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Two threads that compete with another process for two cores spin; tests are small enough for one."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set, for this test: parametrize it indirectly with ISAS."""
    module = _native.module()
    if request.param not in module.isas():
        pytest.skip(f"this processor or build has no {request.param}")
    before = module.isa()
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)


@pytest.fixture
def environment() -> dict[str, str]:
    """For a Python of its own, in this checkout."""
    return environment_of(ROOT)


@pytest.fixture
def python() -> Callable[..., CompletedProcess[str]]:
    """`python(environment, *arguments)`: a program in a process of its own, which need not import torch anew."""
    return lambda environment, *arguments, check=False: finished(shared()(environment, *arguments, cwd=ROOT), check)


@pytest.fixture
def package_without_module(tmp_path: Path) -> Path:
    """A folder with a copy of the package whose compiled module cannot be loaded."""
    shutil.copytree(ROOT / "kdkernels", tmp_path / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # an editable install would still find the checkout's: this one stands before it
    (tmp_path / "kdkernels" / "_C.py").write_text("raise ImportError('undefined symbol: _ZTV')\n")
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests marked `gpu` need one; tests marked `native` need the compiled module."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    missing = _native.why_not()
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("native") and missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_configure(config: pytest.Config) -> None:
    """Markers of this suite."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "native: needs the compiled module")
    if sys.platform == "linux":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers beside two cores
