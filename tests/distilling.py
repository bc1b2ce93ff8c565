"""Trainers of small models, and what their tests compare."""

import pytest
import torch
from language_models import LLAMA, build
from transformers import TrainingArguments

from kdkernels.integrations.transformers import Distillation, DistillationTrainer

ALIGNED = dict(alignment_weight=0.5, pairs=((1, 1), (-1, -1)), embedding_width=24)


class Rows(torch.utils.data.Dataset):
    """The rows of batches, one after the other."""

    def __init__(self, *batches):
        self.rows = [{name: x[k] for name, x in b.items()} for b in batches for k in range(len(b["labels"]))]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return self.rows[k]


def trainer_in(directory):
    """Makes trainers of one step, of models, options of a `Distillation` and training arguments."""

    def make(student, teachers, *, dataset=None, teacher_inputs=None, folder="run", training=None, **options):
        args = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no")
        args |= dict(lr_scheduler_type="constant", learning_rate=1e-2, optim="sgd", max_grad_norm=0, max_steps=1)
        args |= training or {}
        return DistillationTrainer(
            student, TrainingArguments(str(directory / folder), **args), teachers=teachers, train_dataset=dataset,
            eval_dataset=dataset, distillation=Distillation(**options), teacher_inputs=teacher_inputs,
        )  # fmt: skip

    return make


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(ours, theirs, tolerance=2e-5):
    """Each gradient, and none is missing; the size that matters is that of the largest."""
    assert ours.keys() == theirs.keys() and ours
    size = max(x.norm() for x in theirs.values())
    for name, x in theirs.items():
        assert (ours[name] - x).norm() < tolerance * (x.norm() + 1e-2 * size), name


def adapted(name=LLAMA, **options):
    peft = pytest.importorskip("peft")
    options = dict(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj", "lm_head"]) | options
    return peft.get_peft_model(build(name), peft.LoraConfig(**options))
