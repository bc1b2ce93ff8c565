"""What the tests of kdtrainer speech share: a tiny run, and its cache."""

from functools import partial

import pytest
import torch
from trainer import printed_by, run_here

from kdtrainer.speech import corpus, plots, synthesis

STEPS, TEACHERS = 2, ("convolutional", "transformer", "state-space")
SMALL = ("--train", 12, "--test", 4, "--clean", 4, "--labels", 4, "--batch", 3, "--labelled-batch", 2, "--threads", 1)
TINY = (*SMALL, "--teacher-steps", STEPS, "--base-steps", STEPS, "--steps", STEPS, "--checkpoint-every", 1)
ROWS = ("labels", "hidden-mse-one", "cosine-mlp", "both")
SHORT = (*TINY, "--seeds", 1, "--compare", "both", "--workers", 1)
TASKS = (*(f"teacher-{name}" for name in TEACHERS), "seed0-base", "seed0-labels", "seed0-both")
UTTERANCE = synthesis.draw("train", 3, seed=0)


@pytest.fixture(autouse=True)
def files_of_five(monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 5)


def speech(*arguments, draw=False):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus, "SHARD", 5)
        if not draw:
            patched.setattr(plots, "error_rates", lambda *_: None)
        return run_here(*arguments, experiment="speech")


def quietly(*arguments, draw=False):
    """Run it, and return what it printed."""
    return printed_by(partial(speech, draw=draw), *arguments)


def assert_same_utterances(path, expected):
    found = corpus.load([path])
    assert found.texts == expected.texts
    assert all(torch.equal(a, b) for a, b in zip(found.frames, expected.frames, strict=True))
