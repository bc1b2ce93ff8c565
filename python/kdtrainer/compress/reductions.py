"""How a model loses states: by balanced truncation, or by keeping some of them as they are."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.nn import LRU, LRUClassifier, Truncation
from kdtrainer.compress.config import Config
from kdtrainer.compress.training import Reduce, Trained, layers_of


def truncating(config: Config) -> Reduce:
    """CompreSSM's way."""

    def reduce(model: LRUClassifier, optimizer: torch.optim.Optimizer, step: int) -> Truncation:
        return kd.nn.truncate(
            model,
            optimizer,
            tolerance=config.tolerance,
            error=config.error,
            ranks=None if config.ranks is None else [min(config.ranks, n) for n in model.states],
            moments=config.moments,
        )

    return reduce


def keeping(which: str, config: Config, sizes: dict[int, list[int]]) -> Reduce:
    """As many states as `sizes` says of each step, chosen by `which`, as they are."""

    def reduce(model: LRUClassifier, optimizer: torch.optim.Optimizer, step: int) -> None:
        if sizes[step] != model.states:
            generator = torch.Generator().manual_seed(config.seed_of(f"kept/{step}"))
            chosen = [
                WORTH[which](layer, generator).argsort(descending=True)[:n].sort().values
                for layer, n in zip(layers_of(model), sizes[step], strict=True)
            ]
            kd.nn.keep_states(model, optimizer, states=chosen)

    return reduce


def alone(layer: LRU) -> Tensor:
    """‖b_i‖‖c_i‖/(1 − |λ_i|²): the Hankel singular value of each state, were it the only one."""
    with torch.no_grad():
        Lambda, B, C = layer.system()
        return B.norm(dim=1) * C.norm(dim=0) / (1 - Lambda.abs().square())


# The states that are worth most are kept.
WORTH: dict[str, Callable[[LRU, torch.Generator], Tensor]] = {
    "random": lambda layer, generator: torch.rand(layer.states, generator=generator),
    "smallest": lambda layer, generator: -alone(layer),  # on purpose the wrong ones: how much does the choice matter?
    "modal": lambda layer, generator: layer.eigenvalues().detach().abs(),
}


def after_training(trained: Trained, states: list[int]) -> LRUClassifier:
    """A trained model, truncated to these sizes, and not trained further."""
    model = copy.deepcopy(trained.model)
    kd.nn.truncate(model, ranks=[min(n, now) for n, now in zip(states, model.states, strict=True)])
    return model
