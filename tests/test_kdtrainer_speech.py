"""kdtrainer speech: whole runs, and their resumption. What they are made of: beside this."""

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from trainer import (  # noqa: F401
    Killed,
    assert_same_bits,
    at_call,
    final_state,
    finish,
    kill,
    needs_accelerated,
    one_thread,
    path_of,
    run_here,
    start,
)

pytest.importorskip("espeakng_loader")
pytest.importorskip("jiwer")

from speaking import (  # noqa: F401
    ROWS,
    SHORT,
    STEPS,
    TASKS,
    TEACHERS,
    TINY,
    assert_same_utterances,
    files_of_five,
    quietly,
    speech,
)

from kdtrainer import checkpoint, cli, metrics
from kdtrainer.speech import corpus, distill, run
from kdtrainer.speech.config import Config

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


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
    assert f"As it is shipped: the student of {ROWS[-1]}, seed 0." in printed.splitlines()
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
    process = start(*arguments, experiment="speech", alone=True)
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


def test_ctrl_c_while_workers_start(cache, tmp_path):
    """As a terminal sends it: to all processes at once, whose interpreters are not yet there to hear it."""
    process = start(*SHORT[:-2], "--workers", 2, "--out", tmp_path, "--cache", cache, experiment="speech")
    while process.poll() is None and not children_of(process.pid):
        time.sleep(0.01)
    time.sleep(0.2)
    for pid in (*children_of(process.pid), process.pid):
        os.kill(pid, signal.SIGINT)
    code, _, errors = finish(process)
    assert code == cli.INTERRUPTED and "interrupted; add --resume" in errors and "Traceback" not in errors, errors


def children_of(pid):
    """Workers of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, ValueError):
            continue  # it has ended
    return found


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
