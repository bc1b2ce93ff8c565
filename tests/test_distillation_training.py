"""DistillationTrainer over many steps: accumulation, processes, checkpoints, evaluation."""

import copy
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from distilling import ALIGNED, Rows, adapted, agree, gradients, trainer_in  # noqa: E402
from language_models import BERT, GEMMA, LLAMA, WHISPER, batch, build, plain_loss  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from kdkernels.integrations.transformers import ALIGNMENT  # noqa: E402

IGNORED = "kdkernels runs on plain PyTorch:RuntimeWarning", ":FutureWarning", ":UserWarning"
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in IGNORED]


@pytest.fixture
def trainer(tmp_path):
    return trainer_in(tmp_path)


@pytest.mark.parametrize("name", [LLAMA, WHISPER, BERT, GEMMA])
def test_two_accumulated_steps_are_one_of_both(name, trainer):
    """Rows of unequal length: the mean is over all tokens of the step, not of the means of its batches."""
    teacher, dataset = build(name, 40, seed=1), Rows(batch(name, lengths=[9, 8, 3, 2]))
    found, before = [], build(name).state_dict()
    states = "encoder" if name == WHISPER else "decoder"
    for rows in (4, 2):
        student = build(name)
        training = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=4 // rows)
        training |= dict(train_sampling_strategy="sequential", logging_strategy="steps", logging_steps=1)
        made = trainer(student, teacher, dataset=dataset, training=training, alpha=0.5, states=states, **ALIGNED)
        expected = made.compute_loss(student.train(), {k: torch.stack([r[k] for r in dataset]) for k in dataset[0]})
        made.train()
        torch.testing.assert_close(made.state.log_history[0]["loss"], expected.item(), rtol=1e-4, atol=1e-4)
        found.append({k: x - before[k] for k, x in student.state_dict().items()} | made.alignment.state_dict())
    agree(*found)


@pytest.mark.parametrize("name", [LLAMA, WHISPER, BERT])
def test_training_lowers_the_loss(name, trainer):
    student, teacher, dataset = build(name), build(name, 40, seed=1), Rows(batch(name), batch(name, seed=1))
    training = dict(optim="adamw_torch", learning_rate=3e-3, max_steps=25, max_grad_norm=1.0)
    made = trainer(student, teacher, dataset=dataset, training=training, alpha=0.9, resample=True, **ALIGNED)
    drawn = copy.deepcopy(made.alignment.state_dict())
    before = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < 0.8 * before
    assert all(not x.equal(drawn[key]) for key, x in made.alignment.state_dict().items()) and len(drawn) == 2
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_projections_are_clipped_and_their_gradients_start_at_zero(trainer):
    dataset = Rows(batch(LLAMA))
    training = dict(max_steps=3, max_grad_norm=1e-3, per_device_train_batch_size=4, learning_rate=1.0)
    made = trainer(build(LLAMA), build(LLAMA, 40, seed=1), dataset=dataset, training=training, soft_weight=0, **ALIGNED)
    before = [p.detach().clone() for p in made.alignment.parameters()]
    made.train()
    moved = torch.stack([(p - q).norm() for p, q in zip(made.alignment.parameters(), before, strict=True)]).norm()
    assert 0 < moved < 3.1e-3


@pytest.mark.parametrize("peft", [False, True])
def test_a_checkpoint_restores_the_projections(peft, trainer):
    """Six steps, and three, saved, and three more by a trainer that starts from elsewhere."""
    dataset, teacher = Rows(batch(LLAMA), batch(LLAMA, seed=1)), build(LLAMA, 40, seed=1)
    training = dict(max_steps=6, save_strategy="steps", save_steps=3, optim="adamw_torch", max_grad_norm=1.0)

    def make(folder):
        student = adapted() if peft else build(LLAMA)
        return trainer(student, teacher, dataset=dataset, training=training, folder=folder, **ALIGNED)

    whole = make("whole")
    whole.train()
    path = f"{whole.args.output_dir}/checkpoint-3"
    resumed = make("resumed")
    with torch.no_grad():
        for p in resumed.alignment.parameters():
            p.zero_()
    resumed.train(resume_from_checkpoint=path)
    for key, x in whole.alignment.state_dict().items():
        torch.testing.assert_close(resumed.alignment.state_dict()[key], x)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    (Path(path) / ALIGNMENT).unlink()
    with pytest.raises(ValueError, match=f"has no {ALIGNMENT}"):
        make("again").train(resume_from_checkpoint=path)


