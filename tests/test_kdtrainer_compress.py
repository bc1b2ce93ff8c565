"""kdtrainer compress: whole runs, their resumption, and how they stop. What they are made of is tested beside this."""

import contextlib
import errno
import io
import json
import random
import re
import shutil
import signal
import time

import pytest
import torch
from trainer import assert_same_bits, final_state, finish, lines_of, one_thread, run_here, start  # noqa: F401

import kdkernels as kd
from kdtrainer import checkpoint, cli, metrics
from kdtrainer.compress import ranks, training
from kdtrainer.compress.config import BASELINES
from kdtrainer.errors import RunError

STEPS, STATES, REDUCTIONS = 24, 10, [4, 7, 11, 14]
TINY = (
    *("--length", "16", "--states", STATES, "--features", "4", "--steps", STEPS, "--batch", "16", "--threads", "1"),
    *("--tolerance", "0.2", "--reduction-share", "0.6", "--checkpoint-every", "5", "--evaluate-every", "12"),
)
SHORT = (*TINY, "--compare", "uncompressed,modal")
TASKS = ("seed0-compressed", "seed0-uncompressed", "seed0-modal")

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


class Killed(BaseException):
    """Nothing catches it: what is on the disk then is what a killed process leaves."""


def compress(*arguments):
    return run_here(*arguments, experiment="compress")


