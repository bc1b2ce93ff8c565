"""Seeded inputs for the linear distillation loss, easy and hostile; and the three ways to run them.

`exact` is the reference in float64, `eager` what a user would write in the dtype of the inputs, `ours` the operator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels.losses import nonzero
from kdkernels.ops.linear_distillation import Head, TopKTeacher, linear_distillation_loss, schema, topk_teacher
from kdkernels.ops.linear_distillation.api import OPTIONS, prepare
from kdkernels.ops.linear_distillation.arguments import as_teachers
from kdkernels.ops.linear_distillation.call import Call, pack
from kdkernels.ops.linear_distillation.head import as_head
from kdkernels.ops.linear_distillation.reference import losses
from kdkernels.testing.compare import Outcome, incoming

TRAINED = ("student", "student_head", "bias", "lora_A", "lora_B")
REGIMES = ("random", "close", "huge", "impossible", "one hot")
GIVEN = ("states", "logits", "top k", "each")
VOCABULARIES = ("same", "mapped", "truncated", "longer")

Trained = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """One call. `trained` are the student's tensors, by the names of `TRAINED`; those in `needs` have gradients."""

    trained: Trained
    scale: float
    softcap: float | None
    scaling: float
    teachers: list[Tensor | TopKTeacher]
    heads: list[Head | None]
    needs: frozenset[str]
    labels: Tensor | None
    weights: Tensor | None
    vocab_map: Any
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Inputs":
        """The same numbers in another dtype or place."""

        def moved(x: Any) -> Any:
            return x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None) if _tensor(x) else x

        def teacher(x: Any) -> Any:
            if _tensor(x):
                return moved(x)
            tensors = {name: moved(getattr(x, name)) for name in ("log_probs", "indices", "rest")}
            return replace(x, **tensors)

        maps = self.vocab_map
        return replace(
            self,
            trained={name: moved(x) for name, x in self.trained.items()},
            teachers=[teacher(x) for x in self.teachers],
            heads=[None if head is None else Head(*map(moved, head)) for head in self.heads],
            labels=None if self.labels is None else self.labels.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            vocab_map=[None if x is None else x.to(device) for x in maps] if isinstance(maps, list) else maps,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self.trained["student"].dtype


def make_inputs(
    N: int = 23,
    d_s: int = 12,
    V: int = 45,
    K: int = 1,
    d_t: int = 17,
    *,
    regime: str = "random",
    given: str = "states",
    vocabulary: str = "same",
    plain: bool = False,
    student_logits: bool = False,
    labels: bool = False,
    weights: str | None = None,
    frozen: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """Seeded tensors; `options` are the operator's. `frozen` names what of `TRAINED` needs no gradient.

    `plain` leaves biases, the adapter, scale and softcap out. Regimes: `close` has q ≈ p to 1e-3; `huge` has logits up
    to ±1e4; `impossible` tokens of probability 0, some for the teachers alone, some for all; `one hot` teachers that
    are certain.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    trained = {"student": normal(N, d_s), "student_head": 2 * normal(V, d_s) / d_s**0.5}
    if student_logits:
        trained = {"student": 2 * normal(N, V)}
    elif not plain:
        trained |= {"bias": normal(V), "lora_A": normal(3, d_s) / d_s**0.5, "lora_B": normal(V, 3)}
    sizes = [
        {"same": V, "mapped": V + 5 - 3 * k, "truncated": V - 4 + k, "longer": V + 3 + k}[vocabulary] for k in range(K)
    ]
    teachers: list[Any] = []
    heads: list[Head | None] = []
    for k, V_k in enumerate(sizes):
        x: Any = normal(N, d_t + k)
        W = 2 * normal(V_k, d_t + k) / (d_t + k) ** 0.5
        head: Head | None = Head(W, None if plain else normal(V_k), scale=1.2 if k == 1 and not plain else 1.0)
        if not plain and k == 2:
            head = head._replace(softcap=4.0, lora_A=normal(2, d_t + k), lora_B=normal(V_k, 2), scaling=0.2)  # type: ignore[union-attr]
        kind = GIVEN[k % 3] if given == "each" else given
        if kind != "states" or regime in ("one hot", "impossible"):
            x, head = x @ W.T, None
        if regime == "one hot":
            x = torch.full_like(x, -1e4)
            x[torch.arange(N), torch.arange(N) % V_k] = 0
        if regime == "impossible":
            x[:, k::5] = -torch.inf
        if kind == "top k":
            x = topk_teacher(x, head, k=min(7, V_k), tail=("uniform", "renormalise")[k % 2])
            head = None
        teachers.append(x)
        heads.append(head)
    if regime == "huge":
        trained["student"] *= 2500
        teachers = [x if isinstance(x, TopKTeacher) else 2500 * x for x in teachers]
    if regime == "impossible" and "bias" in trained:
        trained["bias"][::5] = -torch.inf
        trained["bias"][2::7] = -1e3
    if regime == "close":
        trained = {"student": teachers[0].clone(), "student_head": heads[0].weight.clone()}  # type: ignore[union-attr]
        trained["student_head"] += 1e-3 * normal(*trained["student_head"].shape)
        heads[0] = Head(heads[0].weight)  # type: ignore[union-attr]
    adapted = "lora_A" in trained
    found = Inputs(
        trained,
        scale=1.0 if plain or student_logits or regime == "close" else 0.8,
        softcap=None if plain or student_logits or regime in ("close", "huge", "impossible") else 9.0,
        scaling=0.5 if adapted else 1.0,
        teachers=teachers,
        heads=heads,
        needs=frozenset(name for name in trained if name not in frozen),
        labels=_labels(N, V, draw) if labels else None,
        weights=_weights(weights, trained["student"], teachers, draw),
        vocab_map=_maps(vocabulary, V, sizes, draw),
        options=options,
    )
    return found.to(dtype, device)


def _labels(N: int, V: int, draw: torch.Generator) -> Tensor:
    found = torch.randint(V, (N,), generator=draw)
    found[1::4] = -100
    return found


def _weights(kind: str | None, student: Tensor, teachers: list[Any], draw: torch.Generator) -> Tensor | None:
    """Point weights: a mask, both signs, or both signs with NaN in the points that weigh nothing."""
    if kind is None:
        return None
    found = torch.ones(len(student)) if kind == "mask" else 2.5 + torch.randn(len(student), generator=draw)
    found[::3] = 0
    if kind != "mask":
        found[1::6] *= -0.5
    if kind == "nan":
        student[::3] = torch.nan
        for x in teachers:
            if _tensor(x):
                x[::6] = torch.nan
    return found


def _maps(vocabulary: str, V: int, sizes: list[int], draw: torch.Generator) -> Any:
    if vocabulary == "same":
        return None
    if vocabulary != "mapped":
        return "truncate"
    maps = []
    for V_k in sizes:
        places = torch.randint(V_k, (V,), generator=draw)
        places[3::7] = -1
        maps.append(places)
    return maps


def _tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def head_of(trained: Trained, inputs: Inputs) -> Head | None:
    """The student's head."""
    if "student_head" not in trained:
        return None
    rest = [trained.get(name) for name in TRAINED[2:]]
    return Head(trained["student_head"], *rest, inputs.scaling, 0.0, inputs.scale, inputs.softcap)  # type: ignore


def keywords(inputs: Inputs) -> dict[str, Any]:
    """Everything behind the heads."""
    return {"labels": inputs.labels, "weights": inputs.weights, "vocab_map": inputs.vocab_map} | inputs.options


def run(inputs: Inputs, loss: Callable[[Trained], Tensor]) -> Outcome:
    """`loss` of fresh leaves, and the wanted gradients of it times `INCOMING` (of both signs when pointwise)."""
    leaves = {name: x.detach().clone().requires_grad_(name in inputs.needs) for name, x in inputs.trained.items()}
    value = loss(leaves)
    wanted = {name: x for name, x in leaves.items() if name in inputs.needs}
    if not wanted:
        return Outcome(value.detach(), {})
    grads = torch.autograd.grad(value, list(wanted.values()), incoming(value), allow_unused=True)
    found = {name: torch.zeros_like(wanted[name]) if g is None else g for name, g in zip(wanted, grads, strict=True)}
    return Outcome(value.detach(), found)


def ours(inputs: Inputs, backend: str = "auto") -> Outcome:
    """The public operator."""
    return run(
        inputs,
        lambda x: linear_distillation_loss(
            x["student"], head_of(x, inputs), inputs.teachers, inputs.heads, backend=backend, **keywords(inputs)
        ),
    )


def exact(inputs: Inputs) -> Outcome:
    """The reference in float64."""
    return ours(inputs.to(torch.float64), "reference")


def call_of(inputs: Inputs, trained: Trained, backend: str = "reference") -> tuple[Call, list[bool]]:
    """What an implementation gets to see."""
    given = {"teacher_weights": None} | keywords(inputs)
    options = OPTIONS | {name: given[name] for name in OPTIONS if name in given} | {"backend": backend}
    head = as_head("student_head", head_of(trained, inputs))
    plan, call, needs = prepare(
        trained["student"], head, as_teachers(inputs.teachers, inputs.heads),
        given["teacher_weights"], inputs.vocab_map, inputs.labels, inputs.weights, tuple(options.values()),
    )  # fmt: skip
    if plan.late:  # float16's mean is taken of the total, which is not made of this call here
        N = max(len(call.student.states), 1)
        weights = None if call.weights is None else call.weights / nonzero(call.weights.sum())
        call = call._replace(weights=weights, divisor=N if weights is None else 1)
    return call, needs


def eager_pointwise(inputs: Inputs, trained: Trained) -> Tensor:
    """(N,): weighted losses as a user writes them, everything in the inputs' dtype."""
    call, _ = call_of(inputs, trained)
    if call.weights is None:
        return losses(call, inputs.dtype) / call.divisor
    counts = call.weights.nonzero()[:, 0]

    def picked(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[counts]

    def side(one: Any) -> Any:
        each = {name: picked(getattr(one, name)) for name in ("states", "low", "indices", "rest")}
        return one._replace(**each)

    few = call._replace(student=side(call.student), teachers=list(map(side, call.teachers)), labels=picked(call.labels))
    found = losses(few, inputs.dtype)
    weighted = found * call.weights[counts].to(found.dtype)
    return torch.zeros_like(call.weights, dtype=found.dtype).index_put((counts,), weighted)


def eager(inputs: Inputs) -> Outcome:
    """Plain PyTorch in the dtype of the inputs."""
    pointwise = inputs.options.get("reduction") == "none"
    return run(inputs, lambda x: eager_pointwise(inputs, x) if pointwise else eager_pointwise(inputs, x).sum())


def interpreted(inputs: Inputs, backend: str) -> Outcome:
    """The operator below dispatch: how Triton's interpreter, which dispatch does not know, is run on CPU tensors."""

    def loss(trained: Trained) -> Tensor:
        call, needs = call_of(inputs, trained)
        tensors, numbers = pack([call.student, *call.teachers])
        numbers = [call.temperature, call.beta, call.alpha, *numbers]
        data = (call.excluded, call.labels, call.weights, call.divergence, call.mixture)
        if inputs.options.get("reduction") == "none":
            return schema.linear_distillation_points(tensors, numbers, *data, backend)
        return schema.linear_distillation(tensors, numbers, *data, needs, backend, call.divisor)[0]

    return run(inputs, loss)
