"""The benchmark cases of layers with adapters: forward and backward, beside the linear layer alone, the floor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import explain, lora_linear, lora_linear_group
from kdkernels.backend import Cost, Explanation
from kdkernels.ops.lora_linear import LoRA, reference
from kdkernels.philox import draw_states
from kdkernels.testing.compare import Deviation, Outcome, deviations, errors
from kdkernels.testing.lora_linear.inputs import Function, Inputs, Step, exact, make_inputs
from kdkernels.testing.lora_linear.inputs import eager as eager_outcome

OP = "lora_linear"
SEED = 7  # of the masks of every step

Layers = Sequence[LoRA]


@dataclass(frozen=True)
class Workload:
    """One case; `open` draws its tensors."""

    name: str
    arguments: dict[str, Any]
    op: str = OP

    def open(self, device: str = "cpu") -> "Session":
        """The case, ready to run. The base is frozen."""
        defaults: dict[str, Any] = {"needs": ("input", "lora_A", "lora_B"), "device": device}
        return Session(make_inputs(**defaults | self.arguments))


@dataclass
class Session:
    """A case's tensors; every variant steps from the same ones."""

    inputs: Inputs
    dtype: torch.dtype = field(init=False)
    whole: Step = field(init=False)
    base: Step = field(init=False)  # of the linear layers alone, which have a gradient for the input only

    def __post_init__(self) -> None:
        self.dtype = self.inputs.input.dtype
        self.whole = Step(self.inputs)
        self.base = Step(replace(self.inputs, needs=frozenset(("input",))))

    def refresh(self) -> None:
        """What happens between two steps, untimed: the same masks for all of a variant's steps."""
        torch.manual_seed(SEED)

    def variants(self) -> dict[str, Callable[[], Outcome]]:
        """One forward and backward of each contender."""
        torch.compiler.reset()
        functions: dict[str, Function] = {
            "linear": linear,
            "eager": eager,
            "torch.compile": torch.compile(eager, fullgraph=True, dynamic=False),
        }
        if find_spec("peft") is not None:
            functions["PEFT"] = peft_layers(self.inputs)
        if len(self.inputs.layers) > 1:
            functions["kdkernels, one by one"] = one_by_one
        functions["kdkernels"] = kdkernels
        return {name: lambda function=function: self.step(function) for name, function in functions.items()}  # type: ignore[misc]

    def step(self, function: Function) -> Outcome:
        """Outputs and the wanted gradients."""
        return (self.base if function is linear else self.whole)(function)

    def judge(self, outcomes: dict[str, Outcome]) -> dict[str, list[Deviation]]:
        """Each variant's errors against float64, beside twice those of eager.

        Ours are held to the masks of the step after `refresh`; the others, whose masks nobody knows, to a step of
        theirs without dropout.
        """
        plain = Session(without_dropout(self.inputs))
        target, variants = exact(plain.inputs), plain.variants()
        yardstick = errors(eager_outcome(plain.inputs), target)
        found = {}
        for name, outcome in outcomes.items():
            if name == "linear":
                outcome, base = plain.step(linear), Session(plain.inputs.to(torch.float64)).step(linear)
                found[name] = deviations(outcome, base, errors(outcome, base))
            elif name.startswith("kdkernels"):
                masked = replace(self.inputs, states=self.states(name))
                masked_target = exact(masked)
                found[name] = deviations(outcome, masked_target, errors(eager_outcome(masked), masked_target))
            else:
                found[name] = deviations(variants[name](), target, yardstick)
        return found

    def states(self, name: str) -> Tensor:
        """What a step of ours draws after `refresh`."""
        self.refresh()
        K, device = len(self.inputs.layers), self.inputs.input.device
        if name == "kdkernels":
            return draw_states(K, device)
        return torch.cat([draw_states(1, device) for _ in range(K)])

    def cost(self, variant: str) -> Cost:
        """The FLOPs and bytes of what the variant runs, those of one layer times their number."""
        method = {"linear": "base", "kdkernels": self.explain().method, "kdkernels, one by one": "fused"}
        wanted = method.get(variant, "eager")
        one = next(cost for cost in self.explain().costs if cost.method == wanted)
        K = len(self.inputs.layers)
        return Cost(wanted, K * one.flops, K * one.bytes)

    def explain(self) -> Explanation:
        """What the operator runs here for the first layer."""
        layer = self.inputs.layers[0]
        leaves = {name: getattr(layer, name).detach().requires_grad_() for name in ("lora_A", "lora_B")}
        x = self.inputs.input.detach().requires_grad_()
        options = {"bias": layer.bias, "scaling": layer.scaling, "dropout_p": layer.dropout_p}
        return explain(OP, x, layer.weight, **leaves, **options)


def linear(x: Tensor, layers: Layers) -> list[Tensor]:
    """The base layers alone."""
    return [F.linear(x, layer.weight, layer.bias) for layer in layers]


def eager(x: Tensor, layers: Layers) -> list[Tensor]:
    """PEFT's steps, without its bookkeeping."""
    return [
        reference.eager(
            x, F.dropout(x.to(a.lora_A.dtype), a.dropout_p), a.weight, a.bias, a.lora_A, a.lora_B, a.scaling
        )
        for a in layers
    ]


