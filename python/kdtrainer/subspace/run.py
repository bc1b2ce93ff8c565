"""The experiment: for each seed teachers, heads on their features, and students in the space of one of these."""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kdtrainer import checkpoint, metrics
from kdtrainer.checkpoint import Progress
from kdtrainer.data import few_of_each_class
from kdtrainer.errors import RunError
from kdtrainer.progress import ProgressBar, progress_bar
from kdtrainer.ranks import Ranks, together
from kdtrainer.serving import serving_backend
from kdtrainer.subspace import minilm, networks, report, tasks
from kdtrainer.subspace.config import FULL, IMAGE_TEACHERS, TEXT_TEACHERS, WORDNET, Config
from kdtrainer.subspace.examples import Examples, load
from kdtrainer.subspace.report import Row
from kdtrainer.subspace.tasks import Features
from kdtrainer.train import Task, fit

PRETRAINED = "minilm-features"  # in the folder of checkpoints


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the numbers of a model."""

    out: Path
    resume: bool
    seeds: int
    checkpoint_every: int
    evaluate_every: int


def run(config: Config, options: Options) -> None:
    """Train, and write the report. Raises RunError when it cannot start or go on, `train.Interrupted` after Ctrl-C."""
    config = dataclasses.replace(config, backend=serving_backend(config.backend))
    check_teachers(config)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    examples = load(config)
    if len(examples.train) <= width(config):
        raise RunError(
            f"--data {config.data} leaves {len(examples.train)} examples to train on, but must leave more than a "
            f"teacher's {width(config)} features: else there are not as many principal directions"
        )
    few_of_each_class(examples.train_labels, examples.classes, config.labels, seed=0)  # or say that there are none
    with together() as ranks:
        config = dataclasses.replace(config, world=ranks.world)
        few, every = examples.classes * config.labels, len(examples.train)
        batches = ("teacher's", tasks.TEACHER_BATCH), ("head's", tasks.HEAD_BATCH), ("student's", tasks.DISTILLED_BATCH)
        sizes = {f"a {whose} batch": min(size, every) for whose, size in batches}
        ranks.check_shares(sizes | {"a batch of labelled examples": min(tasks.LABELLED_BATCH, few)})
        keep = partial(checkpoint.prepare, options.out, options.resume, config)
        with metrics.leading(ranks, options.out / "metrics.jsonl", keep) as log, progress_bar(ranks.leads) as bar:
            pretrained = None
            if config.data == WORDNET:
                ranks.led(lambda: make_pretrained_features(config, options, examples, bar))
                pretrained = checkpoint.extra(path_of(options, PRETRAINED))["features"]
            seeds = [dataclasses.replace(config, seed=config.seed + k) for k in range(options.seeds)]
            results = [SeedRun(each, options, examples, pretrained, log, bar, ranks).rows() for each in seeds]
        if ranks.leads:
            report.write(options.out, config, examples.classes, results)
            report.publish(options.out)


def check_teachers(config: Config) -> None:
    """Raise RunError where one cannot see the data."""
    able = TEXT_TEACHERS if config.data == WORDNET else IMAGE_TEACHERS
    for name in config.teachers:
        if name not in able:
            raise RunError(f"--teachers names {name}, but for --data {config.data} must be of {', '.join(able)}")


def width(config: Config) -> int:
    """d of every teacher."""
    return minilm.WIDTH if config.data == WORDNET else config.features


def path_of(options: Options, name: str) -> Path:
    return options.out / "checkpoints" / f"{name}.safetensors"


def make_pretrained_features(config: Config, options: Options, examples: Examples, bar: ProgressBar) -> None:
    """Write (N + M, 384), of training and test set: MiniLM's are the same for all seeds, and take a while."""
    path = path_of(options, PRETRAINED)
    on_text = bar.task("minilm's features", len(examples.train) + len(examples.test))
    if not path.exists():
        start = time.perf_counter()
        found = minilm.features(torch.cat([examples.train, examples.test]), on_text)
        progress = Progress(0, 0, time.perf_counter() - start)
        checkpoint.save(path, nn.Module(), None, config, progress, {"features": found})
    on_text(len(examples.train) + len(examples.test), None)


