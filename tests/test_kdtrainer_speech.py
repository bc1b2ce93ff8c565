"""kdtrainer speech: its utterances and their cache, its recognisers, whole runs and their resumption."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from dataclasses import asdict

import numpy as np
import pytest
import torch
from compressing import Killed, at_call, kill
from trainer import assert_same_bits, final_state, finish, needs_accelerated, one_thread, run_here, start  # noqa: F401

pytest.importorskip("espeakng_loader")
pytest.importorskip("jiwer")

from kdtrainer import checkpoint, cli, metrics
from kdtrainer.errors import RunError
from kdtrainer.speech import corpus, distill, features, folder, models, plots, run, synthesis, text
from kdtrainer.speech.config import LESSONS, Config

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def speech(*arguments, draw=False):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpus, "SHARD", 5)
        if not draw:
            patched.setattr(plots, "error_rates", lambda *_: None)
        return run_here(*arguments, experiment="speech")


def quietly(*arguments, draw=False):
    """Run it, and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        assert speech(*arguments, draw=draw) == cli.DONE
    return printed.getvalue()


def path_of(out, task):
    return out / "checkpoints" / f"{task}.safetensors"


@pytest.fixture(scope="module")
def everything(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("everything")
    arguments = ("--seeds", 2, "--compare", ",".join(ROWS), "--workers", 2, "--out", out, "--cache", cache)
    return out, quietly(*TINY, *arguments, draw=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("uninterrupted")
    quietly(*SHORT, "--out", out, "--cache", cache)
    return out


# Utterances


def test_an_utterance_is_the_same_after_others_and_in_another_process():
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
    command = [sys.executable, "-c", code, repr([UTTERANCE, *others])]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
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
    task = distill.student_task(name, LESSONS[name], base, heard, heard, taught, config)
    with torch.no_grad():
        frames, lengths = heard.frames[0][None], torch.tensor([30])
        found = task.trained.student.eval()(frames, lengths)
        assert torch.equal(found, base.eval()(frames, lengths)), "an adapter starts at 0"
    task.trained.student.train()
    losses = task.losses()
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


def assert_same_utterances(path, expected):
    found = corpus.load([path])
    assert found.texts == expected.texts
    assert all(torch.equal(a, b) for a, b in zip(found.frames, expected.frames, strict=True))


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


def test_generation_goes_on_where_it_was_killed(uninterrupted, cache, tmp_path, monkeypatch):
    own = tmp_path / "cache"
    with monkeypatch.context() as patched:
        at_call(patched, corpus.checkpoint, "write", 3, kill)
        with pytest.raises(Killed):
            speech(*SHORT, "--out", tmp_path / "out", "--cache", own)
    made = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    assert len(made) == 2
    damaged = next(iter(made))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert speech(*SHORT, "--out", tmp_path / "out", "--cache", own, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path / "out"), final_state(uninterrupted))
    for path, when in made.items():
        assert (path.stat().st_mtime_ns == when) == (path != damaged)
        assert_same_utterances(path, corpus.load([cache / path.name]))


# Whole runs


def test_a_run_leaves_a_table_a_report_metrics_and_a_plot(everything):
    out, printed = everything
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["teachers"]] == list(TEACHERS)
    assert list(report["students"]) == list(ROWS) and report["seeds"] == 2
    records = metrics.read(out / "metrics.jsonl")
    seeds = [f"seed{k}-{name}" for k in range(2) for name in ROWS]
    assert list(records) == [*TASKS[:3], "seed0-base", "seed1-base", *seeds]
    for lines in records.values():
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert ["word_error_rate" in line for line in lines] == [False] * (STEPS - 1) + [True]
    teachers = sum(row["trained_parameters"] for row in report["teachers"])
    for name, found in report["students"].items():
        rows = found["rows"]
        assert [row["word_error_rate"] for row in rows] == [
            records[f"seed{k}-{name}"][-1]["word_error_rate"] for k in range(2)
        ]
        assert found["share"] == rows[0]["trained_parameters"] / teachers < 0.01
        differences = None
        if name != "labels":
            without = report["students"]["labels"]["rows"]
            pairs = zip(rows, without, strict=True)
            differences = [ours["word_error_rate"] - theirs["word_error_rate"] for ours, theirs in pairs]
        assert found["against_labels"] == differences
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert {*TEACHERS, "ensemble", "base", *ROWS} <= set(lines)
    assert lines["both"].count("±") == 2 and lines["labels"].count("±") == 1
    assert (out / "error_rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_workers_and_other_seeds_change_no_bit(everything, uninterrupted):
    ours, theirs = final_state(everything[0])[0], final_state(uninterrupted)[0]
    for task in TASKS:
        assert all(torch.equal(ours[task][name], value) for name, value in theirs[task].items()), task
    one, other = (ours[f"seed{k}-labels"]["model.student.encoder.lora_B"] for k in range(2))
    assert not torch.equal(one, other)


def test_the_base_stays_as_it_was(everything):
    base = checkpoint.weights(path_of(everything[0], "seed1-base"))
    student = checkpoint.weights(path_of(everything[0], "seed1-both"))
    frozen = {name.removeprefix("student."): value for name, value in student.items() if "student.lo" not in name}
    assert all(torch.equal(frozen[name], value) for name, value in base.items())
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in student.items())


@needs_accelerated
def test_the_reference_learns_the_same(everything, cache, tmp_path):
    quietly(*SHORT, "--backend", "reference", "--out", tmp_path, "--cache", cache)
    ours, theirs = (metrics.read(out / "metrics.jsonl")["seed0-both"] for out in (everything[0], tmp_path))
    for mine, other in zip(ours, theirs, strict=True):
        for part in ("loss", "ctc", "alignment", "soft_targets"):
            assert mine[part] == pytest.approx(other[part], rel=1e-3)


