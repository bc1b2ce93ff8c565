"""State-space layers that lose states while they train: CompreSSM (arXiv 2510.02823) and its plain alternatives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.contract import check_choice, check_count, is_whole
from kdkernels.nn.lru import LRU
from kdkernels.ops.hankel.truncation import BalancedTruncation, balanced_truncation, distance

MOMENTS = ("transport", "reset", "slice")
STATE_DIMENSION = {"nu_log": 0, "theta_log": 0, "gamma_log": 0, "B_re": 0, "B_im": 0, "C_re": 1, "C_im": 1}
FIRST = ("exp_avg", "momentum_buffer", "grad_avg")  # what optimisers of torch call running means of gradients
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # and of their squares
SMALLEST_RADIUS = 1e-30

System = tuple[Tensor, Tensor, Tensor]
State = dict[str, Any]  # an optimiser's, of one parameter


@dataclass(frozen=True)
class TruncatedLayer:
    """What happened to one layer."""

    name: str  # of the module in the model; empty for the model itself
    states_before: int
    states: int
    singular_values: Tensor  # (states_before), float64, descending: what each balanced state was worth
    error_bound: float  # no input's outputs (those of the states, without D) are off by more, times the input's 2-norm
    condition: float  # of the eigenvectors that made the layer diagonal again


@dataclass(frozen=True)
class Truncation:
    """What `truncate` did, layer by layer."""

    layers: tuple[TruncatedLayer, ...]

    @property
    def reduced(self) -> bool:
        """Whether any layer lost states."""
        return any(layer.states < layer.states_before for layer in self.layers)

    @property
    def states(self) -> list[int]:
        """Of each layer, now."""
        return [layer.states for layer in self.layers]

    def __str__(self) -> str:
        rows = [
            f"{layer.name or 'model'}: {layer.states_before} -> {layer.states} states, error at most "
            f"{layer.error_bound:.3g} (largest singular value {float(layer.singular_values[0]):.3g}), "
            f"condition {layer.condition:.3g}"
            for layer in self.layers
        ]
        return "\n".join(rows)


@torch.no_grad()
def truncate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    tolerance: float | None = None,
    ranks: int | Sequence[int] | Mapping[str, int] | None = None,
    error: float | None = None,
    moments: str = "transport",
    backend: str = "auto",
) -> Truncation:
    """Take the least important states out of every `LRU` of a model, and go on training: CompreSSM's reduction.

    All layers are balanced by one call of `kdkernels.balanced_truncation`, on their device, in float64. A layer that
    loses states gets new parameters, with γ = √(1 − |λ|²), and the optimiser knows them in the old ones' place; one
    that keeps all is not touched. Exactly one of `tolerance`, `ranks` and `error` says how far to go.

    Args:
        model: holds the layers. Not a DistributedDataParallel: truncate its `module`, and wrap that anew.
        optimizer: any of torch's.
        tolerance: τ ≥ 0, CompreSSM's rule: as few states as keep the share 1 − τ of the sum of the Hankel singular
            values, and only if these are fewer than 95 % of a layer's.
        ranks: states to keep: of every layer, of each in the order of `named_modules`, or by name; layers that are not
            named keep all.
        error: ε ≥ 0, as few states as have an error bound of at most ε: then the 2-norm over time of what a layer's
            outputs change by is at most ε times that of its inputs, whatever they are.
        moments: what becomes of the optimiser's running means. `"transport"`: those of the gradients of B and C move
            to the new basis, exactly; their squares as variances do, v′ = |M|² v, exactly for uncorrelated gradients;
            of λ and γ, which do not move linearly, the means are 0 and the squares their mean over the old states.
            `"reset"`: the optimiser forgets the parameters. `"slice"`: the first states' are taken, though the basis is
            another (what CompreSSM's code does). What is in no known place is forgotten. Counts of steps are kept.
        backend: of `balanced_truncation`.

    Returns:
        `Truncation`. The error bounds are those of the parameters as they are stored.

    Raises:
        TypeError: the model is no module, or the optimizer none of torch's.
        ValueError: there is no LRU, a parameter is not finite, or an option does not fit. Nothing was changed then.
    """
    layers = find_layers(model)
    check_optimizer(optimizer)
    check_choice("moments", moments, MOMENTS)
    if sum(x is not None for x in (tolerance, ranks, error)) != 1:
        raise ValueError("tolerance, ranks and error: exactly one of them must be given")
    systems = [system_of(name, lru) for name, lru in layers.items()]
    options: dict[str, Any] = {"tolerance": tolerance, "error": error}
    if ranks is not None:
        options = {"rank": _ranks(ranks, layers)}
    found = balanced_truncation(*map(list, zip(*systems, strict=True)), **options, backend=backend)
    stored = [store(one, lru) for one, lru in zip(found, layers.values(), strict=True)]
    bounds = [_bound(one, system) for one, system in zip(found, stored, strict=True)]
    while error is not None and any(bound > error for bound in bounds):  # by what rounding the parameters added
        ranks = [one.rank + (bound > error) for one, bound in zip(found, bounds, strict=True)]
        found = balanced_truncation(*map(list, zip(*systems, strict=True)), rank=ranks, backend=backend)
        stored = [store(one, lru) for one, lru in zip(found, layers.values(), strict=True)]
        bounds = [_bound(one, system) for one, system in zip(found, stored, strict=True)]
    replacements = [
        replacement
        for one, parameters, lru in zip(found, stored, layers.values(), strict=True)
        if one.reduced
        for replacement in _replacements(lru, parameters, optimizer, moments, one)
    ]
    _replace(replacements, optimizer)
    return Truncation(
        tuple(
            TruncatedLayer(name, len(one.singular_values), one.rank, one.singular_values, bound, float(one.condition))
            for name, one, bound in zip(layers, found, bounds, strict=True)
        )
    )


@torch.no_grad()
def keep_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    states: Mapping[str, Tensor] | Sequence[Tensor],
) -> None:
    """Keep some states of every `LRU` as they are, and drop the others: pruning, beside which to see `truncate`.

    Parameters and whatever the optimiser holds of them are sliced.

    Args:
        model, optimizer: as for `truncate`.
        states: the places of those to keep, whole numbers, in each layer: a tensor for each in the order of
            `named_modules`, or by name; layers that are not named keep all.

    Raises:
        TypeError, ValueError: as for `truncate`.
    """
    layers = find_layers(model)
    check_optimizer(optimizer)
    chosen = _by_layer("states", states, layers)
    replacements = []
    for name, places in chosen.items():
        lru = layers[name]
        index = torch.as_tensor(places, device=lru.nu_log.device)
        n = lru.states
        if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
            raise TypeError(f"states of {name or 'the model'} must be one row of whole numbers")
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= n or len(index.unique()) < len(index):
            raise ValueError(
                f"states of {name or 'the model'} must be different numbers from 0 to {n - 1}, at least one"
            )
        for parameter in STATE_DIMENSION:
            dim = STATE_DIMENSION[parameter]
            old = getattr(lru, parameter)
            sliced = partial(torch.index_select, dim=dim, index=index)
            state = _each(_state_of(optimizer, old), old, sliced)
            replacements.append(_Replacement(lru, parameter, _like(sliced(old), old), state))
    _replace(replacements, optimizer)


# ---- layers and their systems


def find_layers(model: nn.Module) -> dict[str, LRU]:
    """Every LRU of a model by its name, once each."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, but must be a torch.nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model is a DistributedDataParallel, but must be its module: wrap that anew afterwards")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LRU)}
    if not layers:
        raise ValueError("model has no kdkernels.nn.LRU")
    return layers


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError unless it is None or one of torch's."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}, but must be a torch.optim.Optimizer")


