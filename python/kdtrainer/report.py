"""What `digits` tells: a table of all models; from report.json and metrics.jsonl."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kdtrainer import metrics
from kdtrainer.compare import Deviation
from kdtrainer.config import Config
from kdtrainer.page import Page, Table, origin, read_json, write_json

RECIPE, TITLE = "digits", "An ensemble of teachers into one small student"
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


def page(rows: Sequence[Row], config: Config, found: Deviation | None) -> Page:
    """Table and remarks."""
    cells = [
        (row.name, meaning(row, config), f"{row.parameters:,}", f"{row.accuracy:.1%}", f"{row.seconds:.1f} s")
        for row in rows
    ]
    columns = ("model", "trained on", "parameters", "test accuracy", "training")
    title = f"digits, seed {config.seed}, backend {config.backend}"
    table = Table(title, columns, cells, words=2, bold=("distilled",))
    return Page(TITLE, [table], remarks(rows, config, found), pictures=("loss.png", "accuracy.png"))


def remarks(rows: Sequence[Row], config: Config, found: Deviation | None) -> list[str]:
    """What the table has no room for."""
    by_name = {row.name: row for row in rows}
    gain = by_name["distilled"].accuracy - by_name["student"].accuracy
    lines = [f"Distillation changes the student's accuracy by {100 * gain:+.1f} points."]
    lora = adapters(rows, config)
    if lora is not None:
        lines.append(
            f"LoRA of rank {lora.rank} trains {lora.trained_parameters:,} parameters: {lora.share:.2%} of the "
            f"teachers' {lora.teachers_parameters:,}."
        )
    if found is not None:
        seconds = by_name["distilled"].seconds, by_name["distilled-reference"].seconds
        verdict = "within" if found.within_budget else "ABOVE"
        lines.append(
            f"{config.backend} against reference, over {config.steps} steps: loss deviates by {found.loss:.2g}, "
            f"final weights by {found.weights:.2g} (relative), {verdict} the budget of {found.budget:g}; "
            f"{seconds[0]:.1f} s against {seconds[1]:.1f} s, no measure of speed: the models are too small "
            "(`python -m kdtrainer whisper-step` times a larger pair)"
        )
    return lines


def write(out: Path, config: Config, rows: Sequence[Row], found: Deviation | None) -> None:
    """report.json: everything that the page says, and what it was found with."""
    lora = adapters(rows, config)
    content = {
        **origin(RECIPE),
        "config": config.as_json(),
        "models": [{**dataclasses.asdict(row), "trained_on": meaning(row, config)} for row in rows],
        "lora": None if lora is None else dataclasses.asdict(lora),
        "compare": None if found is None else found.as_json(),
    }
    write_json(out, content)


def publish(out: Path) -> None:
    """Pictures, report.md and the table, from report.json and metrics.jsonl."""
    from kdtrainer import plots  # not above: it needs a while to load

    content = read_json(out)
    names = [field.name for field in dataclasses.fields(Row)]
    config = Config.from_json(content["config"])
    rows = [Row(**{name: row[name] for name in names}) for row in content["models"]]
    compared = dict(content["compare"] or {})
    compared.pop("within_budget", None)
    told = page(rows, config, Deviation(**compared) if compared else None)
    plots.loss_curves(metrics.read(out / "metrics.jsonl"), out / "loss.png")
    plots.accuracy_bars(rows, config, out / "accuracy.png")
    told.write(out / "report.md", content)
    told.show(out)
