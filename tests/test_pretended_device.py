"""Every output and gradient of every operator lives on the device of its inputs, whichever operands are absent."""

import json

import pytest
from conftest import ROOT

pytestmark = pytest.mark.native  # the CPU run that is compared with is that of the kernels

OPERATORS = {"projection_alignment_loss", "lora_linear", "linear_distillation_loss", "svd", "hankel_energy"}
OPERATORS.add("linear_recurrence")


def differences(python, environment, *options):
    """(case, what differs) of every case, in a process of its own."""
    done = python(environment, ROOT / "tests" / "pretending.py", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(tuple(map(str, case)), different) for *case, different in map(json.loads, done.stdout.splitlines())]


def test_every_operator_stays_on_its_device(python, environment):
    found = differences(python, environment)
    operators = {case[1].split()[0] for case, _ in found}
    assert len(found) > 1000 and operators > OPERATORS
    assert not [row for row in found if row[1]]


def test_one_gradient_on_the_cpu_is_caught(python, environment):
    found = differences(python, environment, "--mistake")
    assert {case[1].split()[0] for case, _ in found} > OPERATORS
    wrong = {case for case, text in found if text}
    assert wrong and all(case[1].startswith("projection_alignment_loss") for case in wrong)
    assert any("student_bias" in case[2] for case in wrong)
