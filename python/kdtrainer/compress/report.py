"""What `compress` tells: a table of all models over all seeds, report.md, and report.json, which both are made of."""

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.nn import LRUClassifier
from kdtrainer.compress.config import COMPRESSED, UNCOMPRESSED, Config
from kdtrainer.compress.training import Trained, systems_of
from kdtrainer.page import Page, Table, origin, read_json, spread, write_json

RECIPE, TITLE = "compress", "A state-space model that shrinks while it learns"
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
    regularizing: float  # and on the regulariser and its gradient
    last_step: float  # seconds of a step, on average from the last reduction on
    reductions: list[dict[str, Any]]
    evaluations: list[dict[str, float]]
    spectra: dict[str, list[float]]  # Hankel singular values: "<step>.<layer>" before a reduction, "end.<layer>"


def row(name: str, config: Config, trained: Trained) -> Row:
    p, model = trained.progress, trained.model
    last = p.reductions[-1] if p.reductions else {"clock": 0.0, "step": 1}
    return Row(
        name,
        config.seed,
        model.states,
        sum(x.numel() for x in model.parameters()),
        trained.accuracy,
        p.seconds,
        p.reducing,
        p.regularizing,
        (p.seconds - last["clock"]) / (p.step - last["step"] + 1),
        p.reductions,
        p.evaluations,
        {name: x.tolist() for name, x in (trained.spectra | spectra_of(model)).items()},
    )


@torch.no_grad()
def spectra_of(model: LRUClassifier) -> dict[str, Tensor]:
    """Of the parameters in float64, as `kd.nn.truncate` forms them."""
    found = kd.hankel_singular_values(*systems_of(copy.deepcopy(model).double()))
    return {f"end.{k}": x.cpu() for k, x in enumerate(found)}


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


def page(config: Config, results: Sequence[Sequence[Row]]) -> Page:
    """Table and remarks."""
    models = by_name(results)
    several = f", mean ± standard deviation over {len(results)} seeds" if len(results) > 1 else ""
    title = f"{config.data}: {config.blocks} × {config.states} states, {config.steps} steps{several}"
    columns = ("states", "parameters", "test accuracy, %", "training, s", "× faster", "a step at the end, ms")
    cells = []
    for name, rows in models.items():
        faster = spread(speed_up(rows, models[UNCOMPRESSED]), 2) if UNCOMPRESSED in models else ""
        cells.append([name, MEANINGS[name], spread([mean_states(r) for r in rows], 1)])
        cells[-1] += [f"{statistics.fmean(r.parameters for r in rows):,.0f}"]
        cells[-1] += [spread([r.accuracy for r in rows], 1, 100), spread([r.seconds for r in rows], 1)]
        cells[-1] += [faster if name != UNCOMPRESSED else "", spread([r.last_step for r in rows], 0, 1e3)]
    table = Table(title, ("model", "how", *columns), cells, words=2, bold=(COMPRESSED,))
    pictures = ("spectra.png", "training.png")
    return Page(
        "A state-space model that shrinks while it learns", [table], remarks(config, models[COMPRESSED]), pictures
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
        lines.append(f"The {config.hsv_regularizer} regulariser and its gradient took {share:.1%} of it.")
    return lines


def write(out: Path, config: Config, seeds: int, results: Sequence[Sequence[Row]]) -> None:
    """report.json: everything that the page says, and what it was found with."""
    models = by_name(results)
    content: dict[str, Any] = {**origin(RECIPE), "config": config.as_json(), "seeds": seeds}
    content["models"] = {name: [dataclasses.asdict(r) for r in rows] for name, rows in models.items()}
    if UNCOMPRESSED in models:
        base = models[UNCOMPRESSED]
        content["times_faster"] = {name: speed_up(rows, base) for name, rows in models.items() if name != UNCOMPRESSED}
    write_json(out, content)


def publish(out: Path) -> None:
    """Pictures, report.md and the table, from report.json."""
    from kdtrainer.compress import plots  # not above: it needs a while to load

    content = read_json(out)
    models = {name: [Row(**row) for row in rows] for name, rows in content["models"].items()}
    results = list(zip(*models.values(), strict=True))  # of each seed
    first, told = models[COMPRESSED][0], page(Config.from_json(content["config"]), results)
    plots.spectra(first, out / "spectra.png")
    plots.over_time(results, out / "training.png")
    told.write(out / "report.md", content)
    told.show(out)
