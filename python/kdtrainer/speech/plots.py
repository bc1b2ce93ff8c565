"""The picture of a run of `speech`."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from kdtrainer.plots import BLUE, GREY, LIGHT_BLUE, RED, save
from kdtrainer.speech.config import LABELS, LESSONS
from kdtrainer.speech.report import Results, rates


def error_rates(found: Results, path: Path) -> None:
    """The word error rate of every model: a bar for the mean, a dot for each seed."""
    bars = {f"{row.name}\nteacher": ([row.word_error_rate], GREY) for row in found.teachers}
    bars["ensemble\nof the teachers"] = ([found.ensemble], GREY)
    bars["base\nplain voices, no noise"] = (rates(found.base), LIGHT_BLUE)
    for name, rows in found.students.items():
        lesson = LESSONS[name]
        both = lesson.soft_targets and lesson.metric is not None
        colour = LIGHT_BLUE if name == LABELS else RED if both else BLUE
        bars[f"{name}\n{lesson.meaning()}"] = (rates(rows), colour)
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.5 * len(bars)), layout="constrained")
    for place, (values, colour) in enumerate(bars.values()):
        axes.barh(place, 100 * statistics.fmean(values), color=colour, height=0.7)
        axes.plot([100 * value for value in values], [place] * len(values), ".", color="black", markersize=5)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("word error rate, %")
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Unheard voices; a dot is a seed", loc="left")
    save(figure, path)
