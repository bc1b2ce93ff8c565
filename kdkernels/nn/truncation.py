"""Models of linear recurrent units made smaller while they train: `truncate` and `keep_states`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import threads
from kdkernels.contract import check_choice, check_count, is_whole
from kdkernels.nn.lru import PRECISIONS, SMALLEST
from kdkernels.nn.moments import Basis, Transport, transported
from kdkernels.nn.replacing import (
    Layer,
    Replacement,
    States,
    check_optimizer,
    find_layers,
    options_of,
    replace,
    sliced,
    states_of,
)
from kdkernels.ops.hankel.systems import check
from kdkernels.ops.hankel.truncation import BalancedTruncation, distance, orders, reduce_all

MOMENTS = ("transport", "reset", "slice")
NEAR = 1e-4  # angles nearer to 0 go once round: the gradient of θ_log has the angle as a factor


@dataclass(frozen=True)
class TruncatedLayer:
    """What became of one `LRU`."""

    name: str  # in the model; empty where the model is the layer
    states_before: int  # n
    states: int  # r
    singular_values: Tensor  # (n,) before, float64
    error_bound: float  # no input sequence changes the output by more than so much of its l2 norm; 0 where r = n
    condition: float  # of the eigenvectors that made it diagonal again; 1 where r = n


@dataclass(frozen=True)
class Truncation:
    """What became of a model."""

    layers: tuple[TruncatedLayer, ...]

    @property
    def states(self) -> list[int]:
        """r of each layer: what `LRUClassifier` takes, to load what was saved afterwards."""
        return [layer.states for layer in self.layers]

    @property
    def reduced(self) -> bool:
        """Whether any state was taken away."""
        return any(layer.states < layer.states_before for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(
            f"{layer.name or 'model'}: {layer.states_before} -> {layer.states} states, "
            f"error at most {layer.error_bound:.3g}, condition {layer.condition:.3g}"
            for layer in self.layers
        )


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
    """Balanced truncation of every `LRU` in a model, in place, with its optimiser's state, between two steps.

    The systems (Λ, γB, C) are formed in float64 from the parameters and reduced as by `kdkernels.balanced_truncation`;
    D is left alone. Exactly one of tolerance, ranks and error says how far. A reduced layer gets new parameters without
    gradients, with the devices, dtypes and `requires_grad` of the old; a layer that keeps its states keeps its
    parameters and their state. Where anything raises, model and optimiser are as they were.

    The error bounds are those of the parameters as they are stored, in float32 perhaps, as maps of sequences in exact
    arithmetic; of the layers, not of the model. What runs on copies of the parameters (an average of weights, a scaler
    of gradients by parameter, `DistributedDataParallel`) must be made anew; processes with equal models and optimisers
    are equal afterwards.

    Args:
        model: an `LRU`, or a module with some in it, compiled or not. One that appears several times is reduced once.
        optimizer: whose parameter groups and state go on with the new parameters. Any but LBFGS.
        tolerance: τ, CompreSSM's rule for each layer: the smallest r with Σ_{k≤r} σ_k ≥ (1 − τ) Σσ_k, taken only if
            r < 0.95 n.
        ranks: r of all layers, of each in the order of `named_modules`, or of some by their names; at least 1 and at
            most n, which leaves a layer alone.
        error: ε: in each layer the smallest r whose `error_bound` is at most ε. It is absolute, the largest l2 norm of
            the change of an output sequence for an input sequence of l2 norm 1, and answers how to choose τ.
        moments: what becomes of the optimiser's state of replaced parameters.

            - `"transport"`: moved to the new basis. First moments (`exp_avg`, `momentum_buffer`, `grad_avg`) move as
              gradients do: exactly for B, C and γ, for Λ as far as the gradient of a full state matrix is known.
              Second moments (`exp_avg_sq`, `max_exp_avg_sq`, `square_avg`, `sum`) move as the variances of independent
              numbers do, beside the first moments' squares: they are positive, and what was moved never asks Adam for
              a step above its learning rate. Steps are kept. The momentum of RMSprop, which is of steps, begins at 0,
              and a state with other tensors is reset. The formulas are in `kdkernels/nn/moments.py`.
            - `"reset"`: dropped, as of a parameter that was not stepped yet.
            - `"slice"`: the first r rows, as CompreSSM does, although they are of other states.
        backend: as in `kdkernels.balanced_truncation`.

    Returns:
        `Truncation`: for each layer its sizes, Hankel singular values, error bound and condition number.

        Where a reduced layer would not be stable, the next greater rank is taken, and at last the layer as it was.

    Raises:
        TypeError, ValueError: the model has no `LRU`, is wrapped by DistributedDataParallel, or holds a parameter that
            is not finite or a |λ| that is 1; an option does not fit. The message names the layer or the argument.
    """
    check_choice("moments", moments, MOMENTS)
    layers = find_layers(model)
    check_optimizer(optimizer)
    if sum(x is not None for x in (tolerance, ranks, error)) != 1:
        raise ValueError("tolerance, ranks and error: exactly one of them must be given")
    chosen = None if ranks is None else _ranks(layers, ranks)
    on_cpu = all(layer.module.nu_log.device.type == "cpu" for layer in layers)
    bases = threads.each(_basis, layers, on_cpu=on_cpu)
    systems = check(*map(list, zip(*threads.each(Basis.system, bases, on_cpu=on_cpu), strict=True)))

    def store(i: int, reduced: BalancedTruncation) -> Stored:
        return stored(reduced, layers[i].module.nu_log.dtype)

    found = reduce_all(systems, orders(systems, chosen, tolerance, error), backend, store)

    def replacement(i: int) -> Replacement | None:
        layer, reduced = layers[i], found[i]
        if not isinstance(reduced, Stored):
            return None
        return Replacement(layer, reduced.parameters, _states(optimizer, layer, bases[i], reduced, moments))

    made = threads.each(replacement, range(len(layers)), on_cpu=on_cpu)
    replace(optimizer, (x for x in made if x is not None))
    return Truncation(
        tuple(
            TruncatedLayer(
                layer.name,
                reduced.singular_values.shape[-1],
                reduced.rank,
                reduced.singular_values,
                reduced.error_bound.item(),
                reduced.condition.item(),
            )
            for layer, reduced in zip(layers, found, strict=True)
        )
    )


def keep_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    states: Sequence[Any] | Mapping[str, Any],
) -> None:
    """Plain pruning: of every `LRU` in a model only these states, in place, with their optimiser's state.

    Nothing else changes: parameters and the tensors of their shape in the optimiser's state are sliced. So modes are
    pruned by |λ|, or at random, to compare with `truncate`, whose remarks on copies of parameters hold here too. A
    layer that keeps all its states in their order keeps its parameters.

    Args:
        model, optimizer: as in `truncate`.
        states: for each layer the indices it keeps, tensors or sequences of whole numbers from 0 to n − 1, each once
            and at least one, in the order that they shall have; or of some layers by their names.

    Raises:
        TypeError, ValueError: as `truncate`, or the indices do not fit; the message names the layer.
    """
    layers = find_layers(model)
    check_optimizer(optimizer)
    replacements = []
    with torch.no_grad():
        for layer, given in zip(layers, _each(layers, "states", states), strict=True):
            if given is None:
                continue
            kept = _indices(layer, given)
            if kept.tolist() == list(range(layer.module.states)):
                continue
            values, moved = sliced(layer, states_of(optimizer, layer), kept)
            replacements.append(Replacement(layer, values, moved))
        replace(optimizer, replacements)


@dataclass(frozen=True)
class Stored(BalancedTruncation):
    """A reduced system as an LRU's parameters, by which its error bound is larger."""

    parameters: dict[str, Tensor]