def quietly(*arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
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


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    return out, quietly(*TINY, "--compare", ",".join(BASELINES), "--seeds", "2", "--out", out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    quietly(*SHORT, "--out", out)
    events = progress_of(out, TASKS[0]).reductions
    assert [e["step"] for e in events] == REDUCTIONS
    assert all(e["states"] < e["before"] for e in events[:2]), "the first two reductions must take states away"
    return out


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
            assert checkpoint.weights(path)["blocks.0.lru.nu_log"].numel() == (STATES if name == "posthoc" else row["states"][0])
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
        assert row["evaluations"][-1]["accuracy"] == row["accuracy"] and row["evaluations"][-1]["states"] == row["states"][0]
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
    assert rows["compressed"].count("±") == 4 and rows["uncompressed"].count("±") == 3
    mean = sum(r["states"][0] for r in models["compressed"]) / 2
    assert f"{mean:.1f} ± " in rows["compressed"]
    assert "Reductions that took states away, of 4: " in printed and "States at the end: seed 0: " in printed


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
def test_a_run_that_was_killed_resumes_to_the_same_bits(uninterrupted, tmp_path, monkeypatch, moment):
    from kdkernels.nn import truncation

    def in_write():
        target.with_name(target.name + ".tmp").write_bytes(b"half of it")
        raise Killed

    target = path_of(tmp_path, TASKS[0])
    where, name, number, act, after = {
        "before the first truncation": (kd.nn, "truncate", 1, kill, False),
        "in the first truncation": (truncation, "balanced_truncation", 1, kill, True),
        "after the first truncation": (kd.nn, "truncate", 1, kill, True),
        "after the second truncation": (kd.nn, "truncate", 2, kill, True),
        "in the pruning": (kd.nn, "keep_states", 2, kill, True),
        "in a write after a truncation": (checkpoint, "write_atomically", 2, in_write, False),
        "before a checkpoint gets its name": (checkpoint.os, "replace", 2, kill, False),
        "in the report": (kd.nn, "keep_states", 99, kill, False),
    }[moment]
    if moment == "in the report":
        from kdtrainer.compress import plots

        where, name, number = plots, "spectra", 1
    with monkeypatch.context() as patched:
        at_call(patched, where, name, number, act, after)
        with pytest.raises(Killed):
            compress(*SHORT, "--out", tmp_path)
    assert not (tmp_path / "training.png").exists()
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


def test_kill_9_right_after_a_truncation(uninterrupted, tmp_path):
    code, _, errors = finish(start(*SHORT, "--out", tmp_path, experiment="compress", driver=("-c", DRIVER)))
    assert code == -signal.SIGKILL, errors
    assert progress_of(tmp_path, TASKS[0]).step == 5 and lines_of(tmp_path) == 6
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_kill_9_at_any_moment(uninterrupted, tmp_path):
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
def test_ctrl_c_finishes_the_step_and_can_be_resumed(uninterrupted, tmp_path, monkeypatch, capsys, where, name, number):
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

# What stops a run


def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, monkeypatch, capsys):
    """In the step, and in its words; the checkpoint from before loads, and goes on."""
    right, calls = training.F.cross_entropy, []

    def broken(*arguments):
        calls.append(1)
        return right(*arguments) * (float("nan") if len(calls) == 13 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(training.F, "cross_entropy", broken)
        assert compress(*SHORT, "--out", tmp_path) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "seed0-compressed, step 13: the loss is nan" in errors and "--learning-rate" in errors
    path = path_of(tmp_path, TASKS[0])
    assert f"the checkpoint in {path} is from before" in errors
    assert progress_of(tmp_path, TASKS[0]).step == 10
    assert all(value.isfinite().all() for value in checkpoint.read(path).values())


@pytest.mark.parametrize("options", [(), ("--hsv-regularizer", "energy"), ("--reductions", 1, "--reduction-share", "0.04")])
def test_a_huge_learning_rate_stops_with_its_step(tmp_path, capsys, options):
    """Wherever it shows first: in the loss, in the regulariser or in a reduction."""
    assert compress(*TINY, "--out", tmp_path, "--learning-rate", "1e30", "--warm-up", "0", *options) == cli.REFUSED
    errors = capsys.readouterr().err
    assert re.search(r"seed0-compressed, step [123]: .*A smaller --learning-rate may help; there is no checkpoint", errors)
    assert "Traceback" not in errors and not path_of(tmp_path, TASKS[0]).exists()


def test_no_checkpoint_is_of_a_model_that_diverged(tmp_path, monkeypatch, capsys):
    """A loss of the step before says nothing of the parameters after it."""

    def spoil():
        training.layers_of(models[-1])[0].D.data.fill_(float("nan"))

    models, build = [], training.build
    with monkeypatch.context() as patched:
        patched.setattr(training, "build", lambda *a: models.append(build(*a)) or models[-1])
        at_call(patched, torch.optim.AdamW, "step", STEPS, spoil, after=True)
        assert compress(*SHORT, "--out", tmp_path) == cli.REFUSED
    assert f"seed0-compressed, step {STEPS}: a parameter is not finite" in capsys.readouterr().err
    assert progress_of(tmp_path, TASKS[0]).step == 20 and not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("name", ["write_atomically", "fsync"])
def test_a_full_disk_stops_and_leaves_the_earlier_checkpoint(uninterrupted, tmp_path, monkeypatch, capsys, name):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    where, number = (checkpoint, 3) if name == "write_atomically" else (checkpoint.os, 8)
    with monkeypatch.context() as patched:  # a checkpoint takes three fsyncs: of metrics, file and folder
        at_call(patched, where, name, number, full)
        assert compress(*SHORT, "--out", tmp_path) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "Traceback" not in errors
    assert progress_of(tmp_path, TASKS[0]).step == 10 and checkpoint.read(path_of(tmp_path, TASKS[0]))
    assert compress(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


@pytest.mark.parametrize("how", ["cut", "one byte", "not one"])
def test_a_corrupt_checkpoint_is_named_and_nothing_is_lost(uninterrupted, tmp_path, capsys, how):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    path = path_of(out, TASKS[1])
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes({"cut": content[:-200], "one byte": content, "not one": b"[1, 2, 3]" * 9}[how])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert compress(*SHORT, "--out", out, "--resume") == cli.REFUSED
    assert f"{path} is no checkpoint of kdtrainer, or was damaged" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_wrong_data_file_leaves_an_earlier_run_alone(uninterrupted, tmp_path, capsys):
    (tmp_path / "wrong.npz").write_bytes(b"no zip")
    before = {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}
    assert compress(*SHORT, "--out", uninterrupted, "--data", tmp_path / "wrong.npz") == cli.REFUSED
    assert "wrong.npz is no .npz file of arrays" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--compare", "small,pruned"), "'pruned' is no baseline, must be of uncompressed, small, random"),
        (("--compare", "small,small"), "must name each baseline once"),
        (("--compare", "posthoc,small"), "posthoc needs uncompressed, which it truncates"),
        (("--tolerance", "1"), "1 is too large, must be below 1"),
        (("--tolerance", "-0.1"), "-0.1 is too small, must be at least 0"),
        (("--tolerance", "0.1", "--error", "1"), "not allowed with argument"),
        (("--error", "1", "--ranks", "3"), "not allowed with argument"),
        (("--ranks", "0"), "0 is too small"),
        (("--reduction-share", "0"), "0 is too small, must be above 0"),
        (("--reduction-share", "1.5"), "1.5 is too large, must be at most 1"),
        (("--learning-rate", "inf"), "inf is too large, must be finite"),
        (("--moments", "forget"), "invalid choice: 'forget'"),
        (("--hsv-regularizer", "rank"), "invalid choice: 'rank'"),
        (("--steps", "some"), "'some' is no number"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compress(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, world, message",
    [
        (("--reductions", "25"), 1, "--reductions is 25, but must be at most --steps, 24"),
        (("--states", "5", "--ranks", "6"), 1, "--ranks is 6, but must be at most --states, 5"),
        (("--length", "63"), 1, "--length is 63, but must be the square"),
        (("--batch", "17"), 2, "--batch is 17, but must be a multiple of the 2 processes"),
        (("--compare", "uncompressed,posthoc"), 2, "--compare posthoc runs in one process"),
        (("--data", "nowhere.npz"), 1, "--data is 'nowhere.npz', but must be digits, fashion-mnist or a .npz file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, arguments, world, message):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend: None)
    kept = [x for x in TINY if x not in ("--tolerance", "0.2")] if "--ranks" in arguments else TINY
    assert compress(*kept, "--out", tmp_path, *arguments) == cli.REFUSED
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# Two processes


TWO = """
import os, sys
import torch
from kdtrainer import cli
from kdtrainer.compress.ranks import Ranks
right = Ranks.check_equal
def check_equal(self, model):
    right(self, model)
    torch.save(model.state_dict(), f"{sys.argv[1]}/rank{self.rank}.pt")
Ranks.check_equal = check_equal
sys.exit(cli.main(sys.argv[2:]))
"""


def test_two_processes_truncate_alike_and_one_of_them_writes(tmp_path):
    """And they learn what one would from the same batches."""
    script, out, alone = tmp_path / "two.py", tmp_path / "run", tmp_path / "alone"
    script.write_text(TWO)
    (out / "checkpoints").mkdir(parents=True)
    options = (*TINY, "--dropout", "0", "--compare", "")
    driver = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", script, tmp_path)
    quietly(*options, "--out", alone)
    shutil.copy(path_of(alone, TASKS[0]), out / "checkpoints")  # a fresh run removes it before any process sees it
    code, _, errors = finish(start(*options, "--out", out, experiment="compress", driver=tuple(map(str, driver))))
    assert code == 0, errors
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "report.json",
        "spectra.png",
        "training.png",
    ]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"{TASKS[0]}.safetensors"]
    assert json.loads((out / "report.json").read_text())["config"]["world"] == 2
    assert lines_of(out) == STEPS, "one process writes metrics"
    one, two = progress_of(alone, TASKS[0]), progress_of(out, TASKS[0])
    assert two.states == one.states and two.states[0] < STATES
    saved = checkpoint.weights(path_of(out, TASKS[0]))
    for rank in range(2):
        ended = torch.load(tmp_path / f"rank{rank}.pt")
        assert ended.keys() == saved.keys() and all(torch.equal(ended[name], saved[name]) for name in saved)
    losses = [[r["loss"] for r in metrics.read(x / "metrics.jsonl")[TASKS[0]]] for x in (alone, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_processes_that_end_with_different_parameters_are_told(monkeypatch):
    alone = ranks.Ranks("cpu")
    model = torch.nn.Linear(2, 2)
    alone.check_equal(model)
    sent = []
    monkeypatch.setattr(alone, "gather", lambda value: (sent.append(value), [sent[0], value])[1])
    alone.check_equal(model)
    model.weight.data[0, 0] += 1e-6
    with pytest.raises(RunError, match=f"ended with different parameters: {sent[0][:12]}, (?!{sent[0][:12]})"):
        alone.check_equal(model)
