"""What the tests of kdtrainer share: short runs, here or in a process of their own, and how to stop them."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import shared

import kdkernels as kd
from kdtrainer import checkpoint, cli

QUICK = ("--teachers", "mlp,cnn", "--teacher-steps", "6", "--steps", "40", "--checkpoint-every", "4")
SHORT = (*QUICK, "--backend", "reference")
SHORT_STEPS = 2 * 6 + 3 * 40


class Killed(BaseException):
    """Nothing catches it: what is on the disk then is what a killed process leaves."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In-process runs set these; other test files should not notice."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def start(*arguments, experiment="digits", driver=(), alone=False):
    """`driver`: what Python runs instead of kdtrainer itself. A fork of one that has imported torch, or `alone`."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    command = [*(driver or ("-m", "kdtrainer")), experiment, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if not alone:
        return shared()(environment, *command, cwd=Path.cwd())
    command = [sys.executable, *command]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def run_here(*arguments, experiment="digits"):
    return cli.main([experiment, *map(str, arguments)])


def printed_by(run, *arguments):
    """Run it to its end, and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        assert run(*arguments) == cli.DONE
    return printed.getvalue()


def path_of(out, task):
    return out / "checkpoints" / f"{task}.safetensors"


def lines_of(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final_state(out):
    """Everything that must be the same bits: all tensors of all checkpoints, and the metrics."""
    checkpoints = {p.stem: checkpoint.read(p) for p in (out / "checkpoints").glob("*.safetensors")}
    return checkpoints, (out / "metrics.jsonl").read_bytes()


def assert_same_bits(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    for task, tensors in theirs[0].items():
        assert ours[0][task].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(ours[0][task][name], value), f"{task}: {name}"
    assert ours[1] == theirs[1], "metrics.jsonl"


def has_accelerated_backend():
    point = torch.empty(1, 2)
    return kd.explain(kd.projection_alignment_loss, point, point).backend != "reference"


needs_accelerated = pytest.mark.skipif(not has_accelerated_backend(), reason="only the reference serves here")


def at_call(monkeypatch, where, name, number, act, after=False):
    """Have the numbered call of a function act before, or after, it does what it does."""
    right, calls = getattr(where, name), []

    def wrapped(*arguments, **options):
        calls.append(name)
        if len(calls) == number and not after:
            act()
        found = right(*arguments, **options)
        if len(calls) == number and after:
            act()
        return found

    monkeypatch.setattr(where, name, wrapped)


def kill():
    raise Killed
