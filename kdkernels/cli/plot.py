"""The speed-ups of a benchmark run as a picture."""

from typing import Any

COLOURS = {"eager": "#8c8c8c", "torch.compile": "#4c78a8", "kdkernels": "#e4572e"}


def draw(report: dict[str, Any], path: str) -> None:
    """Bars of speed over eager, one group for each case, on a logarithmic axis; wrong results have no bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in report["results"]))
    variants = list(dict.fromkeys(row["variant"] for row in report["results"]))
    height = 0.8 / len(variants)
    figure = Figure(figsize=(10, 1.2 + 0.75 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    for i, variant in enumerate(variants):
        rows = [r for r in report["results"] if r["variant"] == variant and r["speedup_over_eager"] is not None]
        places = [cases.index(r["case"]) + (i - (len(variants) - 1) / 2) * height for r in rows]
        speeds = [r["speedup_over_eager"] for r in rows]
        bars = axes.barh(places, [s - 1 for s in speeds], height, left=1, label=variant, color=COLOURS.get(variant))
        labels = [f"{s:.2f}×  {milliseconds(r['median_s'])}" for s, r in zip(speeds, rows, strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    slowest, fastest = axes.get_xlim()
    axes.set_xlim(slowest / 8, fastest * 8)  # room for the labels at the ends of the bars
    axes.set_xlabel("times as fast as eager PyTorch (forward and backward, median)")
    found = report["machine"]
    place = f"{found['cpu']}, {found['threads']} threads" if report["device"] == "cpu" else ", ".join(found["cuda"])
    title = f"{place}, torch {found['packages']['torch']}, kdkernels {found['kdkernels']}"
    title += "\n--quick: sizes too small to say anything about speed" if report["quick"] else ""
    figure.suptitle(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=len(variants))
    FigureCanvasAgg(figure).print_png(path)


def milliseconds(seconds: float) -> str:
    """Three digits, and no exponent."""
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