# Resumption


@pytest.mark.parametrize(
    "where, name, number",
    [
        (checkpoint, "save", 2),
        (checkpoint.os, "replace", 2 * len(TASKS) - 1),
        (run, "conclude", 1),
    ],
)
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    uninterrupted, cache, tmp_path, monkeypatch, where, name, number
):
    with monkeypatch.context() as patched:
        at_call(patched, where, name, number, kill)
        with pytest.raises(Killed):
            speech(*SHORT, "--out", tmp_path, "--cache", cache)
    assert speech(*SHORT, "--out", tmp_path, "--cache", cache, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_ctrl_c_can_be_resumed(uninterrupted, cache, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        at_call(patched, distill, "ctc", 3 * STEPS + 1, lambda: signal.raise_signal(signal.SIGINT))
        assert speech(*SHORT, "--out", tmp_path, "--cache", cache) == cli.INTERRUPTED
    assert "interrupted; add --resume" in capsys.readouterr().err
    assert checkpoint.progress(path_of(tmp_path, "seed0-base")).step == 1
    assert speech(*SHORT, "--out", tmp_path, "--cache", cache, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(uninterrupted, cache, tmp_path, how):
    arguments = (*SHORT[:-2], "--teacher-steps", 2000, "--workers", 2, "--out", tmp_path, "--cache", cache)
    process = start(*arguments, experiment="speech")
    log = tmp_path / "metrics" / f"{TASKS[1]}.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(how)
    code, _, errors = finish(process)  # it would wait for workers that hold its standard output
    assert code == (cli.INTERRUPTED if how == signal.SIGINT else -signal.SIGKILL), errors
    size = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == size
    if how == signal.SIGINT:
        assert checkpoint.progress(path_of(tmp_path, TASKS[1])).metrics_bytes == size


def test_another_config_cannot_resume(uninterrupted, cache, capsys):
    before = final_state(uninterrupted)
    arguments = (*SHORT, "--out", uninterrupted, "--cache", cache, "--resume", "--temperature", 3, "--labels", 5)
    assert speech(*arguments) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "temperature was 4.0 and is now 3.0" in errors and "labels was 4 and is now 5" in errors
    assert_same_bits(final_state(uninterrupted), before)


def test_a_failure_in_a_worker_is_told(cache, tmp_path, capsys):
    arguments = (*SHORT[:-2], "--teacher-rate", 1e30, "--workers", 2, "--out", tmp_path, "--cache", cache)
    assert speech(*arguments) == cli.REFUSED
    assert "the loss is nan" in capsys.readouterr().err


# The user's own recordings


def record(path, utterance, rate=22050, width=2):
    samples, _ = synthesis.render(utterance)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, width, rate, 0, "NONE", ""))
        file.writeframes((samples * 2 ** (8 * width - 1) * 0.5).astype(f"<i{width}").tobytes())


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


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda chapter: (chapter / "12-34-0001.wav").unlink(), "names 12-34-0001, but no 12-34-0001.wav or"),
        (lambda chapter: (chapter / "12-34-0001.wav").write_bytes(b"RIFF"), "12-34-0001.wav is no WAV file"),
        (lambda chapter: (chapter / "12-34.trans.txt").write_text("12-34-0001 42\n"), "has no words for 12-34-0001"),
        (lambda chapter: (chapter / "12-34.trans.txt").unlink(), "has no .trans.txt file"),
        (lambda chapter: record(chapter / "12-34-0001.wav", UTTERANCE, 8000), "has 8000 samples a second"),
    ],
)
def test_recordings_that_cannot_be_read_are_named(own, cache, tmp_path, capsys, spoil, said):
    spoil(own / "12" / "34")
    assert speech(*SHORT, "--data", own, "--out", tmp_path / "out", "--cache", cache) == cli.REFUSED
    assert said in capsys.readouterr().err


def test_flac_needs_a_package(own, monkeypatch):
    chapter = own / "12" / "34"
    (chapter / "12-34-0001.wav").rename(chapter / "12-34-0001.flac")
    monkeypatch.setattr(folder, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"12-34-0001\.flac: soundfile must be installed"):
        folder.read(folder.recordings(own)[1])


# The command line


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--lora-rank", 30), "must train less than 1%: give a smaller --lora-rank"),
        (("--labels", 13), "--labels is 13, but must be at most --train, 12"),
        (("--teachers", "recurrent,transformer,state-space"), "needs a first teacher of the student's width"),
        (("--data", "nowhere"), "--data nowhere is no folder"),
    ],
)
def test_runs_that_cannot_be_are_refused(cache, tmp_path, capsys, arguments, said):
    rows = ("--compare", "hidden-mse-one")
    assert speech(*TINY, *rows, *arguments, "--out", tmp_path, "--cache", cache) == cli.REFUSED
    assert said in capsys.readouterr().err


def test_missing_packages_name_the_extra(monkeypatch, capsys):
    right = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("jiwer", "espeakng_loader") else right(name))
    assert run_here(experiment="speech") == cli.REFUSED
    assert "espeakng-loader and jiwer must be installed: pip install 'kdkernels[speech]'" in capsys.readouterr().err


def test_quick_yields_to_what_is_said(monkeypatch):
    configs = []
    monkeypatch.setattr(run, "run", lambda config, options: configs.append(config))
    for arguments in ((), ("--quick",), ("--quick", "--steps", 77)):
        assert run_here(*arguments, experiment="speech") == cli.DONE
    full, quick, said = configs
    assert full == Config() and quick.train < full.train and quick.steps < full.steps
    assert asdict(said) == {**asdict(quick), "steps": 77}
