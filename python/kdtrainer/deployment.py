"""A trained student made ready: adapters merged, what was beside it dropped, then quantised or pruned; and measured."""

import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune

from kdkernels.nn import LoRALinear
from kdtrainer.page import Table

Model = TypeVar("Model", bound=nn.Module)
RUNS = 3  # over all inputs; the first warms up


@dataclass(frozen=True)
class Deployed:
    """A model as it would be shipped."""

    name: str
    parameters: int
    kept: int  # of these, that are not 0
    bytes: int  # of its file
    seconds: float  # of one input, the median over inputs
    metric: float


def merged(model: Model) -> Model:
    """A copy with plain linear layers, each adapter added to its weight; what is trained does not change."""
    made = copy.deepcopy(model).eval()
    adapted = [(name, module) for name, module in made.named_modules() if isinstance(module, LoRALinear)]
    for name, layer in adapted:
        if not layer.merged:
            layer.merge()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.weight.detach())
        plain.register_parameter("bias", None if layer.bias is None else nn.Parameter(layer.bias.detach()))
        made.set_submodule(name, plain)
    return made.requires_grad_(False)


def quantised(model: Model) -> Model:
    """A copy whose linear and recurrent layers have int8 weights; activations are quantised as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own tool, and nothing else that it has does this
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear, nn.GRU}, torch.qint8)


def pruned(model: Model, share: float) -> Model:
    """A copy without this share of all linear layers' weights, those nearest to 0."""
    made = copy.deepcopy(model)
    weights = [(module, "weight") for module in made.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
    for module, name in weights:
        prune.remove(module, name)
    return made.requires_grad_(False)


def measured(
    name: str, models: Sequence[nn.Module], run: Callable[[int], object], inputs: int, metric: float
) -> Deployed:
    """`run` computes the k-th input's output by all the models, which are one or an ensemble."""
    tensors = [tensor for model in models for tensor in stored(model)]
    size = sum(map(bytes_of, models))
    counts = sum(x.numel() for x in tensors), sum(int(x.count_nonzero()) for x in tensors)
    return Deployed(name, *counts, size, latency(run, inputs), metric)


def table(found: Sequence[Deployed], metric: str) -> Table:
    """`metric` is of a share, and is shown in percent."""
    cells = [
        [x.name, f"{x.parameters:,}", f"{x.kept:,}", f"{x.bytes / 1024:,.0f}", f"{1e3 * x.seconds:.2f}"] for x in found
    ]
    rows = [[*row, f"{100 * x.metric:.1f}"] for row, x in zip(cells, found, strict=True)]
    return Table("as it is shipped", ("model", "parameters", "not 0", "KiB", "ms for one", metric), rows)


def stored(model: nn.Module) -> list[torch.Tensor]:
    """All weights, those of quantised layers as numbers."""
    found = []

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value.dequantize() if value.is_quantized else value)
        elif isinstance(value, (tuple, list)):
            for each in value:
                add(each)

    for value in model.state_dict().values():
        add(value)
    return [x for x in found if x.is_floating_point()]


def bytes_of(model: nn.Module) -> int:
    """Of the file that `torch.save` makes of its state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


@torch.no_grad()
def latency(run: Callable[[int], object], inputs: int) -> float:
    """Seconds of one input, the median over inputs and runs."""
    seconds = []
    for turn in range(RUNS):
        for k in range(inputs):
            start = time.perf_counter()
            run(k)
            if turn:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