def stored(reduced: BalancedTruncation, dtype: torch.dtype) -> Stored:
    """The parameters in their dtype, with γ = √(1 − |λ|²), and a bound of the error that they have."""
    Lambda, B, C = (x.to(torch.complex128) for x in (reduced.Lambda, reduced.B, reduced.C))
    nu, theta = -Lambda.abs().clamp_min(SMALLEST).log(), Lambda.angle()
    nu_log, theta_log = nu.log().to(dtype), torch.where(theta < NEAR, theta + 2 * pi, theta).log().to(dtype)
    # in their own dtype too |λ| is below 1
    while bool((outside := torch.exp(torch.complex(-nu_log.exp(), theta_log.exp())).abs() >= 1).any()):
        nu_log = torch.where(outside, nu_log + log(2), nu_log)
    gamma_log = (0.5 * torch.log(-torch.expm1(-2 * nu_log.double().exp()))).to(dtype)
    B_ = B / gamma_log.double().exp().unsqueeze(-1)
    parts = {"B_re": B_.real, "B_im": B_.imag, "C_re": C.real, "C_im": C.imag}
    parameters = {"nu_log": nu_log, "theta_log": theta_log, "gamma_log": gamma_log}
    parameters |= {name: x.to(dtype) for name, x in parts.items()}
    basis = Basis({name: x.double() for name, x in parameters.items()})
    gain = 1 / torch.minimum(1 - Lambda.abs(), -torch.expm1(-basis.nu))
    moved = distance((Lambda, B, C), basis.system(), gain)
    own = {field.name: getattr(reduced, field.name) for field in dataclasses.fields(reduced)}
    own["error_bound"] = reduced.error_bound + 2 * moved  # twice, for its own rounding
    return Stored(**own, parameters=parameters)


