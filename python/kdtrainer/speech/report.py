"""What `speech` tells: a table of all recognisers, each lesson against none over the same seeds, and report.json."""

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
from kdtrainer.page import console, spread
from kdtrainer.speech import models
from kdtrainer.speech.config import LABELS, LESSONS, Config


@dataclasses.dataclass(frozen=True)
class Row:
    """One recogniser of one seed."""

    name: str
    seed: int
    trained_parameters: int  # projectors included
    word_error_rate: float  # on the test set
    seconds: float  # of training


@dataclasses.dataclass(frozen=True)
class Results:
    config: Config
    teachers: list[Row]
    ensemble: float  # word error rate of the mean of the teachers' probabilities
    base: list[Row]  # one for each seed
    students: dict[str, list[Row]]  # by lesson, likewise

    @property
    def teachers_parameters(self) -> int:
        return sum(row.trained_parameters for row in self.teachers)

    def share(self, lesson: str) -> float:
        return self.students[lesson][0].trained_parameters / self.teachers_parameters

    def differences(self, lesson: str) -> list[float] | None:
        """To no distillation, of each seed: the same base, labelled utterances and first adapters."""
        if lesson == LABELS or LABELS not in self.students:
            return None
        pairs = zip(self.students[lesson], self.students[LABELS], strict=True)
        return [ours.word_error_rate - without.word_error_rate for ours, without in pairs]


def results(config: Config, rows: Sequence[Row], ensemble: float) -> Results:
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row.name, []).append(row)
    students = {name: found for name, found in named.items() if name in LESSONS}
    teachers = [row for row in rows if row.name in models.TEACHERS]
    return Results(config, teachers, ensemble, named["base"], students)


def rates(rows: Sequence[Row]) -> list[float]:
    return [row.word_error_rate for row in rows]


def show(found: Results, seeds: int, out: Path) -> None:
    config = found.config
    several = f", mean ± standard deviation over {seeds} seeds of the students" if seeds > 1 else ""
    said = "espeak-ng's utterances" if config.data is None else config.data
    table = Table(title=f"{said}, backend {config.backend}{several}", title_justify="left", box=box.SIMPLE)
    for name in ("model", "learns from"):
        table.add_column(name)
    for name in ("trained parameters", "word error rate, %", "against labels", "training, s"):
        table.add_column(name, justify="right")

    def add(name: str, meaning: str, count: int, found: Sequence[float], against: str, seconds: str) -> None:
        style = "bold" if name == "both" else ""
        table.add_row(name, meaning, f"{count:,}", spread(found, 1, 100), against, seconds, style=style)

    for row in found.teachers:
        add(row.name, "teacher, all texts", row.trained_parameters, [row.word_error_rate], "", f"{row.seconds:.0f}")
    add("ensemble", "mean of the teachers' probabilities", found.teachers_parameters, [found.ensemble], "", "")
    base = found.base
    add("base", "utterances without noise, plain voices", base[0].trained_parameters, rates(base), "", seconds_of(base))
    for name, rows in found.students.items():
        differences = found.differences(name)
        against = "" if differences is None else spread(differences, 1, 100, signed=True)
        meaning, count = LESSONS[name].meaning(), rows[0].trained_parameters
        add(name, meaning, count, rates(rows), against, seconds_of(rows))
    terminal = console()
    terminal.print(table)
    for line in remarks(found):
        terminal.print(line, highlight=False)
    terminal.print(f"report.json, metrics.jsonl, error_rates.png and checkpoints are in {out}", highlight=False)


def remarks(found: Results) -> list[str]:
    """What the table has no room for."""
    config, share = found.config, max(map(found.share, found.students))
    return [
        f"Every student is the frozen base with adapters of rank {config.lora_rank}, and has {config.steps} steps and "
        f"the text of {config.labels} utterances. One teacher: {config.teachers[0]}.",
        f"A student trains at most {share:.2%} of its teachers' {found.teachers_parameters:,} parameters, projectors "
        "included.",
    ]


def seconds_of(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(row.seconds for row in rows):.1f}"


def write(path: Path, found: Results, seeds: int) -> None:
    """Everything the table says, as JSON, with the versions it was found with."""
    students = {}
    for name, rows in found.students.items():
        lesson = {**dataclasses.asdict(LESSONS[name]), "meaning": LESSONS[name].meaning()}
        students[name] = {
            "lesson": lesson,
            "rows": [dataclasses.asdict(row) for row in rows],
            "share": found.share(name),
            "against_labels": found.differences(name),
        }
    content: dict[str, Any] = {
        "config": found.config.as_json(),
        "seeds": seeds,
        "teachers": [dataclasses.asdict(row) for row in found.teachers],
        "ensemble": {"parameters": found.teachers_parameters, "word_error_rate": found.ensemble},
        "base": [dataclasses.asdict(row) for row in found.base],
        "students": students,
        "versions": {"kdkernels": kdkernels.__version__, "torch": torch.__version__},
    }
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
