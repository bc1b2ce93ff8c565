"""The command line: options into a Config, errors into one line and an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import kdtrainer
from kdtrainer.config import BUDGET, TEACHERS, Config
from kdtrainer.errors import RunError

NEEDED = {"sklearn": "scikit-learn", "rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors"}
DONE, OVER_BUDGET, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: --compare found the backends too far apart; 2: the run was refused; 130: Ctrl-C."""
    chosen = parser().parse_args(arguments)
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        return complain(f"{' and '.join(missing)} must be installed: pip install 'kdkernels[trainer]'", REFUSED)
    try:
        from kdtrainer import digits, train  # not above: they need the packages looked for here
    except KeyboardInterrupt:
        return complain("interrupted before anything was trained", INTERRUPTED)
    config = Config(
        seed=chosen.seed,
        teachers=chosen.teachers,
        labels=chosen.labels,
        teacher_steps=chosen.teacher_steps,
        steps=chosen.steps,
        metric=chosen.metric,
        method=chosen.method,
        lora_rank=chosen.lora_rank,
        backend=chosen.backend,
        threads=chosen.threads,
    )
    options = digits.Options(chosen.out, chosen.resume, chosen.compare, chosen.checkpoint_every, chosen.budget)
    again = f"add --resume to the same command to go on, bit for bit (checkpoints are in {chosen.out})"
    try:
        return DONE if digits.run(config, options) else OVER_BUDGET
    except (RunError, OSError) as error:
        return complain(str(error), REFUSED)
    except (train.Interrupted, KeyboardInterrupt):
        return complain(f"interrupted; {again}", INTERRUPTED)


def complain(message: str, code: int) -> int:
    print(f"kdtrainer: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m kdtrainer", description=kdtrainer.__doc__)
    digits = top.add_subparsers(dest="experiment", required=True).add_parser(
        "digits",
        help="teachers of several architectures into one small student, on handwritten digits",
        description="Train teachers on all labels of scikit-learn's digits, then a small student that sees few labels, "
        "without distillation and with: layer-wise projection alignment to all teachers beside cross-entropy. With "
        "--lora-rank, the student trained without distillation is frozen, and low-rank adapters distil into it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = Config()
    add = digits.add_argument
    add("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add("--seed", type=number(int, 0), default=d.seed, help="of weights, batches and the choice of labelled images")
    add("--teachers", type=teacher_names, default=",".join(TEACHERS), metavar="NAMES", help="at least two")
    add("--labels", type=number(int, 1), default=d.labels, help="labelled images of each class for the student")
    add("--steps", type=number(int, 1), default=d.steps, help="of each student")
    add("--teacher-steps", type=number(int, 1), default=d.teacher_steps, metavar="STEPS", help="of each teacher")
    add("--lora-rank", type=number(int, 0), default=d.lora_rank, metavar="R", help="LoRA alone distils; 0: all weights")
    add("--metric", choices=("cosine", "mse", "angular"), default=d.metric, help="of the alignment loss")
    add("--method", choices=("auto", "direct", "gram"), default=d.method, help="of the alignment loss")
    add("--backend", choices=("auto", "reference", "native"), default=d.backend, help="of the loss and of LoRA")
    add("--compare", action="store_true", help="distil again by the reference backend; exit 1 if the two runs differ")
    add("--budget", type=number(float, 0.0), default=BUDGET, help="relative deviation that --compare allows")
    add("--threads", type=number(int, 1), default=d.threads, help="of torch; the models are small")
    add("--checkpoint-every", type=number(int, 1), default=50, metavar="STEPS", help="and at the end of each part")
    return top


def number(kind: Callable[[str], float], least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of the kind {kind.__name__}") from None
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is too small, must be at least {least}")
        return value

    return parse


def teacher_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in TEACHERS:
            raise argparse.ArgumentTypeError(f"{name!r} is no teacher, must be of {', '.join(TEACHERS)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise argparse.ArgumentTypeError("must name at least two teachers, each once")
    return names
