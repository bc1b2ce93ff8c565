"""Other parameters, of another size, in a module and in its optimiser: all of them or none."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels.nn.lru import LRU

NAMES = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")  # all of an LRU's but D
State = dict[str, Any]  # what an optimiser keeps of one parameter
States = dict[str, State]  # of the parameters with these names; those without any are left out


@dataclass(frozen=True)
class Layer:
    """An LRU in its model."""

    name: str
    module: LRU

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that depend on its states."""
        return {name: getattr(self.module, name) for name in NAMES}


def find_layers(model: object) -> list[Layer]:
    """Every `LRU`, in the order of `named_modules`, each once.

    Raises:
        TypeError: the model is no module.
        ValueError: it has none, or is DistributedDataParallel, or a parameter of theirs is another module's too, or is
            made of others (parametrized, pruned).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    whole: nn.Module = getattr(model, "_orig_mod", model)  # torch.compile's; it sees the new sizes and compiles anew
    found: list[Layer] = []
    owners: dict[nn.Parameter, str] = {}
    for name, module in whole.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model is or holds DistributedDataParallel{f' ({name})' if name else ''}, which keeps the parameters "
                "it was made of: pass model.module, and wrap it again afterwards"
            )
        if isinstance(module, LRU):
            found.append(Layer(name, module))
            for key in NAMES:
                path, parameter = _path(name, key), module._parameters.get(key)
                if parameter is None:
                    raise ValueError(f"{path} is made of other parameters (parametrized, pruned), but must be one")
                _check_owner(path, parameter, owners)
                owners[parameter] = path
    if not found:
        raise ValueError(f"model is {type(model).__name__} without any kdkernels.nn.LRU, but must have at least one")
    for name, module in whole.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not (isinstance(module, LRU) and key in NAMES):
                _check_owner(_path(name, key), parameter, owners)
    return found


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check_owner(path: str, parameter: nn.Parameter, owners: dict[nn.Parameter, str]) -> None:
    if parameter in owners:
        raise ValueError(f"{path} and {owners[parameter]} are one parameter, but each layer needs its own")


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError unless it is None or a torch optimiser whose state lies with each parameter."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}, but must be a torch.optim.Optimizer or None")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer is LBFGS, whose history is of all parameters at once: make a new one instead")


def states_of(optimizer: torch.optim.Optimizer | None, layer: Layer) -> States:
    """What the optimiser keeps of the layer's parameters; nothing where it has not begun."""
    if optimizer is None:
        return {}
    return {name: optimizer.state[x] for name, x in layer.parameters.items() if optimizer.state.get(x)}


def is_counter(value: object) -> bool:
    """Whether an entry of an optimiser's state has nothing to do with the parameter's shape, such as its steps."""
    return not isinstance(value, Tensor) or value.numel() == 1


def fresh(optimizer: torch.optim.Optimizer, state: State, parameter: Tensor) -> State:
    """The state of a parameter that has not been stepped yet: none, except Adagrad's, which makes it beforehand, and
    fused SGD's, which takes momentum of all parameters or of none."""
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused") and "momentum_buffer" in state:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    start = optimizer.defaults["initial_accumulator_value"]
    return {"step": torch.zeros_like(state["step"]), "sum": torch.full_like(parameter, start)}


def options_of(optimizer: torch.optim.Optimizer, layer: Layer) -> dict[str, dict[str, Any]]:
    """The group of each of the layer's parameters that the optimiser has."""
    groups = {x: group for group in optimizer.param_groups for x in group["params"]}
    return {name: groups[x] for name, x in layer.parameters.items() if x in groups}


def sliced(layer: Layer, states: States, kept: Tensor) -> tuple[dict[str, Tensor], States]:
    """Parameters and states of these states of the layer alone; a state with tensors of other shapes is left out."""

    def take(name: str, x: Tensor) -> Tensor:
        return x.detach().index_select(1 if name.startswith("C") else 0, kept.to(x.device))

    values = layer.parameters
    moved: States = {}
    for name, state in states.items():
        if all(is_counter(x) or x.shape == values[name].shape for x in state.values()):
            moved[name] = {key: x if is_counter(x) else take(name, x) for key, x in state.items()}
    return {name: take(name, x) for name, x in values.items()}, moved


@dataclass(frozen=True)
class Replacement:
    """New values of one layer's parameters, and the states that the optimiser goes on with."""

    layer: Layer
    values: dict[str, Tensor]
    states: States


@torch.no_grad()
def replace(optimizer: torch.optim.Optimizer | None, replacements: Iterable[Replacement]) -> None:
    """Put them in: as new parameters without gradients, on the device, in the dtype and as trainable as the old."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    states: dict[nn.Parameter, State] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for replacement in replacements:
        for name, old in replacement.layer.parameters.items():
            value = replacement.values[name].to(device=old.device, dtype=old.dtype).contiguous()
            new[old] = nn.Parameter(value, requires_grad=old.requires_grad)
            places.append((replacement.layer.module, name, new[old]))
            if optimizer is not None and optimizer.state.get(old):
                states[old] = replacement.states.get(name) or fresh(optimizer, optimizer.state[old], new[old])
    # from here on nothing can fail
    for module, name, parameter in places:
        setattr(module, name, parameter)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"][:] = [new.get(x, x) for x in group["params"]]
    for old, state in states.items():
        del optimizer.state[old]
        if state:
            optimizer.state[new[old]] = state
