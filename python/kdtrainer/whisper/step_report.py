"""What `whisper-step` tells: a table, report.json and a picture of where the time goes."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich import box
from rich.table import Table

from kdtrainer.checkpoint import write_atomically
from kdtrainer.config import PHASES
from kdtrainer.page import console

COLOURS = dict(zip(PHASES, ("#bab0ac", "#4c78a8", "#e4572e", "#f2b134", "#72a5d8", "#76b7a0"), strict=True))


def publish(summary: dict[str, Any], out: Path, as_json: bool) -> None:
    text = json.dumps(summary, indent=2)
    write_atomically(out / "report.json", text.encode() + b"\n")
    draw(summary, out / "step.png")
    if as_json:
        print(text)
    else:
        show(summary, out)


def title(summary: dict[str, Any]) -> str:
    config, shape = summary["config"], summary["shape"]
    return (
        f"a step of distilling {shape['name']}'s shape into {shape['student_layers']} + {shape['student_layers']} of "
        f"its layers: batch {config['batch']}, LoRA r = {shape['rank']}, p = {shape['dropout']}, "
        f"D = {config['dimension']}, {config['threads']} threads"
    )


def show(summary: dict[str, Any], out: Path) -> None:
    seconds, config = summary["median_seconds"], summary["config"]
    eager, ours = seconds.values()
    table = Table(box=box.SIMPLE)
    table.add_column("phase")
    for name in (*seconds, "×"):
        table.add_column(name, justify="right")
    for phase in ("step", *PHASES):
        cells = (
            phase,
            *(f"{1e3 * way[phase]:.0f} ms" for way in seconds.values()),
            f"{eager[phase] / ours[phase]:.2f}",
        )
        table.add_row(*cells, style="bold" if phase == "step" else "")
    terminal = console()
    terminal.print(title(summary))
    terminal.print(table)
    terminal.print(
        f"Medians of {config['steps']} steps, the two taking turns, random weights and inputs. Alignment and soft "
        "targets are forward and backward; the teacher is the same plain PyTorch in both. The products of both heads "
        "are part of the soft targets, not of the forward passes and the student's backward: eager makes the logits, "
        "kdkernels computes from states and heads."
    )
    found = summary["compare"]
    verdict = "within" if found["within_budget"] else "ABOVE"
    terminal.print(
        f"Before them, {len(next(iter(summary['checked_losses'].values())))} steps without dropout (with it, PEFT and "
        f"kdkernels draw different masks): losses {listed(summary['checked_losses'])}; alignment and "
        f"soft targets, each by itself, deviate by {found['loss']:.2g}, the trained weights by {found['weights']:.2g} "
        f"(relative), {verdict} the budget of {found['budget']:g}."
    )
    terminal.print(f"Losses of the timed steps, each with its own masks: {listed(summary['losses'])}.")
    if students := summary.get("students"):
        terminal.print(
            f"{students['count']} students on one base, without dropout: {students['in_turn']:.2f} s for a step of "
            f"each in turn, {students['together']:.2f} s together, {students['ratio']:.2f} times faster; their losses "
            f"deviate by {students['loss']:.2g} (relative)."
        )
    for layer in summary["left_to_peft"]:
        terminal.print(f"left to PEFT: {layer}")
    terminal.print(f"report.json and step.png are in {out}", highlight=False)


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
