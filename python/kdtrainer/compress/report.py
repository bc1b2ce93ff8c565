"""What `compress` tells: a table of all models over all seeds, and report.json."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

import kdkernels
from kdtrainer.checkpoint import write_atomically
from kdtrainer.compress.config import COMPRESSED, UNCOMPRESSED, Config
from kdtrainer.compress.training import Trained
from kdtrainer.report import console, spread

MEANINGS = {
    COMPRESSED: "balanced truncation while it trains",
    UNCOMPRESSED: "all states, all the time",
    "small": "as small from the start",
    "random": "as small by random states",
    "smallest": "as small by the states worth least",
    "modal": "as small by the largest |λ|",
    "posthoc": "uncompressed, truncated after training",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of one seed."""

    name: str
    seed: int
    states: list[int]  # of each layer, at the end
    parameters: int
    accuracy: float  # on the test set
    seconds: float  # of training, reductions included, evaluation and checkpoints not
    reducing: float  # of these, spent on states
    regularizing: float  # and on the regulariser's value
    reductions: list[dict[str, Any]]
    evaluations: list[dict[str, float]]


def row(name: str, config: Config, trained: Trained) -> Row:
    p = trained.progress
    count = sum(x.numel() for x in trained.model.parameters())
    accuracy, states = trained.accuracy, trained.model.states
    return Row(
        name, config.seed, states, count, accuracy, p.seconds, p.reducing, p.regularizing, p.reductions, p.evaluations
    )


def by_name(results: Sequence[Sequence[Row]]) -> dict[str, list[Row]]:
    """The rows of each model, one for each seed."""
    return {first.name: [rows[k] for rows in results] for k, first in enumerate(results[0])}


def speed_up(rows: Sequence[Row], baseline: Sequence[Row]) -> list[float]:
    return [b.seconds / a.seconds for a, b in zip(rows, baseline, strict=True)]


def took_place(row: Row) -> int:
    """Reductions that took states away."""
    return sum(event["states"] != event["before"] for event in row.reductions)


def mean_states(row: Row) -> float:
    return statistics.fmean(row.states)


def show(config: Config, results: Sequence[Sequence[Row]], out: Path) -> None:
    models = by_name(results)
    several = f", mean ± standard deviation over {len(results)} seeds" if len(results) > 1 else ""
    title = f"{config.data}: {config.blocks} × {config.states} states, {config.steps} steps{several}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("model", "how"):
        table.add_column(name)
    for name in ("states", "parameters", "test accuracy, %", "training, s", "× faster"):
        table.add_column(name, justify="right")
    for name, rows in models.items():
        faster = spread(speed_up(rows, models[UNCOMPRESSED]), 2) if UNCOMPRESSED in models else ""
        cells = [name, MEANINGS[name], spread([mean_states(r) for r in rows], 1)]
        cells += [f"{statistics.fmean(r.parameters for r in rows):,.0f}", spread([r.accuracy for r in rows], 1, 100)]
        cells += [spread([r.seconds for r in rows], 1), faster if name != UNCOMPRESSED else ""]
        table.add_row(*cells, style="bold" if name == COMPRESSED else "")
    terminal = console()
    terminal.print(table)
    for line in remarks(config, models[COMPRESSED]):
        terminal.print(line, highlight=False)
    terminal.print(
        f"report.json, metrics.jsonl, spectra.png, training.png and checkpoints are in {out}", highlight=False
    )


def remarks(config: Config, rows: Sequence[Row]) -> list[str]:
    """What the table has no room for."""
    sizes = "; ".join(f"seed {r.seed}: {', '.join(map(str, r.states))}" for r in rows)
    counts = ", ".join(str(took_place(r)) for r in rows)
    share = statistics.fmean(r.reducing / r.seconds for r in rows)
    lines = [
        f"States at the end: {sizes}.",
        f"Reductions that took states away, of {len(config.reduction_steps())}: {counts}; all of them took {share:.2%} "
        "of the training time.",
    ]
    if config.hsv_regularizer:
        share = statistics.fmean(r.regularizing / r.seconds for r in rows)
        lines.append(f"The {config.hsv_regularizer} regulariser's value took {share:.1%} of it, without its gradient.")
    return lines


def write(path: Path, config: Config, seeds: int, results: Sequence[Sequence[Row]]) -> None:
    """Everything the table says, as JSON, with the versions it was found with."""
    models = by_name(results)
    content: dict[str, Any] = {"config": config.as_json(), "seeds": seeds}
    content["models"] = {name: [dataclasses.asdict(r) for r in rows] for name, rows in models.items()}
    if UNCOMPRESSED in models:
        base = models[UNCOMPRESSED]
        content["times_faster"] = {name: speed_up(rows, base) for name, rows in models.items() if name != UNCOMPRESSED}
    content["versions"] = {"kdkernels": kdkernels.__version__, "torch": torch.__version__}
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
