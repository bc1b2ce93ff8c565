"""What the tests of kdtrainer compress share: a tiny run, and how to stop it."""

import contextlib
import io

import pytest
from trainer import run_here

from kdtrainer import checkpoint, cli
from kdtrainer.compress import plots, training

STEPS, STATES, REDUCTIONS = 24, 10, [4, 7, 11, 14]
TINY = (
    *("--length", "16", "--states", STATES, "--features", "4", "--steps", STEPS, "--batch", "16", "--threads", "1"),
    *("--tolerance", "0.2", "--reduction-share", "0.6", "--checkpoint-every", "5", "--evaluate-every", "12"),
)
SHORT = (*TINY, "--compare", "uncompressed,modal")
TASKS = ("seed0-compressed", "seed0-uncompressed", "seed0-modal")


class Killed(BaseException):
    """Nothing catches it: what is on the disk then is what a killed process leaves."""


def compress(*arguments):
    return run_here(*arguments, experiment="compress")


def draw_nothing(patched):
    """Plots take longer than such training."""
    for name in ("spectra", "over_time"):
        patched.setattr(plots, name, lambda *_: None)


def quietly(*arguments, draw=False):
    """Run it, and return what it printed."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.MonkeyPatch.context() as patched,
    ):
        if not draw:
            draw_nothing(patched)
        assert compress(*arguments) == cli.DONE
    return printed.getvalue()


def path_of(out, task):
    return out / "checkpoints" / f"{task}.safetensors"


def progress_of(out, task):
    return checkpoint.progress_of(path_of(out, task), training.Progress)


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


def run_short(out):
    """What an interrupted run is compared with."""
    quietly(*SHORT, "--out", out)
    events = progress_of(out, TASKS[0]).reductions
    assert [e["step"] for e in events] == REDUCTIONS
    assert all(e["states"] < e["before"] for e in events[:2]), "the first two reductions must take states away"
    return out
