"""A classifier of linear recurrent units that loses states while it trains; its optimiser goes on with the rest.

    python examples/truncate_while_training.py

The sequences are made up: noise with a decaying oscillation in it, whose frequency is the class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

CLASSES, LENGTH, STEPS, REDUCED_AT = 4, 64, 80, (20, 40)
torch.manual_seed(0)


def sequences(count: int) -> tuple[Tensor, Tensor]:
    """(count, LENGTH, 1), and classes (count)."""
    label = torch.randint(CLASSES, (count,))
    t, phase = torch.arange(LENGTH), 6.28 * torch.rand(count, 1)
    wave = torch.exp(-t / LENGTH) * torch.cos(0.3 * (label[:, None] + 1) * t + phase)
    return (wave + 0.5 * torch.randn(count, LENGTH)).unsqueeze(-1), label


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    x, label = sequences(300)
    return (model(x).argmax(-1) == label).float().mean().item()


model = kd.nn.LRUClassifier(inputs=1, features=8, states=48, classes=CLASSES, blocks=2, min_radius=0.8, max_radius=0.99)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(STEPS):
    if step in REDUCED_AT:
        before = accuracy(model)
        print(kd.nn.truncate(model, optimizer, tolerance=0.05))
        print(f"step {step}: {before:.1%} right before, {accuracy(model):.1%} after")
    x, label = sequences(32)
    loss = F.cross_entropy(model(x), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(
    f"in the end {model.states} of 48 states, {accuracy(model):.1%} right, {F.cross_entropy(model(x), label):.3f} loss"
)
assert max(model.states) < 48

again = kd.nn.LRUClassifier(1, 8, model.states, CLASSES)  # of the sizes that are left
again.load_state_dict(model.state_dict())
torch.testing.assert_close(again(x), model(x))