def system_of(name: str, lru: LRU) -> System:
    """Λ (n), γB (n, H), C (H, n) in float64, λ from the logarithms, so that nothing is lost near the unit circle."""
    for parameter in STATE_DIMENSION:
        if not bool(getattr(lru, parameter).isfinite().all()):
            where = f"{name}.{parameter}" if name else parameter
            raise ValueError(f"{where} is not finite: the training has diverged")
    wide = {parameter: getattr(lru, parameter).to(torch.float64) for parameter in STATE_DIMENSION}
    return assemble(wide)


def assemble(parameters: Mapping[str, Tensor]) -> System:
    """Λ, γB and C of parameters in float64."""
    p = parameters
    Lambda = torch.polar(torch.exp(-p["nu_log"].exp()), p["theta_log"].exp())
    B = torch.complex(p["B_re"], p["B_im"]) * p["gamma_log"].exp().unsqueeze(-1)
    return Lambda, B, torch.complex(p["C_re"], p["C_im"])


def store(found: BalancedTruncation, lru: LRU) -> dict[str, Tensor]:
    """The parameters of a reduced system, in the layer's dtype.

    An angle of 0 has no logarithm, so it is stored as 2π, which a gradient can still move; and no rounding may bring
    |λ| to 1.
    """
    dtype = lru.nu_log.dtype
    nearest = torch.finfo(dtype).eps  # of −log |λ|: exp of less rounds to 1
    radius = found.Lambda.abs().clamp_min(SMALLEST_RADIUS)
    nu = (-radius.log()).clamp_min(nearest)
    angle = found.Lambda.angle() if found.Lambda.is_complex() else torch.where(found.Lambda < 0, pi, 0.0)
    theta = torch.where(angle > 0, angle, angle + 2 * pi)
    nu_log = nu.log().to(dtype)
    gamma_log = 0.5 * torch.log(-torch.expm1(-2 * nu_log.to(torch.float64).exp()))
    B = found.B / gamma_log.to(dtype).to(torch.float64).exp().unsqueeze(-1)
    parts = {"nu_log": nu_log, "theta_log": theta.log(), "gamma_log": gamma_log}
    parts |= {"B_re": B.real, "B_im": B.imag, "C_re": found.C.real, "C_im": found.C.imag}
    return {name: x.to(dtype) for name, x in parts.items()}


