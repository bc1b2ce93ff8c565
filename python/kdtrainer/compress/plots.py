"""The two pictures of a run of `compress`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from kdtrainer.compress.config import COMPRESSED
from kdtrainer.compress.report import Row, by_name
from kdtrainer.plots import save

COLOURS = {
    COMPRESSED: "#e4572e",
    "uncompressed": "#4c78a8",
    "small": "#54a24b",
    "random": "#8c8c8c",
    "smallest": "#c0a000",
    "modal": "#b279a2",
    "posthoc": "#72b7b2",
}


def spectra(row: Row, path: Path) -> None:
    """The Hankel singular values of each layer at each reduction, what was kept drawn full; and after the last step."""
    layers = len(row.states)
    figure, axes = plt.subplots(1, layers, figsize=(max(4.8 * layers, 6), 4), layout="constrained", squeeze=False)
    events = row.reductions
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, max(len(events), 1)))
    for layer, axis in enumerate(axes[0]):
        for event, colour in zip(events, shades, strict=False):
            values = np.array(row.spectra[f"{event['step']}.{layer}"])
            kept = event["states"][layer]
            places = np.arange(1, len(values) + 1)
            label = f"step {event['step']}: {event['before'][layer]} → {kept}"
            axis.plot(places[:kept], values[:kept], color=colour, linewidth=1.8, label=label)
            axis.plot(places[kept - 1 :], values[kept - 1 :], color=colour, linewidth=1, linestyle=":")
        step = int(row.evaluations[-1]["step"])
        end = row.spectra[f"end.{layer}"]
        axis.plot(range(1, len(end) + 1), end, color=COLOURS[COMPRESSED], linewidth=1.8, label=f"step {step}, the last")
        axis.set(yscale="log", xlabel="state, in balanced order", title=f"Layer {layer}" if layers > 1 else "")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("Hankel singular value")
    figure.suptitle(f"What the states are worth (dotted: truncated), seed {row.seed}", x=0.01, ha="left", fontsize=11)
    save(figure, path)


def over_time(results: Sequence[Sequence[Row]], path: Path) -> None:
    """Test accuracy and states of every model over the seconds of training; each seed has a line."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.5), layout="constrained", sharex=True)
    for name, rows in by_name(results).items():
        for k, row in enumerate(rows):
            seconds = [e["seconds"] for e in row.evaluations]
            style = {"color": COLOURS[name], "linewidth": 1.5, "alpha": 0.9, "label": name if k == 0 else None}
            if name == "posthoc":  # it has no training of its own
                above.plot(row.seconds, 100 * row.accuracy, marker="D", markersize=6, **style)
                below.plot(row.seconds, np.mean(row.states), marker="D", markersize=6, **style)
                continue
            above.plot(seconds, [100 * e["accuracy"] for e in row.evaluations], **style)
            below.plot(*sizes(row), drawstyle="steps-post", **style)
    above.set(ylabel="test accuracy, %")
    below.set(ylabel="states of a layer", xlabel="seconds of training, reductions included", ylim=(0, None))
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    above.legend(frameon=False, loc="lower right", ncols=2, fontsize=9)
    save(figure, path)


def sizes(row: Row) -> tuple[list[float], list[float]]:
    """Seconds, and the states from then on."""
    first = row.reductions[0]["before"] if row.reductions else row.states
    changes = [(event["clock"], float(np.mean(event["states"]))) for event in row.reductions]
    points = [(0.0, float(np.mean(first))), *changes, (row.seconds, float(np.mean(row.states)))]
    return [seconds for seconds, _ in points], [states for _, states in points]
