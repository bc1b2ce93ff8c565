"""kdtrainer compress: whole runs, and their resumption. How they stop and what they are made of: beside this."""

import json
import random
import shutil
import signal
import time

import pytest
import torch
from compressing import (
    REDUCTIONS,
    SHORT,
    STATES,
    STEPS,
    TASKS,
    TINY,
    compress,
    draw_nothing,
    progress_of,
    quietly,
    run_short,
)
from trainer import (  # noqa: F401
    Killed,
    assert_same_bits,
    at_call,
    final_state,
    finish,
    kill,
    lines_of,
    one_thread,
    path_of,
    run_here,
    start,
)

import kdkernels as kd
from kdkernels.nn import truncation
from kdtrainer import checkpoint, cli, metrics
from kdtrainer.compress import plots, training
from kdtrainer.compress.config import BASELINES

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    return out, quietly(*TINY, "--compare", ",".join(BASELINES), "--seeds", "2", "--out", out, draw=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_short(tmp_path_factory.mktemp("uninterrupted"))


# Whole runs


def test_every_baseline_has_the_sizes_that_it_should(everything):
    models = json.loads((everything[0] / "report.json").read_text())["models"]
    assert tuple(models) == ("compressed", *BASELINES)
    for k in range(2):
        rows = {name: found[k] for name, found in models.items()}
        (final,) = rows["compressed"]["states"]
        assert 0 < final < STATES
        assert {name: row["states"] for name, row in rows.items()} == {
            name: [STATES if name == "uncompressed" else final] for name in rows
        }
        for name, row in rows.items():
            path = path_of(everything[0], f"seed{k}-{'uncompressed' if name == 'posthoc' else name}")
            assert row["seed"] == k and 0 <= row["accuracy"] <= 1
            assert checkpoint.weights(path)["blocks.0.lru.nu_log"].numel() == (
                STATES if name == "posthoc" else row["states"][0]
            )
            assert row["parameters"] == rows["small" if row["states"] == [final] else "uncompressed"]["parameters"]
        shrunk = [(e["step"], e["before"], e["states"]) for e in rows["compressed"]["reductions"]]
        assert [step for step, _, _ in shrunk] == REDUCTIONS
        for name in ("random", "smallest", "modal"):
            assert [(e["step"], e["before"], e["states"]) for e in rows[name]["reductions"]] == shrunk
        assert rows["small"]["reductions"] == rows["uncompressed"]["reductions"] == []
    assert models["compressed"][0]["parameters"] < models["uncompressed"][0]["parameters"]


def test_a_run_leaves_a_report_metrics_plots_and_a_table(everything):
    out, printed = everything
    report = json.loads((out / "report.json").read_text())
    assert report["seeds"] == 2 and report["config"]["tolerance"] == 0.2 and report["config"]["world"] == 1
    assert set(report["times_faster"]) == {"compressed", *BASELINES} - {"uncompressed"}
    models = report["models"]
    for name, ratios in report["times_faster"].items():
        expected = [b["seconds"] / a["seconds"] for a, b in zip(models[name], models["uncompressed"], strict=True)]
        assert ratios == pytest.approx(expected)
    for row in models["compressed"]:
        assert 0 < row["reducing"] < row["seconds"] and row["regularizing"] == 0
        assert row["reducing"] == pytest.approx(sum(e["seconds"] for e in row["reductions"]))
        assert [e["step"] for e in row["evaluations"]] == [12, 24]
        assert (
            row["evaluations"][-1]["accuracy"] == row["accuracy"]
            and row["evaluations"][-1]["states"] == row["states"][0]
        )
    for name, found in models.items():
        for row in found:
            steps = [e["step"] for e in row["reductions"]] if name == "compressed" else []
            assert set(row["spectra"]) == {"end.0", *(f"{step}.0" for step in steps)}
            assert len(row["spectra"]["end.0"]) == row["states"][0]
            since = row["reductions"][-1] if row["reductions"] else {"clock": 0.0, "step": 1}
            rest = row["last_step"] * (STEPS + 1 - since["step"])
            trained = row["seconds"] - (row["reducing"] if name == "posthoc" else 0.0)
            assert since["clock"] + rest == pytest.approx(trained)
    for row in models["posthoc"]:
        assert 0 < row["reducing"] < row["seconds"]
    for name in ("spectra.png", "training.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    records = metrics.read(out / "metrics.jsonl")
    trained = ("compressed", *(name for name in BASELINES if name != "posthoc"))
    assert tuple(records) == tuple(f"seed{k}-{name}" for k in range(2) for name in trained)
    for task, lines in records.items():
        assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
        assert [r["step"] for r in lines if "accuracy" in r] == [12, 24]
        assert lines[-1]["states"] == progress_of(out, task).states
    assert "mean ± standard deviation over 2 seeds" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split() and line.split()[0] in models}
    assert set(rows) == set(models)
    assert rows["compressed"].count("±") == 5 and rows["uncompressed"].count("±") == 4
    mean = sum(r["states"][0] for r in models["compressed"]) / 2
    assert f"{mean:.1f} ± " in rows["compressed"]
    assert "Reductions that took states away, of 4: " in printed and "States at the end: seed 0: " in printed


def test_the_report_is_made_again_from_its_json(everything, tmp_path, capsys, monkeypatch):
    out, printed = everything
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(out / "report.json", again)
    assert run_here(again, experiment="report") == cli.DONE
    told_again = capsys.readouterr().out.split()  # a long path makes a line break elsewhere
    assert "".join(told_again) == "".join(printed.replace(str(out), str(again)).split())
    for name in ("report.md", "spectra.png", "training.png"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    told = (again / "report.md").read_text()
    for line in printed.splitlines()[2:]:
        words = line.split()
        if words and words[0] in BASELINES:
            assert f"\n| {words[0]} | " in told
    assert "| **compressed** | **" in told and "![training](training.png)" in told
    assert '"tolerance": 0.2' in told and f"torch {torch.__version__}" in told


def test_a_report_that_cannot_be_made_says_why(tmp_path, capsys):
    def refused(content=None):
        if content is not None:
            (tmp_path / "report.json").write_text(content)
        assert run_here(tmp_path, experiment="report") == cli.REFUSED
        return capsys.readouterr().err

    assert "holds no finished run" in refused()
    assert "is damaged" in refused('{"recipe": "comp')
    assert "does not say which recipe" in refused("[]")
    assert "is of 'other', but must be of digits, compress" in refused('{"recipe": "other"}')
    assert "is damaged" in refused('{"recipe": "compress", "models": {}, "config": {"nonsense": 1}}')


def test_seeds_are_runs_of_their_own(everything, tmp_path):
    """The second seed's bits are those of a run that starts with it."""
    quietly(*TINY, "--compare", "small", "--seed", "1", "--out", tmp_path)
    for task in ("seed1-compressed", "seed1-small"):
        ours, theirs = (checkpoint.read(path_of(out, task)) for out in (tmp_path, everything[0]))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, other = (checkpoint.weights(path_of(everything[0], f"seed{k}-small")) for k in range(2))
    assert not torch.equal(one["encoder.weight"], other["encoder.weight"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert "times_faster" not in report and list(report["models"]) == ["compressed", "small"]


@pytest.mark.parametrize("option, value", [("--error", "30"), ("--ranks", "3"), ("--ranks", "10")])
def test_other_ways_to_say_how_many_states_go(tmp_path, option, value):
    arguments = [x for x in TINY if x not in ("--tolerance", "0.2")]
    quietly(*arguments, option, value, "--compare", "", "--out", tmp_path)
    events = progress_of(tmp_path, "seed0-compressed").reductions
    if option == "--ranks":
        assert [e["states"] for e in events] == [[int(value)]] * 4
    else:
        assert all(0 <= e["error_bounds"][0] <= float(value) for e in events)
        assert events[-1]["states"][0] < STATES


# Resumption


@pytest.fixture
def no_plots(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.mark.parametrize(
    "moment",
    [
        "before the first truncation",
        "in the first truncation",
        "after the first truncation",
        "after the second truncation",
        "in the pruning",
        "in a write after a truncation",
        "before a checkpoint gets its name",
        "in the report",
    ],
)
def test_a_run_that_was_killed_resumes_to_the_same_bits(uninterrupted, no_plots, tmp_path, monkeypatch, moment):
    def in_write():
        target.with_name(target.name + ".tmp").write_bytes(b"half of it")
        raise Killed

    target = path_of(tmp_path, TASKS[0])
    where, name, number, act, after = {
        "before the first truncation": (kd.nn, "truncate", 1, kill, False),
        "in the first truncation": (truncation, "reduce_all", 1, kill, True),
        "after the first truncation": (kd.nn, "truncate", 1, kill, True),
        "after the second truncation": (kd.nn, "truncate", 2, kill, True),
        "in the pruning": (kd.nn, "keep_states", 2, kill, True),
        "in a write after a truncation": (checkpoint, "write_atomically", 2, in_write, False),
        "before a checkpoint gets its name": (checkpoint.os, "replace", 2, kill, False),
        "in the report": (plots, "spectra", 1, kill, False),
    }[moment]
    with monkeypatch.context() as patched:
        at_call(patched, where, name, number, act, after)
        with pytest.raises(Killed):
            compress(*SHORT, "--out", tmp_path)
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))
    for task in TASKS:
        ours, theirs = (progress_of(out, task) for out in (tmp_path, uninterrupted))
        assert ours.states == theirs.states and len(ours.reductions) == len(theirs.reductions)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted(f"{t}.safetensors" for t in TASKS)


DRIVER = """
import os, signal, sys
import kdkernels as kd
from kdtrainer import cli
right, calls = kd.nn.truncate, []
def truncate(*arguments, **options):
    found = right(*arguments, **options)
    calls.append(found)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
kd.nn.truncate = truncate
sys.exit(cli.main(sys.argv[1:]))
"""


def test_kill_9_right_after_a_truncation(uninterrupted, no_plots, tmp_path):
    code, _, errors = finish(start(*SHORT, "--out", tmp_path, experiment="compress", driver=("-c", DRIVER)))
    assert code == -signal.SIGKILL, errors
    assert progress_of(tmp_path, TASKS[0]).step == 5 and lines_of(tmp_path) == 6
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_kill_9_at_any_moment(uninterrupted, no_plots, tmp_path):
    moment = random.randint(1, 3 * STEPS - 12)
    process = start(*SHORT, "--out", tmp_path, experiment="compress")
    while lines_of(tmp_path) < moment and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == -signal.SIGKILL, f"it ended before it could be killed at line {moment}: {errors}"
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


@pytest.mark.parametrize("where, name, number", [(training, "batch_of", STEPS + 9), (kd.nn, "truncate", 2)])
def test_ctrl_c_can_be_resumed(uninterrupted, no_plots, tmp_path, monkeypatch, capsys, where, name, number):
    with monkeypatch.context() as patched:
        at_call(patched, where, name, number, lambda: signal.raise_signal(signal.SIGINT), after=True)
        assert compress(*SHORT, "--out", tmp_path) == cli.INTERRUPTED
    assert "interrupted; add --resume" in capsys.readouterr().err
    task, step = (TASKS[1], 9) if name == "batch_of" else (TASKS[0], REDUCTIONS[1])
    assert progress_of(tmp_path, task).step == step, "the step it stopped at was not saved"
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_another_config_cannot_resume(uninterrupted, capsys):
    before = final_state(uninterrupted)
    changed = ("--tolerance", "0.3", "--moments", "reset", "--dropout", "0.2")
    assert compress(*SHORT, "--out", uninterrupted, "--resume", *changed) == cli.REFUSED
    errors = capsys.readouterr().err
    for said in ("tolerance was 0.2 and is now 0.3", "moments was 'transport' and is now 'reset'", "dropout was 0.1"):
        assert said in errors
    assert "steps was" not in errors
    assert_same_bits(final_state(uninterrupted), before)