def _bound(found: BalancedTruncation, stored: Mapping[str, Tensor]) -> float:
    """The error bound of what is stored: rounding the parameters moves the system too."""
    if not found.reduced:
        return 0.0
    system = assemble({name: x.to(torch.float64) for name, x in stored.items()})
    radius = torch.maximum(found.Lambda.abs(), system[0].abs())
    moved = distance((found.Lambda, found.B, found.C), system, 1 / (1 - radius))
    return float(found.error_bound + moved)


def _ranks(ranks: Any, layers: Mapping[str, LRU]) -> list[int]:
    """One for each layer."""
    if is_whole(ranks):
        ranks = [ranks] * len(layers)
    chosen = {name: lru.states for name, lru in layers.items()} | _by_layer("ranks", ranks, layers)
    for name, rank in chosen.items():
        check_count(f"ranks of {name or 'the model'}", rank)
        if rank > layers[name].states:
            raise ValueError(f"{name or 'the model'} has {layers[name].states} states, but shall keep {rank} of them")
    return list(chosen.values())


def _by_layer(option: str, values: Any, layers: Mapping[str, LRU]) -> dict[str, Any]:
    """What an option says of each layer."""
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in layers]
        if unknown:
            raise ValueError(f"{option} names {unknown[0]!r}, but the layers are {', '.join(map(repr, layers))}")
        return dict(values)
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{option} is {type(values).__name__}, but must be a list or a dict, by layer")
    if len(values) != len(layers):
        raise ValueError(f"{option} has {len(values)} entries, but the model has {len(layers)} layers")
    return dict(zip(layers, values, strict=True))


# ---- parameters and what an optimiser knows of them


@dataclass(frozen=True)
class _Replacement:
    """A parameter of a layer, the one that takes its place, and what the optimiser shall know of that."""

    lru: LRU
    name: str
    new: nn.Parameter
    state: State


def _replace(replacements: Sequence[_Replacement], optimizer: torch.optim.Optimizer | None) -> None:
    """Nothing in here can fail: either all are replaced or, before, none."""
    new = {}
    for one in replacements:
        new[getattr(one.lru, one.name)] = one
        setattr(one.lru, one.name, one.new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new[p].new if p in new else p for p in group["params"]]
    for old, one in new.items():
        if optimizer.state.pop(old, None) is not None and one.state:
            optimizer.state[one.new] = one.state


