"""The two pictures of a run of `subspace`."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from kdtrainer.plots import BLUE, GREY, LIGHT_BLUE, RED, save
from kdtrainer.subspace.config import FULL, PROJECTIONS, RATIOS, Config
from kdtrainer.subspace.report import Results, accuracies
from kdtrainer.subspace.tasks import NATIVE, NATIVE_LABELS, TAUGHT, UNTAUGHT, key

COLOURS = dict(zip(PROJECTIONS, (RED, BLUE, GREY), strict=True))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """In percent."""
    percent = [100 * value for value in values]
    return statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else 0.0


def curves(config: Config, results: Results, path: Path) -> None:
    """Test accuracy of a head by d/k, with the standard deviation over seeds; the full head is a band."""
    count = len(config.teachers)
    figure, axes = plt.subplots(1, count, figsize=(max(5 * count, 6), 4), layout="constrained", squeeze=False)
    for axis, teacher in zip(axes[0], config.teachers, strict=True):
        mean, deviation = mean_and_deviation(accuracies(results, FULL, teacher))
        axis.axhspan(mean - deviation, mean + deviation, color=LIGHT_BLUE, alpha=0.35, linewidth=0)
        axis.axhline(mean, color=LIGHT_BLUE, linewidth=1, label="full head")
        for shift, (projection, colour) in enumerate(COLOURS.items()):
            found = [mean_and_deviation(accuracies(results, key(projection, ratio), teacher)) for ratio in RATIOS]
            means, deviations = zip(*found, strict=True)
            places = np.array(RATIOS) * 1.04 ** (shift - 1)  # beside one another
            style = {"color": colour, "linewidth": 1.5, "marker": "o", "markersize": 4, "capsize": 2}
            axis.errorbar(places, means, deviations, label=projection, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
        axis.set(title=f"{teacher}, {config.data}", xlabel="d/k")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test accuracy of the head, %")
    axes[0][0].legend(frameon=False, loc="lower left", fontsize=9)
    save(figure, path)


def students(config: Config, results: Results, path: Path) -> None:
    """Test accuracy of every student: each seed is a dot, mean and standard deviation a bar."""
    names, count = (*UNTAUGHT, *TAUGHT), len(config.teachers)
    figure, axes = plt.subplots(
        1, count, figsize=(max(5 * count, 6), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, teacher in zip(axes[0], config.teachers, strict=True):
        for place, name in enumerate(names):
            values = accuracies(results, name, teacher)
            colour = RED if name in (NATIVE, NATIVE_LABELS) else GREY
            mean, deviation = mean_and_deviation(values)
            axis.plot([100 * value for value in values], [place] * len(values), "o", color=colour, alpha=0.35)
            axis.errorbar(mean, place, xerr=deviation, color=colour, marker="|", markersize=14, capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=f"taught by {teacher}", xlabel="test accuracy, %")
        axis.grid(alpha=0.25, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    save(figure, path)
