"""What the tests of kdtrainer compress share: a tiny run."""

import pytest
from trainer import path_of, printed_by, run_here

from kdtrainer import checkpoint
from kdtrainer.compress import plots, training

STEPS, STATES, REDUCTIONS = 24, 10, [4, 7, 11, 14]
TINY = (
    *("--length", "16", "--states", STATES, "--features", "4", "--steps", STEPS, "--batch", "16", "--threads", "1"),
    *("--tolerance", "0.2", "--reduction-share", "0.6", "--checkpoint-every", "5", "--evaluate-every", "12"),
)
SHORT = (*TINY, "--compare", "uncompressed,modal")
TASKS = ("seed0-compressed", "seed0-uncompressed", "seed0-modal")


def compress(*arguments):
    return run_here(*arguments, experiment="compress")


def draw_nothing(patched):
    """Plots take longer than such training."""
    for name in ("spectra", "over_time"):
        patched.setattr(plots, name, lambda *_: None)


def quietly(*arguments, draw=False):
    """Run it, and return what it printed."""
    with pytest.MonkeyPatch.context() as patched:
        if not draw:
            draw_nothing(patched)
        return printed_by(compress, *arguments)


def progress_of(out, task):
    return checkpoint.progress_of(path_of(out, task), training.Progress)


def run_short(out):
    """What an interrupted run is compared with."""
    quietly(*SHORT, "--out", out)
    events = progress_of(out, TASKS[0]).reductions
    assert [e["step"] for e in events] == REDUCTIONS
    assert all(e["states"] < e["before"] for e in events[:2]), "the first two reductions must take states away"
    return out
