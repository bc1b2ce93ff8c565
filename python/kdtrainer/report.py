"""What a run tells the person who started it: progress while it trains, a table and report.json at the end."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kdkernels
from kdtrainer.checkpoint import write_atomically
from kdtrainer.compare import Deviation
from kdtrainer.config import Config
from kdtrainer.page import console

MEANINGS = {
    "ensemble": "mean of the teachers' probabilities",
    "student": "{few} labels, no distillation",
    "student-all-labels": "all labels, no distillation",
    "distilled": "{few} labels, and the teachers' {lessons} of the other images",
    "distilled-reference": "the same, by the reference backend",
}
LORA_MEANING = "LoRA of rank {rank} on the student: {few} labels, the teachers' {lessons}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model, or the ensemble."""

    name: str
    parameters: int
    trained_parameters: int  # the optimiser's, projections beside the student included
    accuracy: float  # on the test set
    seconds: float  # of training


class ProgressBar:
    """One line per task."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, name: str, steps: int) -> Callable[[int, float | None], None]:
        """What to call with the number of steps done and the last loss, where there is one."""
        shown = self._progress.add_task(name, total=steps, loss="")

        def update(step: int, loss: float | None) -> None:
            self._progress.update(shown, completed=step, loss="" if loss is None else f"loss {loss:.4f}")

        return update

    def tasks(self, name: str, steps: Sequence[int]) -> list[Callable[[int, float | None], None]]:
        """One line for several tasks, and what to call for each of them."""
        shown = self._progress.add_task(name, total=sum(steps), loss="")
        done = [0] * len(steps)

        def update(k: int, step: int, loss: float | None) -> None:
            done[k] = step
            self._progress.update(shown, completed=sum(done), loss="" if loss is None else f"loss {loss:.4f}")

        return [partial(update, k) for k in range(len(steps))]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What `--lora-rank` left to train."""

    rank: int
    trained_parameters: int  # of the distillation: the adapters', and nothing beside them
    teachers_parameters: int
    share: float  # the former by the latter


def adapters(rows: Sequence[Row], config: Config) -> Adapters | None:
    """None without `--lora-rank`."""
    if not config.lora_rank:
        return None
    by_name = {row.name: row for row in rows}
    trained, teachers = by_name["distilled"].trained_parameters, by_name["ensemble"].parameters
    return Adapters(config.lora_rank, trained, teachers, trained / teachers)


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[ProgressBar]:
    """A line for each task, if they are to be shown."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield ProgressBar(progress)


def meaning(row: Row, config: Config) -> str:
    """What a model was trained on."""
    if row.name in config.teachers:
        return "teacher, all labels"
    text = LORA_MEANING if config.lora_rank and row.name == "distilled" else MEANINGS[row.name]
    return text.format(few=10 * config.labels, rank=config.lora_rank, lessons=lessons(config))


def lessons(config: Config) -> str:
    """What the distilled student learns of the teachers."""
    aligned = "logits" if config.lora_rank else "states"
    weights = {aligned: config.alignment_weight, "soft targets": config.soft_targets}
    return " and ".join(name for name, weight in weights.items() if weight)


def show(rows: Sequence[Row], config: Config, out: Path, found: Deviation | None) -> None:
    table = Table(title=f"digits, seed {config.seed}, backend {config.backend}", title_justify="left", box=box.SIMPLE)
    for name in ("model", "trained on"):
        table.add_column(name)
    for name in ("parameters", "test accuracy", "training"):
        table.add_column(name, justify="right")
    for row in rows:
        style = "bold" if row.name == "distilled" else ""
        cells = (row.name, meaning(row, config), f"{row.parameters:,}", f"{row.accuracy:.1%}", f"{row.seconds:.1f} s")
        table.add_row(*cells, style=style)
    terminal = console()
    terminal.print(table)
    by_name = {row.name: row for row in rows}
    gain = by_name["distilled"].accuracy - by_name["student"].accuracy
    terminal.print(f"Distillation changes the student's accuracy by {100 * gain:+.1f} points.")
    lora = adapters(rows, config)
    if lora is not None:
        terminal.print(
            f"LoRA of rank {lora.rank} trains {lora.trained_parameters:,} parameters: {lora.share:.2%} of the "
            f"teachers' {lora.teachers_parameters:,}."
        )
    if found is not None:
        seconds = by_name["distilled"].seconds, by_name["distilled-reference"].seconds
        verdict = "within" if found.within_budget else "ABOVE"
        terminal.print(
            f"{config.backend} against reference, over {config.steps} steps: loss deviates by {found.loss:.2g}, "
            f"final weights by {found.weights:.2g} (relative), {verdict} the budget of {found.budget:g}; "
            f"{seconds[0]:.1f} s against {seconds[1]:.1f} s, no measure of speed: the models are too small "
            "(`python -m kdtrainer whisper-step` times a larger pair)"
        )
    terminal.print(f"report.json, metrics.jsonl, loss.png, accuracy.png and checkpoints are in {out}", highlight=False)


def write(path: Path, config: Config, rows: Sequence[Row], found: Deviation | None) -> None:
    """Everything the table says, as JSON, with the versions it was found with."""
    lora = adapters(rows, config)
    content = {
        "config": config.as_json(),
        "models": [{**dataclasses.asdict(row), "trained_on": meaning(row, config)} for row in rows],
        "lora": None if lora is None else dataclasses.asdict(lora),
        "compare": None if found is None else {**dataclasses.asdict(found), "within_budget": found.within_budget},
        "versions": {"kdkernels": kdkernels.__version__, "torch": torch.__version__},
    }
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