class SeedRun:
    """All that is trained with one seed."""

    def __init__(
        self,
        config: Config,
        options: Options,
        examples: Examples,
        pretrained: Tensor | None,
        log: metrics.MetricsLog | None,
        bar: ProgressBar,
        ranks: Ranks,
    ) -> None:
        self.config, self.options, self.examples, self.pretrained = config, options, examples, pretrained
        self.log, self.bar, self.ranks = log, bar, ranks
        seed = config.seed_of("labels")
        self.few = few_of_each_class(examples.train_labels, examples.classes, config.labels, seed)
        self.everything = torch.arange(len(examples.train))

    def rows(self) -> list[Row]:
        """One for each model: teachers and their heads, students."""
        rows: list[Row] = []
        for which in tasks.UNTAUGHT:
            self.train_untaught(which, rows)
        for teacher in self.config.teachers:
            features = self.teach(teacher, rows)
            heads = self.train_heads(teacher, features, rows)
            for which in tasks.TAUGHT:
                self.train_student(teacher, which, features, heads, rows)
        return rows

    def teach(self, teacher: str, rows: list[Row]) -> Features:
        """The features of a teacher, which is trained on all labels if it was not before."""
        examples, config = self.examples, self.config
        if self.pretrained is not None:
            train, test = self.pretrained.split([len(examples.train), len(examples.test)])
            return tasks.standardised(train, test)
        _, channels, side, _ = examples.train.shape
        torch.manual_seed(config.seed_of(teacher))
        body = networks.TEACHERS[teacher](channels, side, config.features)
        model = nn.Sequential(body, nn.Linear(config.features, examples.classes))
        size, steps, rate = tasks.TEACHER_BATCH, config.teacher_steps, tasks.TEACHER_RATE
        task = tasks.labels_task(self.name(teacher), model, examples, self.everything, size, steps, rate)
        rows.append(self.row(report.TEACHER, teacher, task, model))
        return tasks.standardised(tasks.outputs(body, examples.train), tasks.outputs(body, examples.test))

    def train_heads(self, teacher: str, features: Features, rows: list[Row]) -> nn.ModuleDict:
        torch.manual_seed(self.config.seed_of(f"{teacher}/heads"))
        task, heads = tasks.heads_task(self.name(teacher, "heads"), features, self.examples, self.config)
        seconds = self.fit(task)
        for name, accuracy in task.evaluate().items():
            row = Row(name, self.config.seed, teacher, stored(heads[name]), accuracy, seconds / len(heads))
            dimension = tasks.effective_dimension(features) if name == FULL else None
            rows.append(dataclasses.replace(row, dimension=dimension))
        return heads

    def train_untaught(self, which: str, rows: list[Row]) -> None:
        k, name = width(self.config) // self.config.ratio, self.name(which)
        task, student = tasks.untaught_task(name, which, self.examples, self.few, k, self.config)
        rows.append(self.row(which, "", task, student))

    def train_student(
        self, teacher: str, which: str, features: Features, heads: nn.ModuleDict, rows: list[Row]
    ) -> None:
        name = self.name(teacher, which)
        task, student = tasks.taught_task(name, which, self.examples, self.few, features, heads, self.config)
        rows.append(self.row(which, teacher, task, student))

    def row(self, name: str, teacher: str, task: Task, model: nn.Module) -> Row:
        """Of a model, once its task is done."""
        seconds = self.fit(task)
        return Row(name, self.config.seed, teacher, stored(model), task.evaluate()["accuracy"], seconds)

    def name(self, *parts: str) -> str:
        return "-".join((f"seed{self.config.seed}", *parts))

    def fit(self, task: Task) -> float:
        """To its last step; the seconds that its training took."""
        path, options = path_of(self.options, task.name), self.options
        torch.manual_seed(self.config.seed_of("batches"))
        on_step = self.bar.task(task.name.replace("-", " ", 1), task.steps)
        every = options.checkpoint_every, on_step, options.evaluate_every
        fit(task, self.config, path, self.log, *every, ranks=self.ranks)
        return checkpoint.progress(path).seconds


def stored(model: nn.Module) -> int:
    """Numbers in a file of it."""
    return sum(value.numel() for value in model.state_dict().values())
