"""kdtrainer compress: what stops it and what it leaves then, its options, and two processes."""

import errno
import json
import re
import shutil
import sys

import pytest
import torch
from compressing import (
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
    assert_same_bits,
    at_call,
    final_state,
    finish,
    lines_of,
    one_thread,
    path_of,
    start,
)

from kdtrainer import checkpoint, cli, metrics, ranks
from kdtrainer.compress import training
from kdtrainer.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_short(tmp_path_factory.mktemp("uninterrupted"))


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


@pytest.mark.parametrize(
    "options, why",
    [
        ((), "step [23]: the loss is "),
        (("--reductions", 1, "--reduction-share", "0.04"), "step 1: no state can be taken away: "),
    ],
)
def test_a_huge_learning_rate_stops_with_its_step(tmp_path, capsys, options, why):
    """Wherever it shows first: in the loss or in a reduction."""
    assert compress(*TINY, "--out", tmp_path, "--learning-rate", "1e30", "--warm-up", "0", *options) == cli.REFUSED
    errors = capsys.readouterr().err
    assert re.search(f"seed0-compressed, {why}.*A smaller --learning-rate may help; there is no checkpoint", errors)
    assert "Traceback" not in errors and not path_of(tmp_path, TASKS[0]).exists()


def test_an_eigenvalue_on_the_unit_circle_has_no_regularizer(tmp_path, monkeypatch, capsys):
    """What a loss does not tell."""
    models, build = [], training.build

    def spoil():
        training.layers_of(models[-1])[0].nu_log.data.fill_(-90.0)

    with monkeypatch.context() as patched:
        patched.setattr(training, "build", lambda *a: models.append(build(*a)) or models[-1])
        at_call(patched, torch.optim.AdamW, "step", 2, spoil, after=True)
        options = ("--hsv-regularizer", "energy", "--checkpoint-every", "1")
        assert compress(*SHORT, *options, "--out", tmp_path) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "seed0-compressed, step 3: there is no regulariser's value: " in errors and "is from before" in errors
    assert progress_of(tmp_path, TASKS[0]).step == 2


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
    draw_nothing(monkeypatch)

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


@pytest.mark.parametrize("how", ["cut", "one byte", "one digit", "not one"])
def test_a_corrupt_checkpoint_is_named_and_nothing_is_lost(uninterrupted, tmp_path, capsys, how):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    path = path_of(out, TASKS[1])
    content = bytearray(path.read_bytes())
    place = content.index(b'accuracy\\": 0.') + len(b'accuracy\\": 0.')  # in the header, which stays valid JSON
    digit = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    content[-100] ^= 1
    damaged = {"cut": content[:-200], "one byte": content, "one digit": digit, "not one": b"[1, 2, 3]" * 9}
    path.write_bytes(damaged[how])
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
        (("--learning-rate", "inf"), "inf is too large, must be at most 3.4e+38"),
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
        (("--min-radius", "0.9995"), 1, "--min-radius is 0.9995 and --max-radius 0.999, but must be"),
        (("--max-radius", "0"), 1, "--min-radius is 0.9 and --max-radius 0.0, but must be"),
        (("--length", "63"), 1, "--length is 63, but must be the square"),
        (("--batch", "17"), 2, "--batch is 17, but must be a multiple of the 2 processes"),
        (("--compare", "uncompressed,posthoc"), 2, "--compare posthoc runs in one process"),
        (("--data", "nowhere.npz"), 1, "--data is 'nowhere.npz', but must be digits, fashion-mnist or a .npz file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capsys, arguments, world, message):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, timeout: None)
    kept = [x for x in TINY if x not in ("--tolerance", "0.2")] if "--ranks" in arguments else TINY
    assert compress(*kept, "--out", tmp_path, *arguments) == cli.REFUSED
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# Two processes


TWO = """
import os, sys, time
import torch
import torch.distributed as dist
from kdtrainer import checkpoint, cli, ranks

folder, options = sys.argv[1], sys.argv[2:]
follow, check_equal, prepare = ranks.Ranks.follow, ranks.Ranks.check_equal, checkpoint.prepare
dist.init_process_group("gloo")  # for three runs
rank, calls = dist.get_rank(), []


class Killed(BaseException):
    pass


def killed(self, *arguments):
    follow(self, *arguments)
    calls.append(1)
    if len(calls) == 2:
        raise Killed


def checked(self, model):
    check_equal(self, model)
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")


def slow(*arguments):
    time.sleep(0.5)
    return prepare(*arguments)


try:
    ranks.Ranks.follow = killed
    cli.main([*options, "--out", f"{folder}/killed"])
    sys.exit("it was not killed")
except Killed:
    ranks.Ranks.follow = follow
assert cli.main([*options, "--out", f"{folder}/killed", "--resume"]) == 0
ranks.Ranks.check_equal, checkpoint.prepare = checked, slow
code = cli.main([*options, "--out", f"{folder}/run"])
dist.destroy_process_group()  # which is this script's to end
sys.exit(code)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of two processes: one that both left right after the second reduction and then resumed, and a whole one."""
    folder = tmp_path_factory.mktemp("two")
    options = (*TINY, "--dropout", "0", "--compare", "")
    quietly(*options, "--out", folder / "alone")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(path_of(folder / "alone", TASKS[0]), folder / "run" / "checkpoints")
    (folder / "two.py").write_text(TWO)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    driver = (*torchrun, sys.executable, str(folder / "two.py"), str(folder))
    code, _, errors = finish(start(*options, experiment="compress", driver=driver))
    assert code == 0, errors
    return folder


def test_two_processes_truncate_alike_and_one_of_them_writes(two):
    """And they learn what one would from the same batches; neither saw the checkpoint that the run replaced."""
    out, alone = two / "run", two / "alone"
    left = ["checkpoints", "metrics.jsonl", "report.json", "report.md", "spectra.png", "training.png"]
    assert sorted(p.name for p in out.iterdir()) == left
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"{TASKS[0]}.safetensors"]
    assert json.loads((out / "report.json").read_text())["config"]["world"] == 2
    assert lines_of(out) == STEPS, "one process writes metrics"
    assert progress_of(out, TASKS[0]).states == progress_of(alone, TASKS[0]).states < [STATES]
    saved = checkpoint.weights(path_of(out, TASKS[0]))
    for rank in range(2):
        ended = torch.load(two / f"rank{rank}.pt")
        assert ended.keys() == saved.keys() and all(torch.equal(ended[name], saved[name]) for name in saved)
    losses = [[r["loss"] for r in metrics.read(x / "metrics.jsonl")[TASKS[0]]] for x in (alone, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_two_processes_resume_to_the_same_bits(two):
    assert_same_bits(final_state(two / "killed"), final_state(two / "run"))


def test_processes_that_end_with_different_parameters_are_told(monkeypatch):
    alone, model = ranks.ALONE, torch.nn.Linear(2, 2)
    alone.check_equal(model)
    sent = []
    monkeypatch.setattr(ranks.Ranks, "gather", lambda self, value: (sent.append(value), [sent[0], value])[1])
    alone.check_equal(model)
    model.weight.data[0, 0] += 1e-6
    with pytest.raises(RunError, match=f"ended with different parameters: {sent[0][:12]}, (?!{sent[0][:12]})"):
        alone.check_equal(model)