def kdkernels(x: Tensor, layers: Layers) -> Sequence[Tensor]:
    """Ours: siblings as a group."""
    return one_by_one(x, layers) if len(layers) == 1 else lora_linear_group(x, layers)


def one_by_one(x: Tensor, layers: Layers) -> list[Tensor]:
    """Ours, a call for each layer."""
    return [
        lora_linear(x, a.weight, a.lora_A, a.lora_B, bias=a.bias, scaling=a.scaling, dropout_p=a.dropout_p)
        for a in layers
    ]


def peft_layers(inputs: Inputs) -> Callable[[Tensor, Layers], list[Tensor]]:
    """The layers of PEFT itself, which take the tensors of each step as their parameters."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    modules = []
    for layer in inputs.layers:
        d_out, d_in = layer.weight.shape
        base = torch.nn.Linear(d_in, d_out, bias=layer.bias is not None, device="meta")
        r = layer.lora_A.shape[0]
        config = LoraConfig(r=r, lora_alpha=1, lora_dropout=layer.dropout_p, init_lora_weights=False)
        modules.append(Linear(base, "default", config, r=r, lora_alpha=1).train())

    def forward(x: Tensor, layers: Layers) -> list[Tensor]:
        outputs = []
        for module, layer in zip(modules, layers, strict=True):
            module.scaling["default"] = layer.scaling
            parameters = {
                "base_layer.weight": layer.weight,
                "lora_A.default.weight": layer.lora_A,
                "lora_B.default.weight": layer.lora_B,
            }
            if layer.bias is not None:
                parameters["base_layer.bias"] = layer.bias
            outputs.append(torch.func.functional_call(module, parameters, (x,)))
        return outputs

    return forward


def without_dropout(inputs: Inputs) -> Inputs:
    """The same call with p = 0."""
    return replace(inputs, layers=tuple(layer._replace(dropout_p=0.0) for layer in inputs.layers))


def workloads(quick: bool = False, device: str = "cpu") -> list[Workload]:
    """The cases; `quick` shrinks every size and keeps the shapes' proportions."""
    return workloads_on_a_cpu(quick) if device == "cpu" else workloads_on_a_gpu(quick)


def workloads_on_a_gpu(quick: bool) -> list[Workload]:
    """In bfloat16, with 16384 points."""
    shrink = 16 if quick else 1
    N, r = 16384 // shrink // shrink, 16 if not quick else 4
    cases = []
    for d_in, d_out, K, rates in (
        (4096, 4096, 1, (0.0, 0.1)), (1024, 1024, 1, (0.0, 0.1)), (768, 3072, 1, (0.1,)), (1024, 1024, 3, (0.1,))
    ):  # fmt: skip
        sizes: dict[str, Any] = {"N": N, "d_in": d_in // shrink, "d_out": d_out // shrink, "r": r, "K": K}
        for p in rates:
            name = (
                f"LoRA, {'q, k and v, ' * (K > 1)}N={N}, {sizes['d_in']} -> {sizes['d_out']}, r={r}, p={p:g}, bfloat16"
            )
            cases.append(Workload(name, sizes | {"dropout_p": p, "dtype": torch.bfloat16}))
    small = {"N": 64, "d_in": 64, "d_out": 64, "r": 8, "dropout_p": 0.1, "dtype": torch.bfloat16}
    cases.append(Workload("LoRA, small: N=64, 64 -> 64, r=8, p=0.1, bfloat16", small))
    return cases


def workloads_on_a_cpu(quick: bool) -> list[Workload]:
    """In float32, and one in bfloat16."""
    shrink = 16 if quick else 1
    N, r = 2048 // shrink, 16 if not quick else 4
    cases = []
    for d_in, d_out in ((1024, 1024), (768, 3072)):
        sizes: dict[str, Any] = {"N": N, "d_in": d_in // shrink, "d_out": d_out // shrink, "r": r}
        for p in (0.0, 0.1):
            name = f"LoRA, N={N}, {sizes['d_in']} -> {sizes['d_out']}, r={r}, p={p:g}"
            cases.append(Workload(f"{name}, float32", sizes | {"dropout_p": p}))
    wide: dict[str, Any] = {"N": N, "d_in": 1024 // shrink, "d_out": 1024 // shrink, "r": r, "dropout_p": 0.1}
    wide |= {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}  # as PEFT keeps them
    name = f"LoRA, N={N}, {wide['d_in']} -> {wide['d_out']}, r={r}, p=0.1"
    cases.append(Workload(f"{name}, bfloat16, float32 adapters", wide))
    d = 768 // shrink
    for points, p in ((N, 0.0), (N, 0.1), (64, 0.1)):
        group: dict[str, Any] = {"N": points, "d_in": d, "d_out": d, "r": r, "K": 3, "dropout_p": p}
        cases.append(Workload(f"LoRA, q, k and v, N={points}, {d} -> {d}, p={p:g}", group))
    small = {"N": 64, "d_in": 64, "d_out": 64, "r": 8, "dropout_p": 0.1}
    cases.append(Workload("LoRA, small: N=64, 64 -> 64, r=8, p=0.1", small))
    return cases
