"""What `subspace` tells: a table of all models over all seeds; from report.json."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtrainer.page import Page, Table, origin, read_json, spread, write_json
from kdtrainer.subspace import tasks
from kdtrainer.subspace.config import FULL, PROJECTIONS, RATIOS, Config
from kdtrainer.subspace.tasks import NATIVE, NATIVE_LABELS, TAUGHT, UNTAUGHT, key

RECIPE, TITLE = "subspace", "Heads and students in a subspace of a teacher's features"
TEACHER = "teacher"
MEANINGS = {
    TEACHER: "all labels",
    FULL: "a head on the teacher's frozen features",
    tasks.LABELS: "{few} labels",
    tasks.ALL_LABELS: "all labels",
    tasks.FEATURES: "{few} labels, and the features through a learned projection",
    tasks.REUSED: "the same without labels, and the teacher's full head",
    tasks.SOFT_TARGETS: "{few} labels, and the teacher's soft targets",
    tasks.NATIVE: "no labels: it makes R h, and has the teacher's small head",
    tasks.NATIVE_LABELS: "the same, and {few} labels",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of one seed."""

    name: str
    seed: int
    teacher: str  # "" of a student without
    stored: int  # numbers in its file; a drawn projection is its seed
    accuracy: float  # on the test set
    seconds: float  # of training
    dimension: float | None = None  # of the features that the full head sees: how many directions matter


Results = Sequence[Sequence[Row]]  # by seed


def names(config: Config) -> list[str]:
    """Of the models, in the table's order."""
    heads = [key(projection, ratio) for projection in PROJECTIONS for ratio in RATIOS]
    return [TEACHER, FULL, *heads, *UNTAUGHT, *TAUGHT]


def rows_of(results: Results, name: str, teacher: str) -> list[Row]:
    """One for each seed; a student without a teacher stands beside every one."""
    return [row for rows in results for row in rows if row.name == name and row.teacher in (teacher, "")]


def accuracies(results: Results, name: str, teacher: str) -> list[float]:
    return [row.accuracy for row in rows_of(results, name, teacher)]


def gains(results: Results, name: str, baseline: str, teacher: str) -> list[float]:
    """Points above the baseline, seed by seed."""
    pairs = zip(accuracies(results, name, teacher), accuracies(results, baseline, teacher), strict=True)
    return [100 * (ours - theirs) for ours, theirs in pairs]


def meaning(name: str, config: Config, classes: int) -> str:
    if name in MEANINGS:
        return MEANINGS[name].format(few=classes * config.labels)
    return f"the same, of {name.rpartition('-')[2]} times fewer features"


def page(config: Config, classes: int, results: Results) -> Page:
    """Table and remarks."""
    several = f", mean ± standard deviation over {len(results)} seeds" if len(results) > 1 else ""
    title = f"{config.data}: test accuracy in %, d/k of the students {config.ratio}, {config.projection}{several}"
    cells = []
    for name in names(config):
        found = [rows_of(results, name, teacher) for teacher in config.teachers]
        if not any(found):
            continue  # a teacher that was not trained here
        sizes = sorted({row.stored for rows in found for row in rows})
        cells.append([name, meaning(name, config, classes), " / ".join(f"{size:,}" for size in sizes)])
        cells[-1] += [spread([row.accuracy for row in rows], 1, 100) for rows in found]
    columns, ends = ("model", "trained on", "stored", *config.teachers), (FULL, key(PROJECTIONS[-1], RATIOS[-1]))
    table = Table(title, columns, cells, words=2, bold=(NATIVE, NATIVE_LABELS), ends=ends)
    return Page(TITLE, [table], remarks(config, results), pictures=("curves.png", "students.png"))


def remarks(config: Config, results: Results) -> list[str]:
    """Differences, paired over seeds, of which the table has only the spread of either side."""
    lines = []
    for teacher in config.teachers:
        changes = [
            f"{projection} {spread(gains(results, key(projection, config.ratio), FULL, teacher), 2, signed=True)}"
            for projection in PROJECTIONS
        ]
        dimensions = [row.dimension for row in rows_of(results, FULL, teacher) if row.dimension is not None]
        lines.append(f"{teacher}: {spread(dimensions, 1)} directions matter, (Σλ)²/Σλ² of the features' covariance.")
        lines.append(f"{teacher}, a head {config.ratio} times smaller, in points: {', '.join(changes)}.")
        for name in (NATIVE, NATIVE_LABELS):
            others = [other for other in (*UNTAUGHT, *TAUGHT) if other not in (NATIVE, NATIVE_LABELS)]
            changes = [f"{other} {spread(gains(results, name, other, teacher), 1, signed=True)}" for other in others]
            lines.append(f"{teacher}, {name} against others, in points: {', '.join(changes)}.")
    return lines


def write(out: Path, config: Config, classes: int, results: Results) -> None:
    """report.json: everything that the page says, and what it was found with."""
    models = {
        teacher: {name: [dataclasses.asdict(row) for row in rows_of(results, name, teacher)] for name in names(config)}
        for teacher in config.teachers
    }
    content: dict[str, Any] = {**origin(RECIPE), "config": config.as_json(), "classes": classes}
    write_json(out, content | {"seeds": len(results), "models": models})


def publish(out: Path) -> None:
    """Pictures, report.md and the table, from report.json."""
    from kdtrainer.subspace import plots  # not above: it needs a while to load

    content = read_json(out)
    config = Config.from_json(content["config"])
    by_seed: dict[int, dict[Row, None]] = {}  # a student without a teacher stands there beside every one
    for found in content["models"].values():
        for row in (Row(**each) for rows in found.values() for each in rows):
            by_seed.setdefault(row.seed, {})[row] = None
    results = [list(rows) for rows in by_seed.values()]
    told = page(config, content["classes"], results)
    plots.curves(config, results, out / "curves.png")
    plots.students(config, results, out / "students.png")
    told.write(out / "report.md", content)
    told.show(out)
