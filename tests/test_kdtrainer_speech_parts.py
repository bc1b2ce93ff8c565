"""kdtrainer speech: its utterances and their its recognisers, and recordings of the user's own."""

import hashlib
import json
import os
import sys
import time
import wave
from concurrent.futures import Future
from functools import partial
from queue import Queue
from threading import Event

import numpy as np
import pytest
import torch
from trainer import one_thread  # noqa: F401

pytest.importorskip("espeakng_loader")
pytest.importorskip("jiwer")

from speaking import SHORT, TEACHERS, UTTERANCE, assert_same_utterances, files_of_five, quietly, speech  # noqa: F401

from kdtrainer import checkpoint, cli
from kdtrainer.errors import RunError
from kdtrainer.ranks import ALONE
from kdtrainer.speech import corpus, distill, features, folder, models, pool, run, synthesis, text
from kdtrainer.speech.config import LESSONS, Config

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# Utterances


def test_an_utterance_is_the_same_after_others_and_in_another_process(python):
    """Random voices included: espeak-ng seeds itself by the time."""
    others = [synthesis.Utterance("left right", "en", name, 150, 50, None, 0.0, 0) for name in ("f2", "caleb", "Reed")]
    first = [synthesis.render(each)[0] for each in (UTTERANCE, *others)]
    again = [synthesis.render(each)[0] for each in (*reversed(others), UTTERANCE)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    code = (
        "import sys, hashlib; from kdtrainer.speech.synthesis import *\n"
        "for u in eval(sys.argv[1]): print(hashlib.sha256(render(u)[0].tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    time.sleep(1.1)  # another time, in seconds
    found = python(environment, "-c", code, [UTTERANCE, *others], check=True).stdout.split()
    assert found == [hashlib.sha256(each.tobytes()).hexdigest() for each in first]


def test_utterances_are_what_they_say():
    drawn = {split: [synthesis.draw(split, k, seed=0) for k in range(200)] for split in ("train", "test", "clean")}
    assert drawn["train"] == [synthesis.draw("train", k, seed=0) for k in range(200)]
    assert drawn["train"] != [synthesis.draw("train", k, seed=1) for k in range(200)]
    voices = {split: {u.variant for u in found} for split, found in drawn.items()}
    assert not voices["train"] & voices["test"] and voices["clean"] == {""}
    assert voices["train"] | voices["test"] <= synthesis.variants()
    assert {u.decibels for u in drawn["clean"]} == {None}
    for utterance in (u for found in drawn.values() for u in found):
        assert set(utterance.text.split()) <= set(synthesis.WORDS) and 3 <= len(utterance.text.split()) <= 7
        assert text.normalised(utterance.text) == utterance.text


def test_voices_that_are_not_there_are_refused():
    with pytest.raises(RunError, match="no variant 'nobody'"):
        synthesis.speak(synthesis.Utterance("one", "en", "nobody", 150, 50, None, 0.0, 0))
    with pytest.raises(RunError, match=r"no voice 'en-xx\+f1'"):
        synthesis.speak(synthesis.Utterance("one", "en-xx", "f1", 150, 50, None, 0.0, 0))


def test_noise_is_as_loud_as_it_says():
    plain = synthesis.render(synthesis.Utterance("one two", "en", "f1", 150, 50, None, 0.0, 0))[0]
    noisy = synthesis.render(synthesis.Utterance("one two", "en", "f1", 150, 50, 10.0, 1.5, 7))[0]
    ratio = synthesis.loudness(noisy - plain) / synthesis.loudness(plain)
    assert ratio == pytest.approx(10**-0.5, rel=1e-3)


# Features and text


def test_a_tone_is_in_the_same_band_at_every_sampling_rate():
    bands = set()
    for rate in (16000, 22050, 44100):
        tone = torch.sin(2 * np.pi * 1000 * torch.arange(rate) / rate)
        found = features.log_mel(tone, rate)
        assert found.shape[1] == features.BANDS and abs(len(found) - 100) <= 2
        bands |= set(found[5:-5].argmax(1).tolist())
    assert len(bands) == 1


@pytest.mark.parametrize("samples", [1, 500, 22050])
def test_features_are_finite_and_normalised(samples):
    wave = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    found = features.of_wave(wave, 22050)
    assert found.isfinite().all() and len(found) >= 1 and found.shape[1] == features.FEATURES
    if samples == 22050:
        bands = found.reshape(-1, features.BANDS)
        assert bands.mean(0).abs().max() < 0.05 and (bands.square().mean(0) - 1).abs().max() < 0.05


def test_the_best_path_is_read_without_blanks_and_repetitions():
    classes = [text.CLASS_OF[c] if c != "_" else text.BLANK for c in "__oon_nn_e  _e"]
    logits = torch.nn.functional.one_hot(torch.tensor(classes), text.CLASSES).float()
    assert text.greedy(logits, len(classes)) == "onne e"
    assert text.greedy(logits, 3) == "o"
    assert text.word_error_rate(["one two three four"], ["one too three"]) == 0.5
    assert text.normalised("  It’s TWO-fold, 3\n") == "it's two fold"
    assert text.frames_needed("three") == 6


# Recognisers


@pytest.mark.parametrize("name", [*models.TEACHERS, "student"])
def test_what_is_beyond_an_utterance_reaches_none_of_its_frames(name):
    torch.manual_seed(0)
    model = models.student() if name == "student" else models.TEACHERS[name]()
    model.eval()
    frames, lengths = torch.randn(2, 20, features.FEATURES), torch.tensor([20, 13])
    with torch.no_grad():
        alone = model.states(frames[1:, :13], lengths[1:])
        together = model.states(frames, lengths)
    for one, both, width in zip(alone, together, model.widths, strict=True):
        assert one.shape == (1, 13, width)
        torch.testing.assert_close(both[1, :13], one[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_trains_adapters_and_projectors_alone(name):
    torch.manual_seed(0)
    heard = corpus.Utterances([torch.randn(30, features.FEATURES) for _ in range(6)], ["one two"] * 6)
    config = Config(labels=2, batch=3, labelled_batch=2, backend="reference")
    base = models.student()
    taught = {each: distill.taught_by(models.TEACHERS[each](), heard) for each in TEACHERS}
    task = distill.student_task(name, LESSONS[name], base, heard, heard, taught, config, ALONE)
    with torch.no_grad():
        frames, lengths = heard.frames[0][None], torch.tensor([30])
        found = task.trained.student.eval()(frames, lengths)
        assert torch.equal(found, base.eval()(frames, lengths)), "an adapter starts at 0"
    task.trained.student.train()
    losses = task.losses(*task.draw())
    losses["loss"].backward()
    trained = {each for each, p in task.trained.named_parameters() if p.requires_grad}
    assert trained == {each for each, p in task.trained.named_parameters() if p.grad is not None}
    assert all(".lora_" in each for each in trained if each.startswith("student."))
    lesson = LESSONS[name]
    assert ("alignment" in losses) == (lesson.metric is not None)
    assert ("soft_targets" in losses) == lesson.soft_targets
    parts = sum(value for part, value in losses.items() if part != "loss")
    torch.testing.assert_close(losses["loss"], parts)
    count = sum(p.numel() for p in task.trained.parameters() if p.requires_grad)
    assert count == distill.student_of(TEACHERS, lesson, config)
    assert count < 0.01 * sum(p.numel() for each in taught.values() for p in each.teacher.parameters())


# The cache


def test_a_damaged_file_is_made_again_and_the_others_stay(tmp_path, capsys):
    sources = corpus.synthetic("train", 12, 0)
    assert [len(source.made_from) for source in sources] == [5, 5, 2]
    paths = [source.path(tmp_path) for source in sources]
    for source in sources:
        corpus.make(source, tmp_path)
    first = [corpus.load([path]) for path in paths]
    content = bytearray(paths[1].read_bytes())
    content[-100] ^= 1
    paths[1].write_bytes(content)
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    whole = [corpus.is_whole(path) for path in paths]
    assert whole == [True, False, False] and not paths[1].exists()
    assert capsys.readouterr().out.count("was damaged: it is made again") == 2
    for source in sources[1:]:
        corpus.make(source, tmp_path)
    for path, before in zip(paths, first, strict=True):
        assert_same_utterances(path, before)
    assert corpus.load(paths).texts == [synthesis.draw("train", k, 0).text for k in range(12)]
    assert {source.path(tmp_path) for source in corpus.synthetic("train", 12, 1)}.isdisjoint(paths)
    paths[0].write_bytes(paths[1].read_bytes())  # whole, but another's
    assert not corpus.is_whole(paths[0])


# The user's own recordings


def record(path, utterance, rate=22050, width=2):
    samples, _ = synthesis.render(utterance)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, width, rate, 0, "NONE", ""))
        file.writeframes((samples * 2 ** (8 * width - 1) * 0.5).astype(f"<i{width}").tobytes())


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.fixture
def own(tmp_path):
    chapter = tmp_path / "own" / "12" / "34"
    chapter.mkdir(parents=True)
    lines = []
    for k in range(8):
        utterance = synthesis.draw("train", k, 5)
        record(chapter / f"12-34-{k:04d}.wav", utterance, width=4 if k else 2)
        lines.append(f"12-34-{k:04d} {utterance.text.upper()}\n")
    (chapter / "12-34.trans.txt").write_text("".join(lines))
    return tmp_path / "own"


def test_recordings_of_the_users_own(own, cache, tmp_path):
    found = folder.recordings(own)
    assert [each["text"] for each in found] == [synthesis.draw("train", k, 5).text for k in range(8)]
    for k in (0, 1):
        heard, rate = folder.read(found[k])
        assert rate == 22050
        np.testing.assert_allclose(heard, 0.5 * synthesis.render(synthesis.draw("train", k, 5))[0], atol=1e-4)
    out = tmp_path / "out"
    quietly(*SHORT, "--data", own, "--out", out, "--cache", cache)
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["data"] == str(own) and set(report["students"]) == {"labels", "both"}
    sources = run.sources_of(Config(data=str(own), train=12, test=4))
    parts = [{each["path"] for source in part for each in source.made_from} for part in sources[:2]]
    assert [len(part) for part in parts] == [6, 2] and len(set.union(*parts)) == 8


def test_speakers_are_held_back_as_a_whole():
    found = [{"path": f"/data/{speaker}-1-{k:04d}.wav"} for speaker in range(10) for k in range(speaker + 1)]
    for seed in range(5):
        train, test = folder.held_back(found, 0.2, seed)
        names = [{each["path"].split("-")[0] for each in part} for part in (train, test)]
        assert names[0].isdisjoint(names[1]) and len(train) + len(test) == len(found) and len(test) >= 11
    assert folder.held_back(found, 0.2, 0) != folder.held_back(found, 0.2, 1)
    assert len({each["path"].split("-")[0] for each in folder.held_back(found, 0.99, 0)[0]}) == 1
    alone = [{"path": f"/data/7-1-{k:04d}.wav"} for k in range(10)]
    train, test = folder.held_back(alone, 0.2, 0)
    assert len(test) == 2 and sorted(each["path"] for each in (*train, *test)) == [each["path"] for each in alone]


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda chapter: (chapter / "12-34-0001.wav").unlink(), "names 12-34-0001, but no 12-34-0001.wav or"),
        (lambda chapter: (chapter / "12-34-0001.wav").write_bytes(b"RIFF"), "12-34-0001.wav is no WAV file"),
        (lambda chapter: cut(chapter / "12-34-0001.wav"), "12-34-0001.wav ends within a sample"),
        (lambda chapter: (chapter / "12-34.trans.txt").write_bytes(b"12-34-0001 \xe9t\xe9\n"), "is no text in UTF-8"),
        (lambda chapter: (chapter / "12-34.trans.txt").write_text("12-34-0001 42\n"), "has no words for 12-34-0001"),
        (lambda chapter: (chapter / "12-34.trans.txt").unlink(), "has no .trans.txt file"),
        (lambda chapter: record(chapter / "12-34-0001.wav", UTTERANCE, 8000), "has 8000 samples a second"),
    ],
)
def test_recordings_that_cannot_be_read_are_named(own, cache, tmp_path, capsys, spoil, said):
    """And the run that is there stays."""
    kept = tmp_path / "out" / "checkpoints" / "seed0-base.safetensors"
    checkpoint.write(kept, {}, {})
    spoil(own / "12" / "34")
    assert speech(*SHORT, "--data", own, "--out", tmp_path / "out", "--cache", cache) == cli.REFUSED
    assert said in capsys.readouterr().err and kept.exists()


def test_flac_needs_a_package(own, monkeypatch):
    chapter = own / "12" / "34"
    (chapter / "12-34-0001.wav").rename(chapter / "12-34-0001.flac")
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"12-34-0001\.flac: soundfile must be installed"):
        folder.read(folder.recordings(own)[1])


def test_what_a_worker_says_late_is_nobody_elses():
    """A job's end may overtake its reports in their queue: the last one is not lost, nor taken for the next job's."""
    ended = Future()
    ended.set_result((3, 0.25))
    steps, heard = Queue(), []

    def on_step(name, step, loss):
        heard.append((name, step, loss))

    def follow(number, name):
        failures = pool.follow({ended: (number, partial(on_step, name))}, steps, Event(), lambda: False)
        assert failures == []

    follow(0, "first")
    steps.put((0, (2, 0.5)))
    steps.put((0, (3, 0.25)))
    follow(1, "second")
    assert heard == [("first", 3, 0.25), ("second", 3, 0.25)]
