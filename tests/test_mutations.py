"""`validate` fails when any one kernel is wrong: each kernel is made wrong on purpose, one at a time, in a copy."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import ROOT, environment_of
from mutations import DISTILLATION_TRITON, LORA_TRITON, NATIVE_KERNELS, RECURRENCE_TRITON, TRITON, TRITON_KERNELS

VALIDATE = ("validate", "--quick", "--exitfirst")
FAILED = re.compile(r"\b[1-9]\d* failed")

# Importing torch takes longer than finding most mistakes: it is imported once, and each validation runs in a fork.
FORKS = """
import json, os, sys, tempfile, traceback
import torch

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                from kdkernels.__main__ import main
                code = main(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed.seek(0)
        print(json.dumps([code, printed.read()]), flush=True)
"""


@contextmanager
def validator(tree, **environment):
    """`python -m kdkernels validate` in the tree, as a function of its options that returns its code and its print."""
    environment = environment_of(tree) | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def validate(*options):
            process.stdin.write(json.dumps([*VALIDATE, *options]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield validate
        process.stdin.close()


def mutate(tree, mutation):
    """Write the mistake, and return what undoes it."""
    path = tree / mutation.file
    source = path.read_text()
    assert source.count(mutation.right) == 1, f"{mutation.file} no longer says once: {mutation.right}"
    path.write_text(source.replace(mutation.right, mutation.wrong))
    return lambda: path.write_text(source)


def only(mutation):
    """The checks of the operators that the mutated file belongs to."""
    return [option for op in mutation.ops for option in ("--op", op)]


def check_passes(result):
    code, printed = result
    assert code == 0, printed


def check_noticed(result):
    code, printed = result
    assert code == 1 and FAILED.search(printed), printed


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A copy of the package without its compiled module, and how to validate Triton's kernels in it."""
    pytest.importorskip("triton")
    tree = tmp_path_factory.mktemp("interpreted")
    shutil.copytree(ROOT / "kdkernels", tree / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with validator(tree, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") as validate:
        yield tree, lambda *options: validate("--backend", "triton", *options)


def test_every_triton_kernel_has_a_mistake():
    kernels = [
        (file, kernel)
        for file in (TRITON, LORA_TRITON, DISTILLATION_TRITON, RECURRENCE_TRITON)
        for kernel in re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)", (ROOT / file).read_text())
    ]
    assert kernels == [(mutation.file, mutation.kernel) for mutation in TRITON_KERNELS]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kdkernels").rglob("kernels.py")}
    assert files == {TRITON, LORA_TRITON, DISTILLATION_TRITON, RECURRENCE_TRITON}


def test_the_unchanged_triton_kernels_pass(interpreted):
    check_passes(interpreted[1]())


@pytest.mark.parametrize("mutation", TRITON_KERNELS, ids=lambda m: m.kernel)
def test_a_wrong_triton_kernel_is_noticed(mutation, interpreted):
    tree, validate = interpreted
    undo = mutate(tree, mutation)
    try:
        check_noticed(validate(*only(mutation)))
    finally:
        undo()


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
