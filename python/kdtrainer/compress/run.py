"""The experiment: for each seed a model that shrinks while it learns, and what it is compared with."""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch

from kdtrainer import checkpoint, metrics
from kdtrainer.compress import report, sequences
from kdtrainer.compress.config import COMPRESSED, POSTHOC, PRUNED, SMALL, UNCOMPRESSED, Config
from kdtrainer.compress.reductions import after_training, keeping, truncating
from kdtrainer.compress.training import Task, Trained, Training, accuracy_of
from kdtrainer.errors import RunError
from kdtrainer.progress import ProgressBar, progress_bar
from kdtrainer.ranks import Ranks, together


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the numbers of a model."""

    out: Path
    resume: bool
    seeds: int
    compare: tuple[str, ...]
    checkpoint_every: int
    evaluate_every: int


def run(config: Config, options: Options) -> None:
    """Train, and write the report. Raises RunError when it cannot start or go on, `train.Interrupted` after Ctrl-C."""
    torch.set_num_threads(config.threads)
    with together(config.device) as ranks:
        config = dataclasses.replace(config, world=ranks.world)
        check(config, options)
        ranks.check_shares({"--batch": config.batch})
        data = sequences.load(config.data, config.length)
        ranks.check_shares({f"a batch of {config.data}": min(config.batch, len(data.train))})
        keep = partial(checkpoint.prepare, options.out, options.resume, config)
        with metrics.leading(ranks, options.out / "metrics.jsonl", keep) as log, progress_bar(ranks.leads) as bar:
            seeds = [dataclasses.replace(config, seed=config.seed + k) for k in range(options.seeds)]
            results = [one_seed(each, options, data, log, ranks, bar) for each in seeds]
        if ranks.leads:
            report.write(options.out, config, options.seeds, results)
            report.publish(options.out)


def check(config: Config, options: Options) -> None:
    """Raise RunError where options do not go together."""
    if config.reductions > config.steps:
        raise RunError(f"--reductions is {config.reductions}, but must be at most --steps, {config.steps}")
    if config.ranks is not None and config.ranks > config.states:
        raise RunError(f"--ranks is {config.ranks}, but must be at most --states, {config.states}")
    if not 0 <= config.min_radius < config.max_radius <= 1:
        raise RunError(
            f"--min-radius is {config.min_radius} and --max-radius {config.max_radius}, but must be 0 or more, and "
            "less than --max-radius, which is at most 1"
        )
    if config.world > 1 and POSTHOC in options.compare:
        raise RunError("--compare posthoc runs in one process, not under torchrun")


def path_of(options: Options, config: Config, name: str) -> Path:
    return options.out / "checkpoints" / f"seed{config.seed}-{name}.safetensors"


def one_seed(
    config: Config,
    options: Options,
    data: sequences.Sequences,
    log: metrics.MetricsLog | None,
    ranks: Ranks,
    bar: ProgressBar,
) -> list[report.Row]:
    """The compressed model, then what it is compared with, which has its sizes."""
    rows: list[report.Row] = []

    def train(task: Task) -> Trained:
        named = dataclasses.replace(task, name=f"seed{config.seed}-{task.name}")
        on_step = bar.task(f"seed {config.seed} {task.name}", config.steps)
        training = Training(named, config, data, path_of(options, config, task.name), log, ranks)
        trained = training.run(options.checkpoint_every, options.evaluate_every, on_step)
        ranks.check_equal(trained.model)
        rows.append(report.row(task.name, config, trained))
        return trained

    full = [config.states] * config.blocks
    compressed = train(Task(COMPRESSED, full, truncating(config)))
    final = compressed.progress.states
    sizes = {event["step"]: event["states"] for event in compressed.progress.reductions}
    for name in options.compare:
        if name == UNCOMPRESSED:
            uncompressed = train(Task(name, full))
        elif name == SMALL:
            train(Task(name, final))
        elif name in PRUNED:
            train(Task(name, full, keeping(name, config, sizes)))
        else:
            start = time.perf_counter()
            model = after_training(uncompressed, final)
            taken = time.perf_counter() - start
            row = report.row(name, config, dataclasses.replace(uncompressed, model=model))
            accuracy, seconds = accuracy_of(model, data, config), row.seconds + taken
            rows.append(dataclasses.replace(row, accuracy=accuracy, seconds=seconds, reducing=taken))
    return rows
