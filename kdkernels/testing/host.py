"""What a call costs the host: every operator on tensors of one element, beside the same computation in plain PyTorch.

Arithmetic is nothing then, and what is left is checks, choices, allocations, autograd and the way to the kernels, which
small layers pay for at every step.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.lora_linear import reference as lora
from kdkernels.ops.projection_alignment.reference import eager_losses
from kdkernels.testing.hankel.routes import by_cholesky, gramians

CALLS = 100  # in a row, timed as one
FORWARD, STEP = "forward", "forward and backward"

Function = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call, ours and plain PyTorch's; `leaves` are what a step's gradients are of, none where there is no step."""

    op: str
    name: str
    ours: Function
    plain: Function
    leaves: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Medians, in seconds a call."""

    op: str
    case: str
    direction: str
    ours_s: float
    plain_s: float

    @property
    def ratio(self) -> float:
        """Of ours to plain PyTorch's."""
        return self.ours_s / self.plain_s


def cases() -> Iterator[Case]:
    """Every operator."""

    def one(*shape: int, value: float = 1.0) -> Tensor:
        return torch.full(shape, value, requires_grad=True)

    x, A, B, s, W_s, W_t = (one(1, 1) for _ in range(6))
    W, t = torch.ones(1, 1), torch.ones(1, 1)

    def alignment(name: str, *operands: Tensor) -> Case:
        return Case(
            "projection_alignment_loss", name,
            lambda: kd.projection_alignment_loss(*operands),
            lambda: eager_losses(*operands, metric="cosine").mean(),
            tuple(y for y in operands if y.requires_grad),
        )  # fmt: skip

    def layer(p: float) -> Case:
        return Case(
            "lora_linear", f"p={p:g}",
            lambda: kd.lora_linear(x, W, A, B, dropout_p=p),
            lambda: lora.eager(x, F.dropout(x, p), W, None, A, B, 1.0), (x, A, B),
        )  # fmt: skip

    yield alignment("both projected", s, t, W_s, W_t)
    yield alignment("one-sided", s, t, W_s)
    yield Case(
        "linear_distillation_loss", "forward KL, one teacher",
        lambda: kd.linear_distillation_loss(s, W_s, t, W),
        lambda: F.kl_div(F.linear(s, W_s).log_softmax(-1), F.linear(t, W).log_softmax(-1), reduction="batchmean",
                         log_target=True),
        (s, W_s),
    )  # fmt: skip
    yield layer(0.0)
    yield layer(0.1)
    group = [kd.LoRA(W, one(1, 1), one(1, 1), None, 1.0, 0.1) for _ in range(3)]
    yield Case(
        "lora_linear_group", "q, k and v, p=0.1",
        lambda: kd.lora_linear_group(x, group),
        lambda: tuple(lora.eager(x, F.dropout(x, 0.1), W, None, a.lora_A, a.lora_B, 1.0) for a in group),
        (x, *(y for a in group for y in (a.lora_A, a.lora_B))),
    )  # fmt: skip
    state = one(1, value=0.5)
    yield Case(
        "linear_recurrence", "one step", lambda: kd.linear_recurrence(state, x, state),
        lambda: torch.addcmul(x, state, state), (state, x),
    )  # fmt: skip
    M = one(1, 1, 1)
    yield Case("svdvals", "", lambda: kd.svdvals(M), lambda: torch.linalg.svdvals(M), (M,))
    yield Case("svd", "", lambda: tuple(kd.svd(M)), lambda: tuple(torch.linalg.svd(M)), (M,))
    system = (one(1, 1, value=0.5), one(1, 1, 1), one(1, 1, 1))
    yield Case(
        "hankel_singular_values", "", lambda: kd.hankel_singular_values(*system), lambda: by_cholesky(*system), system
    )
    yield Case("hankel_energy", "", lambda: kd.hankel_energy(*system), lambda: energy(*system), system)
    yield Case("gramian_factors", "", lambda: tuple(kd.gramian_factors(*system)), lambda: factors(*system))
    yield Case(
        "balanced_truncation", "rank 1",
        lambda: kd.balanced_truncation(*system, rank=1).Lambda, lambda: truncation(*system, 1),
    )  # fmt: skip
    markov = torch.ones(1, 3, 1, 1)
    yield Case("hankel_svd", "rank 1", lambda: tuple(kd.hankel_svd(markov, 1)), lambda: block_hankel_svd(markov, 1))
    yield Case("era", "order 1", lambda: tuple(kd.era(markov, 1)), lambda: realization(markov, 1))


