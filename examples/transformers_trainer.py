"""Distillation with transformers' Trainer: soft targets and aligned states of a teacher, none of its logits kept.

    python examples/transformers_trainer.py

A language of 32 tokens is made up; the teacher learns it from labels, the student from the teacher alone. Needs
kdkernels[transformers].
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kdkernels.integrations.transformers import Distillation, DistillationTrainer

V, LENGTH = 32, 16
torch.manual_seed(0)
follows = torch.randperm(V)


class Texts(Dataset):
    """Each token follows from the one before, nine times of ten."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(V, (count, LENGTH))
        for t in range(1, LENGTH):
            right = torch.rand(count) < 0.9
            self.tokens[:, t] = torch.where(right, follows[self.tokens[:, t - 1]], self.tokens[:, t])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[k], "labels": self.tokens[k]}


def language_model(width: int, layers: int) -> LlamaForCausalLM:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, intermediate_size=2 * width, vocab_size=V,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, **heads,
        )
    )  # fmt: skip


def arguments(folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: LlamaForCausalLM) -> float:
    tokens = Texts(128).tokens
    predicted = model.eval()(input_ids=tokens).logits.argmax(-1)
    return (predicted[:, :-1] == tokens[:, 1:]).float().mean().item()


texts = Texts(1024)
teacher, student = language_model(48, 2), language_model(32, 1)
with tempfile.TemporaryDirectory() as folder:
    Trainer(teacher, arguments(folder, 50), train_dataset=texts).train()
    before = accuracy(student)
    options = Distillation(temperature=2.0, alignment_weight=1.0, pairs=[(-1, -1)], embedding_width=64)
    trainer = DistillationTrainer(
        student, arguments(folder, 50), teachers=teacher, distillation=options, train_dataset=texts
    )
    trainer.train()
print(f"next tokens that are right: teacher {accuracy(teacher):.0%}, student {before:.0%} -> {accuracy(student):.0%}")
assert accuracy(student) > before