def test_the_best_model_comes_with_its_projections(trainer):
    training = dict(max_steps=2, save_steps=1, eval_steps=1, save_strategy="steps", eval_strategy="steps")
    training |= dict(load_best_model_at_end=True, learning_rate=10.0)  # the first step is bad, the second worse
    made = trainer(
        build(LLAMA), build(LLAMA, 40, seed=1), dataset=Rows(batch(LLAMA)), training=training, metric="mse", **ALIGNED
    )
    made.train()
    best = load_file(f"{made.state.best_model_checkpoint}/{ALIGNMENT}")
    assert all(x.equal(best[key]) for key, x in made.alignment.state_dict().items())


@pytest.mark.parametrize("name", [LLAMA, WHISPER])
def test_evaluation_gives_the_loss_and_the_models_own_logits(name, trainer):
    student, teacher, inputs = build(name), build(name, 40, seed=1), batch(name)
    training = dict(per_device_eval_batch_size=4)
    made = trainer(student, teacher, dataset=Rows(inputs), training=training)
    expected = plain_loss(student.eval(), [teacher], inputs, name == LLAMA).item()
    assert abs(made.evaluate()["eval_loss"] - expected) < 1e-4
    own = student(**inputs).logits.detach()

    def metrics(prediction):
        logits = prediction.predictions if name == LLAMA else prediction.predictions[0]
        assert (prediction.label_ids == inputs["labels"].numpy()).all()
        return {"miss": (torch.tensor(logits) - own).abs().max().item()}

    made.compute_metrics = metrics
    found = made.evaluate()
    assert found["eval_miss"] < 1e-4 and abs(found["eval_loss"] - expected) < 1e-4


PROCESSES = """
import os, socket, sys, traceback
import torch
from distilling import ALIGNED, Rows
from language_models import LLAMA, batch, build
from transformers import TrainingArguments
from kdkernels.integrations.transformers import Distillation, DistillationTrainer

torch.set_num_threads(1)

def train(folder, count):
    args = TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2, learning_rate=1e-2,
        optim="sgd", max_grad_norm=0, per_device_train_batch_size=4 // count, train_sampling_strategy="sequential",
        ddp_backend="gloo" if count > 1 else None,
    )
    trainer = DistillationTrainer(
        build(LLAMA), args, teachers=build(LLAMA, 40, seed=1), train_dataset=Rows(batch(LLAMA, lengths=[9, 8, 3, 2])),
        distillation=Distillation(alpha=0.5, **ALIGNED),
    )
    assert args.world_size == count
    trainer.train()
    if args.process_index == 0:
        torch.save(trainer.model.state_dict() | trainer.alignment.state_dict(), folder + "/trained.pt")

def start(folder, count, **variables):
    child, code = os.fork(), 1
    if child:
        return child
    try:
        os.environ.update(variables)
        train(folder, count)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

one, two = sys.argv[1:]
with socket.create_server(("localhost", 0)) as free:
    group = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
children = [start(one, 1), *(start(two, 2, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01")]
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_two_processes_train_as_one(python, environment, tmp_path):
    """Rows of unequal length in each: the mean is over the tokens of both, and projections stay the same in both."""
    script, root = tmp_path / "processes.py", Path(__file__).parents[1]
    script.write_text(PROCESSES)
    environment["PYTHONPATH"] = f"{root}:{root / 'tests'}"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    done = python(environment, script, *folders)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(folder / "trained.pt") for folder in folders]
    for key, x in found[0].items():
        torch.testing.assert_close(found[1][key], x, rtol=1e-5, atol=1e-6, msg=key)


def test_bfloat16_autocast(trainer):
    student, teacher, dataset = build(LLAMA), build(LLAMA, 40, seed=1), Rows(batch(LLAMA))
    training = dict(bf16=True, per_device_train_batch_size=4, logging_strategy="steps", logging_steps=1)
    expected = plain_loss(student, [teacher], batch(LLAMA), True).item()
    made = trainer(student, teacher, dataset=dataset, training=training)
    made.train()
    assert abs(made.state.log_history[0]["loss"] - expected) < 0.05 * expected
    assert student.lm_head.weight.dtype is torch.float32


def test_gradient_checkpointing(trainer):
    teacher, inputs = build(LLAMA, 40, seed=1), batch(LLAMA)
    found = []
    for checkpointing in (False, True):
        student = build(LLAMA).train()
        made = trainer(student, teacher, **ALIGNED)
        if checkpointing:
            student.gradient_checkpointing_enable()
        found.append(gradients(student, made.compute_loss(student, inputs)))
    agree(*found)
