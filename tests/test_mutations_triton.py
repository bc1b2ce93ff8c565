"""`validate` fails when any one Triton kernel is wrong, in Triton's interpreter."""

import re
import shutil

import pytest
from conftest import ROOT
from mutations import DISTILLATION_TRITON, LORA_TRITON, RECURRENCE_TRITON, TRITON, TRITON_KERNELS
from validating import check_noticed, check_passes, mutate, only, validator

from kdkernels.testing import SUITES

UNTOUCHED = ("triton", "kdkernels.cli.validate", *SUITES.values())  # what no mistake is put into, nor imports a kernel


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """A copy of the package without its compiled module, and how to validate Triton's kernels in it."""
    pytest.importorskip("triton")
    tree = tmp_path_factory.mktemp("interpreted")
    shutil.copytree(ROOT / "kdkernels", tree / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with validator(tree, *UNTOUCHED, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") as validate:
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
