"""What `whisper-step` tells: a table, report.md and a picture of where the time goes, all from report.json."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from kdtrainer.config import PHASES
from kdtrainer.page import REPORT, Page, Table, origin, read_json, write_json

RECIPE, TITLE = "whisper-step", "What a distillation step costs"

COLOURS = dict(zip(PHASES, ("#bab0ac", "#4c78a8", "#e4572e", "#f2b134", "#72a5d8", "#76b7a0"), strict=True))


def finish(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    """Write everything, and print the table, or report.json."""
    content = {**origin(RECIPE), **summary}
    write_json(out, content)
    told = leave(content, out)
    if as_json:
        print((out / REPORT).read_text(), end="")
    else:
        told.show(out)


def publish(out: Path) -> None:
    """The picture, report.md and the table, from report.json."""
    leave(read_json(out), out).show(out)


def leave(content: dict[str, Any], out: Path) -> Page:
    """What is beside report.json."""
    told = page(content)
    draw(content, out / "step.png")
    told.write(out / "report.md", content)
    return told


def page(summary: dict[str, Any]) -> Page:
    seconds, config, shape = summary["median_seconds"], summary["config"], summary["shape"]
    eager, ours = seconds.values()
    rows = [
        [phase, *(f"{1e3 * way[phase]:.0f} ms" for way in seconds.values()), f"{eager[phase] / ours[phase]:.2f}"]
        for phase in ("step", *PHASES)
    ]
    title = (
        f"{shape['name']}'s shape into {shape['student_layers']} + {shape['student_layers']} of its layers: batch "
        f"{config['batch']}, LoRA r = {shape['rank']}, p = {shape['dropout']}, D = {config['dimension']}, "
        f"{config['threads']} threads"
    )
    table = Table(title, ("phase", *seconds, "×"), rows, bold=("step",))
    return Page(TITLE, [table], remarks(summary), pictures=("step.png",), files=())


def remarks(summary: dict[str, Any]) -> list[str]:
    """What the table has no room for."""
    found = summary["compare"]
    lines = [
        f"Medians of {summary['config']['steps']} steps, the two taking turns, random weights and inputs. Alignment "
        "and soft targets are forward and backward; the teacher is the same plain PyTorch in both. The products of "
        "both heads are part of the soft targets, not of the forward passes and the student's backward: eager makes "
        "the logits, kdkernels computes from states and heads.",
        f"Before them, {len(next(iter(summary['checked_losses'].values())))} steps without dropout (with it, PEFT and "
        f"kdkernels draw different masks): losses {listed(summary['checked_losses'])}; alignment and soft targets, "
        f"each by itself, deviate by {found['loss']:.2g}, the trained weights by {found['weights']:.2g} (relative), "
        f"{verdict(found)}.",
        f"Losses of the timed steps, each with its own masks: {listed(summary['losses'])}.",
    ]
    if students := summary.get("students"):
        lines.append(
            f"{students['count']} students on one base, without dropout: {students['in_turn']:.2f} s for a step of "
            f"each in turn, {students['together']:.2f} s together, {students['ratio']:.2f} times faster; their losses "
            f"deviate by {students['loss']:.2g}, their weights by {students['weights']:.2g} (relative), "
            f"{verdict(students)}."
        )
    return lines + [f"left to PEFT: {layer}" for layer in summary["left_to_peft"]]


def verdict(found: dict[str, Any]) -> str:
    return f"{'within' if found['within_budget'] else 'ABOVE'} the budget of {found['budget']:g}"


def listed(losses: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {', '.join(f'{loss:.7g}' for loss in values)}" for name, values in losses.items())


def draw(summary: dict[str, Any], path: Path) -> None:
    """One bar for each way, made of its phases."""
    seconds = summary["median_seconds"]
    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    for row, way in enumerate(seconds.values()):
        left = 0.0
        for phase, colour in COLOURS.items():
            axes.barh(row, way[phase], left=left, color=colour, height=0.6, label=phase if row == 0 else None)
            left += way[phase]
        axes.text(left, row, f"  {way['step']:.2f} s", va="center")
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds, medians of the phases")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"A distillation step of {summary['shape']['name']}'s shape: {summary['ratio']:.2f} ×", loc="left")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
