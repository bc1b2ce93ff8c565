"""The two pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from kdtrainer.config import Config
from kdtrainer.report import Row, meaning

GREY, BLUE, LIGHT_BLUE, RED, LIGHT_RED = "#8c8c8c", "#4c78a8", "#a6c3e0", "#e4572e", "#f3b3a0"
COLOURS = {"student": BLUE, "student-all-labels": LIGHT_BLUE, "distilled": RED, "distilled-reference": LIGHT_RED}
PARTS = {"alignment": "Alignment to the teachers, all images", "soft_targets": "The teachers' soft targets, all images"}
SMOOTHING = 10  # steps averaged for a curve


def loss_curves(records: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Each part of the students' losses by step, and their test accuracy on the way."""
    parts = [part for part in PARTS if part in records["distilled"][0]]
    panels = 2 + len(parts)
    figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 4), layout="constrained")
    for task in (name for name in COLOURS if name in records):
        style = {"color": COLOURS[task], "label": task, "linewidth": 1.5}
        if task == "distilled-reference":
            style |= {"color": "black", "linestyle": ":", "linewidth": 1.2}  # on the line that it repeats
        rows = records[task]
        steps = np.array([row["step"] for row in rows])
        cross_entropy = np.array([row.get("cross_entropy", row["loss"]) for row in rows])
        axes[0].plot(steps, smooth(cross_entropy), **style)
        for axis, part in zip(axes[1:], parts, strict=False):
            if part in rows[0]:
                axis.plot(steps, smooth(np.array([row[part] for row in rows])), **style)
        evaluated = [row for row in rows if "accuracy" in row]
        axes[-1].plot([row["step"] for row in evaluated], [100 * row["accuracy"] for row in evaluated], **style)
    axes[0].set(title="Cross-entropy on labelled images", yscale="log")
    for axis, part in zip(axes[1:], parts, strict=False):
        axis.set(title=PARTS[part], yscale="log")
    axes[-1].set(title="Test accuracy, %")
    axes[-1].set_ylim(max(50, axes[-1].get_ylim()[0]), 100)
    for each in axes:
        each.set_xlabel("step")
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="lower right")
    save(figure, path)


def accuracy_bars(rows: Sequence[Row], config: Config, path: Path) -> None:
    """Test accuracy of every model, with its size and what it was trained on."""
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.55 * len(rows)), layout="constrained")
    names = [f"{row.name}\n{meaning(row, config)}" for row in rows]
    accuracies = [100 * row.accuracy for row in rows]
    bars = axes.barh(names, accuracies, color=[COLOURS.get(row.name, GREY) for row in rows], height=0.7)
    labels = [f"{value:.1f} %   {row.parameters:,} parameters" for value, row in zip(accuracies, rows, strict=True)]
    axes.bar_label(bars, labels, padding=5, fontsize=9)
    axes.invert_yaxis()
    # The axis is cut so that differences show; it says so.
    start = max(0, 10 * int((min(accuracies) - 5) / 10))
    axes.set_xlim(start, 100 + (100 - start) * 0.35)
    axes.set_xticks(range(start, 101, 10 if start < 60 else 5))
    axes.set_xlabel(f"test accuracy, % (axis starts at {start})" if start else "test accuracy, %")
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"Digits, seed {config.seed}: {config.steps} steps per student", loc="left")
    save(figure, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the last SMOOTHING values at each step."""
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    first = np.maximum(np.arange(1, len(values) + 1) - SMOOTHING, 0)
    counts = np.arange(1, len(values) + 1) - first
    return (sums[1:] - sums[first]) / counts


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
