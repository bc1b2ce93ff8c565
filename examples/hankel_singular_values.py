"""What the states of one's own state-space layers are worth: a diagonal layer of S5's kind, and Mamba's.

    python examples/hankel_singular_values.py

All that is needed is each layer's discrete system, h⁺ = Λh + Bu, y = Ch. Mamba's is from transformers, small and
random; nothing is downloaded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd


class DiagonalLayer(nn.Module):
    """A layer as one may have it: continuous time, log step sizes, several inputs and outputs, y = Re(C h)."""

    def __init__(self, features: int, states: int) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.randn(states))
        self.frequency = nn.Parameter(3.14 * torch.arange(states))
        self.log_step = nn.Parameter(torch.empty(states).uniform_(-6, -2))
        self.B = nn.Parameter(torch.randn(states, features, dtype=torch.complex64) / features**0.5)
        self.C = nn.Parameter(torch.randn(features, states, dtype=torch.complex64) / states**0.5)

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zero-order hold: Λ = exp(Δ A), B = (Λ − 1)/A B."""
        A = torch.complex(-self.log_decay.exp(), self.frequency)
        Lambda = (self.log_step.exp() * A).exp()
        return Lambda, ((Lambda - 1) / A).unsqueeze(-1) * self.B, self.C


def worth(sigma: Tensor, share: float = 0.99) -> Tensor:
    """How many states carry this share of Σσ: (..., n) -> (...)."""
    return (sigma.cumsum(-1) < share * sigma.sum(-1, keepdim=True)).sum(-1) + 1


@torch.no_grad()
def own_layer() -> None:
    Lambda, B, C = DiagonalLayer(features=4, states=32).system()
    sigma = kd.hankel_singular_values(Lambda, B, C)
    print(f"a layer of one's own: {worth(sigma)} of 32 states carry 99 % of Σσ, {sigma[0]:.3g} to {sigma[-1]:.3g}")

    # the same values by another way: from the first 300 steps of a system that forgets within them
    Lambda = 0.9 * Lambda
    powers = Lambda ** torch.arange(300)[:, None]  # (T, n)
    markov = torch.einsum("pn,tn,nm->tpm", C, powers, B)  # (T, p, m): what it answers to an impulse
    leading = kd.hankel_svd(markov, rank=8).S
    torch.testing.assert_close(kd.hankel_singular_values(Lambda, B, C)[:8], leading, rtol=1e-3, atol=1e-5)
    print("its leading values are those of the block-Hankel matrix of its impulse response")


@torch.no_grad()
def mamba_layer() -> None:
    """Mamba's Δ, B and C depend on the token: with their mean over a text, each channel is a system of its own."""
    from transformers import MambaConfig, MambaModel

    model = MambaModel(MambaConfig(hidden_size=32, state_size=16, num_hidden_layers=1, vocab_size=64)).eval()
    mixer, selected = model.layers[0].mixer, []
    mixer.x_proj.register_forward_hook(lambda module, inputs, output: selected.append(output))
    model(torch.randint(64, (2, 50)), use_cache=False)
    n = mixer.ssm_state_size
    step, B, C = selected[0].split([mixer.time_step_rank, n, n], -1)  # each (batch, time, ...)
    step = F.softplus(mixer.dt_proj(step)).mean((0, 1))  # Δ (channels)
    B, C = B.mean((0, 1)), C.mean((0, 1))  # (n), the same for all channels
    A = -mixer.A_log.exp()  # (channels, n)
    Lambda = (step[:, None] * A).exp()
    sigma = kd.hankel_singular_values(Lambda, (step[:, None] * B).unsqueeze(-1), C.expand_as(A).unsqueeze(-2))
    kept = worth(sigma)
    print(f"Mamba: of {n} states a channel needs {kept.min()} to {kept.max()} for 99 % of Σσ ({len(kept)} channels)")


torch.manual_seed(0)
own_layer()
mamba_layer()
