"""The options of `speech`, and what its errors become."""

import argparse
import os
from pathlib import Path
from typing import Any

from kdtrainer.numbers import number, threads
from kdtrainer.recipe import quickly
from kdtrainer.speech.config import LABELS, LESSONS, QUICK, QUICK_SEEDS, SEEDS, TEACHERS, Config


def add_speech(experiments: Any) -> None:
    parser = experiments.add_parser(
        "speech",
        help="an ensemble of speech recognisers into one frozen encoder with adapters",
        description="Train CTC recognisers of several architectures on connected words that espeak-ng says in many "
        "voices with noise (or on --data), and distil them into a small encoder that knows plain voices without noise: "
        "it is frozen, and low-rank adapters and projectors alone are trained, on a few texts and on what the teachers "
        "say of all utterances. Every way to do so is a row of one table, against no distillation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d, count, weight = Config(), number(int, 1), number(float, 0.0)
    add = parser.add_argument
    size = quickly(parser, vars(d) | {"seeds": SEEDS}, QUICK | {"seeds": QUICK_SEEDS})
    add("--out", type=Path, default=Path("runs/speech"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add(
        "--data",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="recordings in LibriSpeech's layout in place of espeak-ng's utterances",
    )
    add("--cache", type=Path, default=Path("runs/speech-cache"), metavar="DIR", help="of utterances, for all runs")
    add("--seed", type=number(int, 0), default=d.seed, help="of utterances, teachers and the first students")
    size("--seeds", "students of each kind, in one table")
    add("--teachers", type=names(TEACHERS, 2), default=",".join(d.teachers), metavar="NAMES", help=",".join(TEACHERS))
    add("--compare", type=names(LESSONS, 1), default=",".join(LESSONS), metavar="ROWS", help="of the table")
    size("--train", "utterances that the teachers hear with text")
    size("--test", "utterances of other voices; with --data, its share of --train + --test is held back")
    size("--clean", "utterances without noise, for the base")
    size("--labels", "utterances that the students hear with text")
    size("--teacher-steps", "of each teacher", "STEPS")
    size("--base-steps", "of each base", "STEPS")
    size("--steps", "of each student", "STEPS")
    add("--batch", type=count, default=d.batch, help="utterances in a step")
    add(
        "--labelled-batch", type=count, default=d.labelled_batch, metavar="BATCH", help="with text, of a student's step"
    )
    rate = number(float, 0.0, above=True)
    add("--teacher-rate", type=rate, default=d.teacher_rate, metavar="RATE", help="of teachers and base, at most")
    add("--rate", type=rate, default=d.rate, help="of the students, at most")
    add("--lora-rank", type=count, default=d.lora_rank, metavar="R", help="of the adapters")
    add("--embedding-width", type=count, default=d.embedding_width, metavar="D", help="of the shared spaces")
    add("--alignment-weight", type=weight, default=d.alignment_weight, metavar="WEIGHT", help="beside the CTC loss")
    add("--soft-targets", type=weight, default=d.soft_targets, metavar="WEIGHT", help="likewise")
    add("--temperature", type=rate, default=d.temperature, help="of the soft targets")
    add("--backend", choices=("auto", "reference", "native"), default=d.backend, help="of the losses and of LoRA")
    add("--threads", type=threads, default=d.threads, help="of torch, in each process")
    add(
        "--workers",
        type=count,
        default=argparse.SUPPRESS,
        metavar="COUNT",
        help="processes (default: the cores that are free to use)",
    )
    add("--checkpoint-every", type=count, default=50, metavar="STEPS", help="and at the end of each model")


def names(known: Any, least: int) -> Any:
    """Parses some of the known names, in their order."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known, must be of {', '.join(known)}")
        if len(set(chosen)) < len(chosen) or len(chosen) < least:
            raise argparse.ArgumentTypeError(f"must name at least {least}, each once")
        return chosen

    return parse


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speech(chosen: argparse.Namespace) -> None:
    """Run it. Raises what `run` raises."""
    from kdtrainer.speech import run  # not above: it needs packages that are looked for first

    values = Config.chosen(chosen)
    lessons = tuple(name for name in LESSONS if name in {LABELS, *chosen.compare})
    workers = getattr(chosen, "workers", max(cores() // chosen.threads, 1))
    seeds = getattr(chosen, "seeds", QUICK_SEEDS if chosen.quick else SEEDS)
    options = run.Options(chosen.out, chosen.cache, chosen.resume, seeds, lessons, workers, chosen.checkpoint_every)
    run.run(Config(**(QUICK if chosen.quick else {}) | values), options)