def _like(value: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.to(old.device, old.dtype).contiguous(), requires_grad=old.requires_grad)


def _state_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> State:
    return {} if optimizer is None else dict(optimizer.state.get(parameter, {}))


def _each(state: State, old: nn.Parameter, change: Callable[[Tensor], Tensor]) -> State:
    """The state with every tensor of the parameter's shape changed."""
    return {
        key: change(value).contiguous() if isinstance(value, Tensor) and value.shape == old.shape else value
        for key, value in state.items()
    }


def _replacements(
    lru: LRU,
    stored: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    moments: str,
    found: BalancedTruncation,
) -> list[_Replacement]:
    """Of all parameters of a layer."""
    olds = {name: getattr(lru, name) for name in STATE_DIMENSION}
    states = {name: _state_of(optimizer, old) for name, old in olds.items()}
    if moments == "reset":
        states = {name: {} for name in states}
    elif moments == "slice":

        def first(value: Tensor, dim: int) -> Tensor:
            return value.narrow(dim, 0, found.rank)

        states = {
            name: _each(state, olds[name], partial(first, dim=STATE_DIMENSION[name])) for name, state in states.items()
        }
    else:
        states = _transported(states, olds, stored, found)
    return [_Replacement(lru, name, _like(stored[name], old), states[name]) for name, old in olds.items()]


def _transported(
    states: Mapping[str, State],
    olds: Mapping[str, nn.Parameter],
    stored: Mapping[str, Tensor],
    found: BalancedTruncation,
) -> dict[str, State]:
    """Running means in the new basis; a state of which some tensor has no known meaning is forgotten.

    The gradient of γB moves by the adjoint of the lift, that of C by the adjoint of the projection (see
    `BalancedTruncation.transport_dual`); that of B is γ times that of γB.
    """
    old_gamma = olds["gamma_log"].to(torch.float64).exp().unsqueeze(-1)
    new_gamma = stored["gamma_log"].to(torch.float64).exp().unsqueeze(-1)
    to_B = found.lift.mH * old_gamma.mT.reciprocal() * new_gamma  # (r, n)
    to_C = found.projection.mH  # (n, r)
    maps: dict[str, Callable[[Tensor], Tensor]] = {"B": lambda g: to_B @ g, "C": lambda g: g @ to_C}
    spread: dict[str, Callable[[Tensor], Tensor]] = {
        "B": lambda v: to_B.abs().square() @ v,
        "C": lambda v: v @ to_C.abs().square(),
    }
    moved: dict[str, State] = {}
    for name in ("nu_log", "theta_log", "gamma_log"):
        moved[name] = {
            key: _of_eigenvalues(key, value, found.rank) if _whole(value, olds[name]) else value
            for key, value in states[name].items()
        }
    for matrix in ("B", "C"):
        names = f"{matrix}_re", f"{matrix}_im"
        re, im = (states[name] for name in names)
        moved |= {name: {} for name in names}
        for key in re.keys() & im.keys():
            x, y = re[key], im[key]
            if not _whole(x, olds[names[0]]) or not _whole(y, olds[names[1]]):
                pair = x, y
            elif key in FIRST:
                g = maps[matrix](torch.complex(x.to(torch.float64), y.to(torch.float64)))
                pair = g.real.to(x.dtype).contiguous(), g.imag.to(y.dtype).contiguous()
            else:
                v = spread[matrix]((x.to(torch.float64) + y.to(torch.float64)) / 2)
                pair = v.to(x.dtype), v.to(y.dtype).clone()
            for name, value in zip(names, pair, strict=True):
                moved[name][key] = value
    return {name: {} if _unknown(states[name], olds[name]) else moved[name] for name in STATE_DIMENSION}


def _whole(value: Any, old: nn.Parameter) -> bool:
    """Whether it has an entry for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == old.shape


def _unknown(state: State, old: nn.Parameter) -> bool:
    return any(_whole(value, old) and key not in FIRST + SECOND for key, value in state.items())


def _of_eigenvalues(key: str, value: Tensor, r: int) -> Tensor:
    return value.new_zeros(r) if key in FIRST else value.mean().expand(r).clone()
