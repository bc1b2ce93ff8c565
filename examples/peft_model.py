"""A PEFT model on kdkernels' adapters, by one line: the same loss and gradients, and what a step costs.

    python examples/peft_model.py

The model is small and random, nothing is downloaded. Needs kdkernels[peft] and transformers.
"""

import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from kdkernels.integrations.peft import accelerate

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=512,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(config), lora)
tokens = torch.randint(1, 512, (8, 64))


def loss_and_gradients() -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(input_ids=tokens, labels=tokens).loss
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def seconds() -> float:
    """Of a forward and backward pass, dropout included."""
    start = time.perf_counter()
    loss_and_gradients()
    return time.perf_counter() - start


model.eval()  # no dropout: masks have the same distribution in both, but other bits
by_peft = loss_and_gradients()
with accelerate(model) as handle:
    by_kdkernels = loss_and_gradients()
    print(handle.report())
for ours, theirs in zip(by_kdkernels, by_peft, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
print(f"loss {by_kdkernels[0]:.6f}, by PEFT {by_peft[0]:.6f}; {len(by_peft) - 1} gradients agree")

model.train()
times: dict[str, list[float]] = {"PEFT": [], "kdkernels": []}
for _ in range(5):  # in turns: the machine's speed moves
    times["PEFT"].append(seconds())
    with accelerate(model):
        times["kdkernels"].append(seconds())
print("forward and backward: " + ", ".join(f"{name} {1e3 * median(found):.0f} ms" for name, found in times.items()))