def _basis(layer: Layer) -> Basis:
    """The parameters in float64. Raises ValueError that names the layer where its system cannot be reduced."""
    where = layer.name or "model"
    for name, parameter in layer.parameters.items():
        if parameter.dtype not in PRECISIONS:
            raise TypeError(
                f"{where}: {name} has dtype {parameter.dtype}, but must have torch.float32 or torch.float64"
            )
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"{where}: {name} is not finite")
    basis = Basis({name: x.detach().double() for name, x in layer.parameters.items()})
    for name, x in zip(("Λ", "γB", "C"), basis.system(), strict=True):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{where}: its parameters are finite, but {name} is not")
    if bool((basis.system()[0].abs() >= 1).any()):
        raise ValueError(f"{where}: nu_log is {layer.module.nu_log.min().item():.3g}, so that |λ| is 1, not below")
    return basis


def _states(
    optimizer: torch.optim.Optimizer | None, layer: Layer, basis: Basis, reduced: Stored, moments: str
) -> States:
    """What the optimiser goes on with."""
    states = states_of(optimizer, layer)
    if not states or moments == "reset":
        return {}
    if moments == "slice":
        return sliced(layer, states, torch.arange(reduced.rank))[1]
    new = Basis({name: x.double() for name, x in reduced.parameters.items()})
    lift, projection = (x.to(torch.complex128) for x in (reduced.lift, reduced.projection))
    assert optimizer is not None
    return transported(Transport(basis, new, lift, projection), states, options_of(optimizer, layer))


def _each(layers: list[Layer], argument: str, given: Any) -> list[Any]:
    """What is given for each layer; None for those that a mapping leaves out."""
    names = [layer.name for layer in layers]
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"{argument} has {unknown[0]!r}, but the layers are {', '.join(map(repr, names))}")
        return [given.get(name) for name in names]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{argument} is {type(given).__name__}, but must be a sequence or a mapping of names")
    if len(given) != len(layers):
        raise ValueError(f"{argument} has {len(given)} entries, but must have one for each of {len(layers)} layers")
    return list(given)


def _ranks(layers: list[Layer], ranks: Any) -> list[int]:
    """r of each layer."""
    several = [ranks] * len(layers) if is_whole(ranks) else _each(layers, "ranks", ranks)
    found = []
    for layer, r in zip(layers, several, strict=True):
        n = layer.module.states
        r = n if r is None else r
        name = f"ranks of {layer.name or 'model'}"
        check_count(name, r)
        if r > n:
            raise ValueError(f"{name} is {r}, but must be at most n = {n}")
        found.append(int(r))
    return found


def _indices(layer: Layer, given: Any) -> Tensor:
    """(r,) int64."""
    n, name = layer.module.states, f"states of {layer.name or 'model'}"
    try:
        kept = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise TypeError(f"{name} is {type(given).__name__}, but must be indices") from problem
    if not kept.numel():
        kept = kept.long()  # without numbers it has no dtype of its own
    if kept.dtype is torch.bool or kept.is_floating_point() or kept.is_complex() or kept.dim() != 1:
        raise TypeError(f"{name} has dtype {kept.dtype} and {kept.dim()} dimensions, but must be a list of indices")
    if not len(kept) or len(kept.unique()) != len(kept) or kept.min() < 0 or kept.max() >= n:
        raise ValueError(f"{name} must be indices from 0 to {n - 1}, at least one and each once")
    return kept.to(torch.int64)
