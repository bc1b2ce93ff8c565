"""`validate` fails when any one native kernel is wrong, built anew each time."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from mutations import NATIVE_KERNELS
from validating import check_noticed, check_passes, mutate, only, validator


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the sources, how to build the baseline kernels of it in place, and how to validate them.

    Nothing is optimized: compiling takes longer than validating.
    """
    if not all(map(shutil.which, ("cmake", "ninja"))):
        pytest.skip("building needs cmake and ninja")
    tree = tmp_path_factory.mktemp("built")
    for name in ("csrc", "kdkernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", tree)

    def build():
        subprocess.run(["ninja", "-C", tree / "build"], check=True, capture_output=True)
        (module,) = (tree / "build").glob("_C*.so")
        shutil.copy(module, tree / "kdkernels")

    options = ["-G", "Ninja", "-DKDKERNELS_ISAS=baseline", "-DKDKERNELS_OPTIMIZE=-O0", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    options += ["-DKDKERNELS_CUDA=off", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", tree, "-B", tree / "build", *options], check=True, capture_output=True)
    build()
    with validator(tree) as validate:
        yield tree, build, lambda *options: validate("--backend", "native", *options)


def test_the_unchanged_native_kernels_pass(built):
    check_passes(built[2]())


@pytest.mark.parametrize("mutation", NATIVE_KERNELS, ids=lambda m: m.kernel)
def test_a_wrong_native_kernel_is_noticed(mutation, built):
    tree, build, validate = built
    undo = mutate(tree, mutation)
    try:
        build()
        check_noticed(validate(*only(mutation)))
    finally:
        undo()
