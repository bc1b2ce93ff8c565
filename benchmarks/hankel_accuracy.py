"""Relative error of every Hankel singular value in float32: kdkernels beside the three usual routes.

    python benchmarks/hankel_accuracy.py --out out/hankel_accuracy.png      # needs mpmath and matplotlib

The reference is mpmath's, to 50 digits. A value that came out as NaN or zero has relative error 1 and is drawn hollow;
so has one whose error is larger. Values below float32's range are left out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.testing.hankel.inputs import FAMILIES, SSM, make_systems, reference_values
from kdkernels.testing.hankel.routes import by_cholesky, by_eigh, eig

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Route = Callable[[Tensor, Tensor, Tensor], Tensor]
ROUTES: dict[str, Route] = {
    "kdkernels": kd.hankel_singular_values,
    "eigh square roots": by_eigh,
    "Cholesky of P and Q": by_cholesky,
    "eig(PQ)": lambda *system: eig(*system).sort(-1, descending=True)[0],
}
STYLES = (("C0", "-"), ("C1", "-"), ("C2", (0, (5, 3))), ("C3", (0, (2, 4))))  # dashes: lines that coincide are seen
FLOOR = 1e-8  # below float32's resolution
SMALLEST = 1e-37  # of float32's range, nearly


def errors(route: Route, system: SSM, target: Tensor) -> Tensor:
    """(n,): relative error of each value, at most 1."""
    found = route(*system)[0].double()
    return torch.where(found > 0, (found / target - 1).abs(), 1).clamp(FLOOR, 1)


def draw(out: Path, n: int) -> None:
    """One panel a family, one line a route; prints how many values each gets right."""
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True, sharey=True, layout="constrained")
    for panel, family in zip(panels.flat, FAMILIES, strict=True):
        system = make_systems(family, 1, n, 1, dtype=torch.complex64)
        target = reference_values(*(x[0] for x in system))
        count = int((target > SMALLEST).sum())
        for (name, route), (color, dashes) in zip(ROUTES.items(), STYLES, strict=True):
            error = errors(route, system, target)[:count]
            wrong = error == 1
            place = torch.arange(1, count + 1)
            panel.semilogy(place, error, color=color, linestyle=dashes, linewidth=1.2, label=name)
            panel.scatter(place[~wrong], error[~wrong], s=14, color=color)
            panel.scatter(place[wrong], error[wrong], s=22, facecolors="none", edgecolors=color)
            right = int((error < 0.1).sum())
            print(f"{family:<16}{name:<22}{right:>3} of {count} within 10 %, worst {error.max():.1e}")
        panel.set_title(f"{family}: σ from {target[0]:.0e} to {target[count - 1]:.0e}", fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("Hankel singular value, largest first")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[:, 0]:
        panel.set_ylabel("relative error")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ROUTES))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(f"written: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/hankel_accuracy.png"), help="a picture, or a folder")
    parser.add_argument("--order", type=int, default=16, help="states of each system (default 16)")
    arguments = parser.parse_args()
    if arguments.order < 1:
        parser.error("--order must be at least 1")
    torch.manual_seed(0)
    out: Path = arguments.out
    draw(out if out.suffix else out / "hankel_accuracy.png", arguments.order)