def factors(Lambda: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of both Gramians."""
    P, Q = gramians(Lambda, B, C)
    return torch.linalg.cholesky(P), torch.linalg.cholesky(Q)


def energy(Lambda: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """tr(PQ)."""
    P, Q = gramians(Lambda, B, C)
    return (P * Q.mT).sum((-2, -1))


def truncation(Lambda: Tensor, B: Tensor, C: Tensor, r: int) -> tuple[Tensor, ...]:
    """The square-root method, made diagonal again: without certificate, and without a look at what can go wrong."""
    L_c, L_o = factors(Lambda, B, C)
    U, S, Vh = torch.linalg.svd(L_o.mH @ L_c, full_matrices=False)
    root = S[..., :r].rsqrt().unsqueeze(-2)
    T, W = (L_c @ Vh.mH[..., :r]) * root, (L_o @ U[..., :r]) * root
    poles, X = torch.linalg.eig(W.mH @ (Lambda.unsqueeze(-1) * T))
    complex_ = X.dtype
    return poles, torch.linalg.solve(X, (W.mH @ B).to(complex_)), (C @ T).to(complex_) @ X, 2 * S[..., r:].sum(-1)


def block_hankel_svd(markov: Tensor, r: int) -> tuple[Tensor, ...]:
    """H formed and decomposed."""
    N, T, p, _ = markov.shape
    L = (T + 1) // 2
    H = markov.unfold(1, T - L + 1, 1).permute(0, 1, 2, 4, 3).reshape(N, L * p, -1)
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    return U[..., :r], S[..., :r], Vh[..., :r, :]


def realization(markov: Tensor, r: int) -> tuple[Tensor, ...]:
    """The eigensystem realisation algorithm in a few lines."""
    p, m = markov.shape[-2:]
    U, S, Vh = block_hankel_svd(markov, r)
    root = S.sqrt()
    A = torch.linalg.pinv(U[:, :-p]) @ U[:, p:]
    A = A * root.unsqueeze(-2) / root.unsqueeze(-1)
    return A, root.unsqueeze(-1) * Vh[..., :m], U[:, :p] * root.unsqueeze(-2)


def measure(case: Case, rounds: int = 15) -> Iterator[Cost]:
    """The costs of each direction, ours and plain PyTorch's by turns; of the thread's time, which others do not share.

    A forward is without gradients, a step with them, for all leaves.
    """
    directions = {FORWARD: (case.ours, case.plain)}
    if case.leaves:
        directions[STEP] = (step(case.ours, case.leaves), step(case.plain, case.leaves))
    for direction, pair in directions.items():
        times: tuple[list[float], list[float]] = ([], [])
        gc.collect()
        gc.disable()
        try:
            with torch.set_grad_enabled(direction == STEP):
                for _ in range(rounds + 1):
                    for function, found in zip(pair, times, strict=True):
                        start = time.thread_time()
                        for _ in range(CALLS):
                            function()
                        found.append((time.thread_time() - start) / CALLS)
        finally:
            gc.enable()
        yield Cost(case.op, case.name, direction, *(median(found[1:]) for found in times))


def step(function: Function, leaves: tuple[Tensor, ...]) -> Function:
    """The gradients of the sum of all outputs, by autograd alone."""
    outputs = function()
    incoming = [torch.ones_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(), leaves, incoming, allow_unused=True)

    return run
