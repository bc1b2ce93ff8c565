"""One reduction of a model while it trains: kdkernels.nn.truncate beside CompreSSM's method on the host.

    python benchmarks/reduction_event.py --json out/reduction_event.json      # needs SciPy and rich

Both reduce every layer of the same LRUClassifier to the ranks that the tolerance asks for and move Adam's state. The
peer is what CompreSSM's published code does (arXiv 2510.02823), in NumPy and SciPy, one layer after the other: Gramians
by a Kronecker product, Hankel singular values as eigvals(PQ), balancing by Cholesky square roots and an inverse, eig to
make the system diagonal again, moments cut to their first rows. In complex64 it is as published, but for the conjugate
that the published balancing forgets; in complex128 it is the same, accurate. Times are medians of interleaved runs.
NumPy's threads are set by OPENBLAS_NUM_THREADS before the start.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table

from kdkernels.nn import LRU, LRUClassifier, truncate
from kdkernels.testing.hankel.inputs import frequency_response

Event = Callable[[LRUClassifier, torch.optim.Optimizer], list[int]]
JITTER = 1e-9  # as published


def trained(states: int, features: int, blocks: int, decay: float) -> tuple[LRUClassifier, torch.optim.Optimizer]:
    """A classifier after a step of Adam, whose state exists then.

    Row k of n of each B is scaled by exp(−decay k / n), so that Hankel singular values fall off as they do in a trained
    model: those of a new one hardly do, and no tolerance reduces it by much.
    """
    torch.manual_seed(0)
    model = LRUClassifier(1, features, states, 10, blocks=blocks, min_radius=0.9, max_radius=0.999)
    with torch.no_grad():
        fall = torch.exp(-decay * torch.arange(states) / states).unsqueeze(-1)
        for name, parameter in model.named_parameters():
            if name.endswith(("B_re", "B_im")):
                parameter.mul_(fall)
    optimizer = torch.optim.Adam(model.parameters())
    torch.nn.functional.cross_entropy(model(torch.randn(4, 32, 1)), torch.randint(10, (4,))).backward()
    optimizer.step()
    return model, optimizer


def ours(tolerance: float) -> Event:
    """kdkernels.nn.truncate."""
    return lambda model, optimizer: truncate(model, optimizer, tolerance=tolerance).states


def published(tolerance: float, dtype: Any) -> Event:
    """CompreSSM's method, the numbers of the whole computation in `dtype`."""

    def event(model: LRUClassifier, optimizer: torch.optim.Optimizer) -> list[int]:
        for layer in lrus(model):
            with torch.no_grad():
                Lambda, B, C = (x.numpy().astype(dtype) for x in layer.system())
            P, Q = gramian(Lambda, B @ B.conj().T), gramian(Lambda.conj(), C.conj().T @ C)
            rank = rank_of(np.sqrt(np.linalg.eigvals(P @ Q).real), tolerance)
            if rank < 0.95 * len(Lambda):
                put(layer, optimizer, rank, *balanced(Lambda, B, C, P, Q, rank))
        return model.states

    return event


def gramian(Lambda: np.ndarray, square: np.ndarray) -> np.ndarray:
    """X with Λ X Λᴴ + square = X."""
    return (square.ravel() / (1 - np.kron(Lambda, Lambda.conj()))).reshape(square.shape)


def rank_of(sigma: np.ndarray, tolerance: float) -> int:
    """The first r that hold 1 − τ of the sum; NaN counts as 0."""
    ordered = np.sort(np.nan_to_num(sigma))[::-1]
    return int(np.argmax(ordered.cumsum() / ordered.sum() >= 1 - tolerance)) + 1


