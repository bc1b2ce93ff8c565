"""What `speech` tells: a table of all recognisers, each lesson against none over the same seeds; from report.json."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtrainer import deployment
from kdtrainer.deployment import Deployed
from kdtrainer.page import Page, Table, origin, read_json, spread, write_json
from kdtrainer.speech import models
from kdtrainer.speech.config import LABELS, LESSONS, Config

RECIPE, TITLE = "speech", "An ensemble of recognisers into one student of adapters"


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
    base: list[Row]  # one for each seed
    students: dict[str, list[Row]]  # by lesson, likewise
    deployed: list[Deployed]  # of the first seed: the ensemble and the last lesson's student, ready to be shipped

    @property
    def ensemble(self) -> float:
        """Word error rate of the mean of the teachers' probabilities."""
        return self.deployed[0].metric

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


def results(config: Config, rows: Sequence[Row], deployed: list[Deployed]) -> Results:
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row.name, []).append(row)
    students = {name: found for name, found in named.items() if name in LESSONS}
    teachers = [row for row in rows if row.name in models.TEACHERS]
    return Results(config, teachers, named["base"], students, deployed)


def rates(rows: Sequence[Row]) -> list[float]:
    return [row.word_error_rate for row in rows]


def page(found: Results, seeds: int) -> Page:
    """Table and remarks."""
    config = found.config
    several = f", mean ± standard deviation over {seeds} seeds of the students" if seeds > 1 else ""
    said = "espeak-ng's utterances" if config.data is None else config.data
    cells: list[list[str]] = []

    def add(name: str, meaning: str, count: int, found: Sequence[float], against: str, seconds: str) -> None:
        cells.append([name, meaning, f"{count:,}", spread(found, 1, 100), against, seconds])

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
    columns = ("trained parameters", "word error rate, %", "against labels", "training, s")
    title = f"{said}, backend {config.backend}{several}"
    table = Table(title, ("model", "learns from", *columns), cells, words=2, bold=("both",))
    shipped = deployment.table(found.deployed, "word error rate, %")
    return Page(TITLE, [table, shipped], remarks(found), pictures=("error_rates.png",))


def remarks(found: Results) -> list[str]:
    """What the table has no room for."""
    config, share = found.config, max(map(found.share, found.students))
    return [
        f"Every student is the frozen base with adapters of rank {config.lora_rank}, and has {config.steps} steps and "
        f"the text of {config.labels} utterances. One teacher: {config.teachers[0]}.",
        f"A student trains at most {share:.2%} of its teachers' {found.teachers_parameters:,} parameters, projectors "
        "included.",
        f"As it is shipped: the student of {list(found.students)[-1]}, seed {config.seed}.",
    ]


def seconds_of(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(row.seconds for row in rows):.1f}"


def write(out: Path, found: Results, seeds: int) -> None:
    """report.json: everything that the page says, and what it was found with."""
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
        **origin(RECIPE),
        "config": found.config.as_json(),
        "seeds": seeds,
        "teachers": [dataclasses.asdict(row) for row in found.teachers],
        "ensemble": {"parameters": found.teachers_parameters, "word_error_rate": found.ensemble},
        "base": [dataclasses.asdict(row) for row in found.base],
        "students": students,
        "deployed": [dataclasses.asdict(each) for each in found.deployed],
    }
    write_json(out, content)


def publish(out: Path) -> None:
    """Picture, report.md and the table, from report.json."""
    from kdtrainer.speech import plots  # not above: it needs a while to load

    content = read_json(out)
    config = Config.from_json(content["config"])
    teachers, base = ([Row(**row) for row in content[name]] for name in ("teachers", "base"))
    students = {name: [Row(**row) for row in each["rows"]] for name, each in content["students"].items()}
    shipped = [Deployed(**each) for each in content["deployed"]]
    found = Results(config, teachers, base, students, shipped)
    told = page(found, content["seeds"])
    plots.error_rates(found, out / "error_rates.png")
    told.write(out / "report.md", content)
    told.show(out)
