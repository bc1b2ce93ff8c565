"""The options of `compress`, and what its errors become."""

import argparse
from pathlib import Path
from typing import Any

from kdtrainer.compress.config import BASELINES, POSTHOC, QUICK, UNCOMPRESSED, Config
from kdtrainer.numbers import fraction, number, threads
from kdtrainer.recipe import quickly


def add_compress(experiments: Any) -> None:
    parser = experiments.add_parser(
        "compress",
        help="a state-space model that loses states while it learns",
        description="Train a classifier of sequences made of linear recurrent units, and truncate it by its Hankel "
        "singular values within the first steps (CompreSSM), beside the models that it should be compared with. Data: "
        "scikit-learn's digits as sequences of pixels, fashion-mnist (Debian's package dataset-fashion-mnist), or a "
        ".npz file with x_train, y_train, x_test and y_test: (N, T), (N, H, W) or (N, H, W, c) numbers, and labels. "
        "Under torchrun the processes share every batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d, count, share = Config(), number(int, 1), number(float, 0.0)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/compress"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add("--data", default=d.data, metavar="DATA", help="digits, fashion-mnist or FILE.npz")
    size = quickly(parser, vars(d), QUICK)
    size("--length", "of a digit: 64 pixels, or 784 interpolated ones", "T")
    size("--states", "of each layer, at the start", "N")
    size("--steps", "of each model", "STEPS")
    add("--seed", type=number(int, 0), default=d.seed, help="of the first run")
    add("--seeds", type=count, default=1, metavar="COUNT", help="runs, each with the next seed, in one table")
    add("--compare", type=baselines, default=f"{UNCOMPRESSED},small", metavar="MODELS", help=",".join(BASELINES))
    add("--features", type=count, default=d.features, metavar="H", help="width of the model")
    add("--blocks", type=count, default=d.blocks, help="layers")
    add("--dropout", type=fraction, default=d.dropout, help="below 1")
    add("--min-radius", type=fraction, default=d.min_radius, help="of the eigenvalues at the start")
    add("--max-radius", type=fraction, default=d.max_radius, help="likewise")
    add("--batch", type=count, default=d.batch, help="sequences in a step")
    add("--learning-rate", type=number(float, 0.0, above=True), default=d.learning_rate, metavar="RATE", help="at most")
    add("--ssm-rate-factor", type=share, default=d.ssm_rate_factor, metavar="X", help="for the recurrences' parameters")
    add("--weight-decay", type=share, default=d.weight_decay, metavar="X", help="of the other parameters")
    add("--warm-up", type=fraction, default=d.warm_up, metavar="SHARE", help="of the steps; then half a cosine")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--tolerance", type=fraction, metavar="T", help="share of Σσ that may go (default: 0.01)")
    order.add_argument("--error", type=share, metavar="E", help="instead: the largest error bound of a reduction")
    order.add_argument("--ranks", type=count, metavar="N", help="instead: states to keep in every layer")
    add("--reductions", type=count, default=d.reductions, metavar="COUNT", help="how often states may go")
    add(
        "--reduction-share",
        type=part,
        default=d.reduction_share,
        metavar="X",
        help="of the steps, within which they may",
    )
    add(
        "--moments", choices=("transport", "reset", "slice"), default=d.moments, help="of the optimiser, at a reduction"
    )
    add("--hsv-regularizer", choices=("nuclear", "energy"), help="Σσ or Σσ² of every layer, added to the loss")
    add("--hsv-weight", type=share, default=1e-3, metavar="W", help="of the regulariser")
    add("--threads", type=threads, default=d.threads, help="of torch")
    add("--device", choices=("cpu", "cuda"), default=d.device, help="of every process")
    add("--checkpoint-every", type=count, default=100, metavar="STEPS", help="and at the end of each model")
    add("--evaluate-every", type=count, default=50, metavar="STEPS", help="on the test set; the clock stands still")


def part(text: str) -> float:
    """Above 0 and at most 1."""
    value = number(float, 0.0, above=True)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is too large, must be at most 1")
    return value


def baselines(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in BASELINES:
            raise argparse.ArgumentTypeError(f"{name!r} is no baseline, must be of {', '.join(BASELINES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("must name each baseline once")
    if POSTHOC in names and UNCOMPRESSED not in names:
        raise argparse.ArgumentTypeError(f"{POSTHOC} needs {UNCOMPRESSED}, which it truncates")
    return tuple(name for name in BASELINES if name in names)


def compress(chosen: argparse.Namespace) -> None:
    """Run it. Raises what `run` raises."""
    from kdtrainer.compress import run  # not above: it needs packages that are looked for first

    values = (QUICK if chosen.quick else {}) | Config.chosen(chosen)
    if chosen.tolerance is None and chosen.error is None and chosen.ranks is None:
        values["tolerance"] = Config.tolerance
    if not chosen.hsv_regularizer:
        values["hsv_weight"] = 0.0
    options = run.Options(
        chosen.out, chosen.resume, chosen.seeds, chosen.compare, chosen.checkpoint_every, chosen.evaluate_every
    )
    run.run(Config(**values), options)