def balanced(
    Lambda: np.ndarray, B: np.ndarray, C: np.ndarray, P: np.ndarray, Q: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reduced system, diagonal. With the conjugate that the published code leaves out of Lₒᴴ L_c."""
    eye = JITTER * np.eye(len(Lambda), dtype=P.dtype)
    L_o, L_c = (scipy.linalg.cholesky(x + eye, lower=True) for x in (Q, P))
    _, S, Vh = np.linalg.svd(L_o.conj().T @ L_c)
    T = L_c @ Vh.conj().T @ np.diag(1 / np.sqrt(S))
    inverse = np.linalg.inv(T)
    A, B, C = (inverse @ np.diag(Lambda) @ T)[:rank, :rank], (inverse @ B)[:rank], (C @ T)[:, :rank]
    values, X = scipy.linalg.eig(A)
    return values, np.linalg.inv(X) @ B, C @ X


def put(
    layer: LRU, optimizer: torch.optim.Optimizer, rank: int, Lambda: np.ndarray, B: np.ndarray, C: np.ndarray
) -> None:
    """The reduced system as parameters, and the first rows of their moments."""
    size = np.abs(Lambda)
    gamma = np.sqrt(1 - size**2)
    B = B / gamma[:, None]
    values = {
        "nu_log": np.log(-np.log(size)),
        "theta_log": np.log(np.angle(Lambda) % (2 * np.pi)),
        "gamma_log": np.log(gamma),
        "B_re": B.real,
        "B_im": B.imag,
        "C_re": C.real,
        "C_im": C.imag,
    }
    new = {}
    for name, value in values.items():
        old = getattr(layer, name)
        new[old] = torch.nn.Parameter(torch.as_tensor(value, dtype=old.dtype).contiguous())
        cut = (slice(None), slice(rank)) if name.startswith("C") else (slice(rank),)
        state = optimizer.state.pop(old)
        optimizer.state[new[old]] = {k: x[cut].clone() if x.dim() else x for k, x in state.items()}
        setattr(layer, name, new[old])
    for group in optimizer.param_groups:
        group["params"] = [new.get(x, x) for x in group["params"]]


def error(before: LRUClassifier, after: LRUClassifier) -> float:
    """The largest relative error of a layer's frequency response, over 32 frequencies."""
    angle = torch.linspace(-torch.pi, torch.pi, 32, dtype=torch.float64)
    z = torch.polar(torch.ones_like(angle), angle)
    worst = 0.0
    for old, new in zip(lrus(before), lrus(after), strict=True):
        with torch.no_grad():
            G, G_r = (frequency_response(*copy.deepcopy(x).double().system(), z) for x in (old, new))
        sizes = torch.linalg.matrix_norm(torch.stack([G - G_r, G]), 2).amax(-1)
        worst = max(worst, (sizes[0] / sizes[1]).item())
    return worst


def lrus(model: LRUClassifier) -> list[LRU]:
    """Its layers."""
    return [x for x in model.modules() if isinstance(x, LRU)]


def measure(events: dict[str, Event], pair: tuple[LRUClassifier, torch.optim.Optimizer], runs: int) -> dict[str, Any]:
    """Seconds of every event, in turn; the states and the error that each leaves."""
    found: dict[str, Any] = {name: {"seconds": []} for name in events}
    for run in range(-1, runs):  # the first warms up
        for name, event in events.items():
            model, optimizer = copy.deepcopy(pair)
            start = time.perf_counter()
            states = event(model, optimizer)
            if run >= 0:
                found[name]["seconds"].append(time.perf_counter() - start)
            if run == 0:
                found[name] |= {"states": states, "error": error(pair[0], model)}
    return found


def report(found: dict[str, Any], title: str) -> None:
    """The table."""
    table = Table("method", "median ms", "least", "greatest", "time", "states", "error of the response", title=title)
    middle = {name: statistics.median(result["seconds"]) for name, result in found.items()}
    own = next(iter(middle.values()))
    for name, result in found.items():
        seconds = result["seconds"]
        times = [f"{1e3 * x:.0f}" for x in (middle[name], min(seconds), max(seconds))]
        states = " ".join(map(str, result["states"]))
        table.add_row(name, *times, f"{middle[name] / own:.2f} x", states, f"{result['error']:.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("states", 384), ("features", 128), ("blocks", 6), ("runs", 7), ("threads", torch.get_num_threads()))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    parser.add_argument("--tolerance", type=float, default=0.1, help="τ (default 0.1)")
    parser.add_argument("--decay", type=float, default=12.0, help="of the rows of B (default 12)")
    parser.add_argument("--json", type=Path, help="a file for all times")
    arguments = parser.parse_args()
    for name, _ in sizes:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    torch.set_num_threads(arguments.threads)
    events = {
        "kd.nn.truncate": ours(arguments.tolerance),
        "CompreSSM, complex64": published(arguments.tolerance, np.complex64),
        "CompreSSM, complex128": published(arguments.tolerance, np.complex128),
    }
    pair = trained(arguments.states, arguments.features, arguments.blocks, arguments.decay)
    found = measure(events, pair, arguments.runs)
    report(found, f"One reduction of {arguments.blocks} layers, n = {arguments.states}, H = {arguments.features}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = {k: v for k, v in vars(arguments).items() if k != "json"}
        versions = {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
        arguments.json.write_text(json.dumps({"arguments": about, "versions": versions, "results": found}, indent=1))
        print(f"written: {arguments.json}")
