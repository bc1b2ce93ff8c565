"""`validate` fails when any one kernel is wrong: each kernel is made wrong on purpose, one at a time, in a copy."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from mutations import LORA_TRITON, NATIVE_KERNELS, TRITON, TRITON_KERNELS

VALIDATE = (sys.executable, "-m", "kdkernels", "validate", "--exitfirst")
FAILED = re.compile(r"\b[1-9]\d* failed")


def mutate(tree, mutation):
    """Write the mistake, and return what undoes it."""
    path = tree / mutation.file
    source = path.read_text()
    assert source.count(mutation.right) == 1, f"{mutation.file} no longer says once: {mutation.right}"
    path.write_text(source.replace(mutation.right, mutation.wrong))
    return lambda: path.write_text(source)


def validate(tree, environment, *options):
    environment = environment | {"PYTHONPATH": str(tree)}
    return subprocess.run([*VALIDATE, *options], cwd=tree, env=environment, capture_output=True, text=True)


def only(mutation):
    """The checks of the operators that the mutated file belongs to."""
    return [option for op in mutation.ops for option in ("--op", op)]


def check_noticed(result):
    assert result.returncode == 1, result.stdout + result.stderr
    assert FAILED.search(result.stdout), result.stdout + result.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A copy of the package without its compiled module, and how to validate Triton's kernels in it."""
    pytest.importorskip("triton")
    tree = tmp_path_factory.mktemp("interpreted")
    shutil.copytree(ROOT / "kdkernels", tree / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tree


@pytest.fixture
def interpreting(environment):
    return environment | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}


def test_every_triton_kernel_has_a_mistake():
    kernels = [
        (file, kernel)
        for file in (TRITON, LORA_TRITON)
        for kernel in re.findall(r"@triton\.jit\ndef (\w+)", (ROOT / file).read_text())
    ]
    assert kernels == [(mutation.file, mutation.kernel) for mutation in TRITON_KERNELS]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kdkernels").rglob("triton.py")}
    assert files == {TRITON, LORA_TRITON}


def test_the_unchanged_triton_kernels_pass(interpreted, interpreting):
    result = validate(interpreted, interpreting, "--backend", "triton", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutation", TRITON_KERNELS, ids=lambda m: m.kernel)
def test_a_wrong_triton_kernel_is_noticed(mutation, interpreted, interpreting):
    undo = mutate(interpreted, mutation)
    try:
        check_noticed(validate(interpreted, interpreting, "--backend", "triton", "--quick", *only(mutation)))
    finally:
        undo()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the sources, and how to build the baseline kernels of it in place."""
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

    options = ["-G", "Ninja", "-DKDKERNELS_ISAS=baseline", "-DKDKERNELS_OPTIMIZE=-O1"]
    options += [f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-S", tree, "-B", tree / "build", *options], check=True, capture_output=True)
    build()
    return tree, build


def test_the_unchanged_native_kernels_pass(built, environment):
    result = validate(built[0], environment, "--backend", "native")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutation", NATIVE_KERNELS, ids=lambda m: m.kernel)
def test_a_wrong_native_kernel_is_noticed(mutation, built, environment):
    tree, build = built
    undo = mutate(tree, mutation)
    try:
        build()
        check_noticed(validate(tree, environment, "--backend", "native", "--quick", *only(mutation)))
    finally:
        undo()
