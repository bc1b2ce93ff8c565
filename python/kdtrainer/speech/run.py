"""The experiment: utterances, teachers, for each seed a base, and a student of it for each lesson."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kdtrainer import checkpoint, deployment, metrics
from kdtrainer.deployment import Deployed
from kdtrainer.errors import RunError
from kdtrainer.metrics import leading
from kdtrainer.progress import ProgressBar, progress_bar
from kdtrainer.ranks import Ranks, together
from kdtrainer.serving import serving_backend
from kdtrainer.speech import corpus, folder, models, report
from kdtrainer.speech.config import LESSONS, MOST_SHARE, Config
from kdtrainer.speech.corpus import Source, Utterances
from kdtrainer.speech.distill import Taught, error_rate, labels_task, student_of, student_task, taught_by
from kdtrainer.speech.models import Recogniser
from kdtrainer.speech.pool import OnStep, RunAll, Watch, prepare, workers
from kdtrainer.train import Task, cosine, fit

BASE = "base"
RISING = 0.1  # share of the steps in which the learning rate rises
LARGEST_GRADIENT = 1.0
PRUNED, TIMED = 0.5, 50  # share of the shipped student's weights, utterances whose latency is measured


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the numbers of a model."""

    out: Path
    cache: Path
    resume: bool
    seeds: int
    lessons: tuple[str, ...]
    workers: int
    checkpoint_every: int


@dataclasses.dataclass(frozen=True)
class Splits:
    """The files of each; all of them are in the cache."""

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    clean: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """One model to train. A teacher has no seed in its name: all students have the same teachers."""

    name: str  # of a teacher, BASE, or of a lesson
    config: Config
    options: Options
    splits: Splits
    ranks: Ranks

    @property
    def task(self) -> str:
        return task_name(self.config, self.name)

    @property
    def path(self) -> Path:
        return path_of(self.options.out, self.task)

    @property
    def steps(self) -> int:
        counts = {BASE: self.config.base_steps} | dict.fromkeys(models.TEACHERS, self.config.teacher_steps)
        return counts.get(self.name, self.config.steps)


def task_name(config: Config, name: str) -> str:
    return f"teacher-{name}" if name in models.TEACHERS else f"seed{config.student_seed}-{name}"


def path_of(out: Path, task: str) -> Path:
    return out / "checkpoints" / f"{task}.safetensors"


def log_of(out: Path, task: str) -> Path:
    return out / "metrics" / f"{task}.jsonl"


def run(config: Config, options: Options) -> None:
    """Train, and write the report. Raises RunError when it cannot start or go on, `train.Interrupted` after Ctrl-C."""
    config = dataclasses.replace(config, backend=serving_backend(config.backend), student_seed=config.seed)
    prepare(config.threads)
    check(config, options)
    with together() as ranks:
        train_all(dataclasses.replace(config, world=ranks.world), options, ranks)


def train_all(config: Config, options: Options, ranks: Ranks) -> None:
    """Processes of torchrun share each batch, so that each trains what the others do, one model after the other."""
    ranks.check_shares({"--batch": config.batch, "--labelled-batch": config.labelled_batch})
    sources = sources_of(config)
    splits = Splits(*(tuple(source.path(options.cache) for source in part) for part in sources))
    if options.resume:  # what cannot go on is refused before anything is made
        ranks.led(lambda: checkpoint.check(options.out, config, field="student_seed"))
    configs = [dataclasses.replace(config, student_seed=config.seed + k) for k in range(options.seeds)]

    def jobs(names: Sequence[str], configs: Sequence[Config]) -> list[Job]:
        return [Job(name, each, options, splits, ranks) for each in configs for name in names]

    stages = [jobs(config.teachers, [config]), jobs([BASE], configs), jobs(options.lessons, configs)]
    count = options.workers if ranks.world == 1 else 1
    with progress_bar(ranks.leads) as bar, workers(count, config.threads) as run_all:
        every = [source for part in sources for source in part]
        ranks.led(lambda: make_data(options.cache, every, run_all, bar))
        check_data(config, data(splits.train), data(splits.test))
        if not options.resume:  # the run that was there goes when nothing is left that could be refused
            ranks.led(lambda: clear_folder(options.out))
        for title, stage in zip(("teachers", "bases", "students"), stages, strict=True):
            on_steps = bar.tasks(title, [job.steps for job in stage])
            run_all(train, stage, on_steps)
    if ranks.leads:
        conclude(config, options, splits, [job for stage in stages for job in stage])


def clear_folder(out: Path) -> None:
    """For a fresh run."""
    checkpoint.clear(out)
    for path in (out / "metrics.jsonl", *(out / "metrics").glob("*.jsonl")):
        path.unlink(missing_ok=True)


def check(config: Config, options: Options) -> None:
    """Raise RunError where options do not go together."""
    if config.labels > config.train and config.data is None:
        raise RunError(f"--labels is {config.labels}, but must be at most --train, {config.train}")
    one = config.teachers[0]
    if any(LESSONS[name].projector == "none" for name in options.lessons):
        widths = models.TEACHERS[one]().widths
        if widths != models.student().widths:
            raise RunError(f"--compare hidden-mse-one needs a first teacher of the student's width, and {one} is none")
    teachers = sum(p.numel() for name in config.teachers for p in models.TEACHERS[name]().parameters())
    for name in options.lessons:
        share = student_of(config.teachers, LESSONS[name], config) / teachers
        if share >= MOST_SHARE:
            raise RunError(
                f"the student {name} would train {share:.2%} of its teachers' parameters, but must train less than "
                f"{MOST_SHARE:.0%}: give a smaller --lora-rank or --embedding-width, or more --teachers"
            )


def sources_of(config: Config) -> tuple[list[Source], list[Source], list[Source]]:
    """To train, to test and without noise: espeak-ng's, or the user's, of which each seed holds back others."""
    clean = corpus.synthetic("clean", config.clean, config.seed)
    if config.data is None:
        train = corpus.synthetic("train", config.train, config.seed)
        return train, corpus.synthetic("test", config.test, config.seed), clean
    found = folder.recordings(Path(config.data))
    share = config.test / (config.train + config.test)
    own, others = folder.held_back(found, share, config.seed_of("held back"))
    return corpus.sources("own", own), corpus.sources("own", others), clean


def check_data(config: Config, train: Utterances, test: Utterances) -> None:
    """Raise RunError where the user's own are too few."""
    if len(train) < config.labels or not len(test):
        raise RunError(
            f"--data {config.data} has {len(train)} utterances to train and {len(test)} to test that are long enough "
            f"for their text, but must have at least {config.labels} (--labels) and 1"
        )


def make_data(cache: Path, wanted: Sequence[Source], run_all: RunAll, bar: ProgressBar) -> None:
    """What the cache lacks."""
    on_steps = bar.tasks("utterances", [len(source.made_from) for source in wanted])
    missing = [k for k, source in enumerate(wanted) if not corpus.is_whole(source.path(cache))]
    for k in set(range(len(wanted))) - set(missing):
        on_steps[k](len(wanted[k].made_from), None)
    run_all(make, [(wanted[k], cache) for k in missing], [on_steps[k] for k in missing])


def make(job: tuple[Source, Path], on_step: OnStep, interruptions: Watch) -> None:
    source, cache = job
    corpus.make(source, cache)
    on_step(len(source.made_from), None)


@lru_cache(3)
def data(paths: tuple[Path, ...]) -> Utterances:
    """Read once in each process."""
    return corpus.load(paths)


def train(job: Job, on_step: OnStep, interruptions: Watch) -> None:
    """From the job's checkpoint, or from the start where there is none, to its last step."""
    torch.manual_seed(job.config.seed_of("weights"))
    task = task_of(job)
    done = checkpoint.progress(job.path).metrics_bytes if job.path.exists() else 0
    torch.manual_seed(job.config.seed_of("batches"))
    with leading(job.ranks, log_of(job.options.out, job.task), lambda: done) as log:
        fit(
            task,
            job.config,
            job.path,
            log,
            job.options.checkpoint_every,
            on_step,
            task.steps,
            schedule=lambda share: min(share / RISING + 0.01, 1.0) * cosine(share),
            largest_gradient=LARGEST_GRADIENT,
            interruptions=interruptions,
            ranks=job.ranks,
        )


def task_of(job: Job) -> Task:
    config, test = job.config, data(job.splits.test)
    if job.name in models.TEACHERS:
        heard, teacher = data(job.splits.train), models.TEACHERS[job.name]()
        how = config.teacher_steps, config.batch, config.teacher_rate, job.ranks
        return labels_task(job.task, teacher, heard, test, *how)
    if job.name == BASE:
        clean, how = data(job.splits.clean), (config.base_steps, config.batch, config.teacher_rate, job.ranks)
        return labels_task(job.task, models.student(), clean, test, *how)
    base = trained(models.student(), path_of(job.options.out, task_name(config, BASE)))
    lesson = LESSONS[job.name]
    taught = all_taught(dataclasses.replace(config, student_seed=config.seed), job.options.out, job.splits.train)
    return student_task(job.task, lesson, base, data(job.splits.train), test, taught, config, job.ranks)


def trained(model: Recogniser, path: Path) -> Recogniser:
    """With the weights of a checkpoint."""
    model.load_state_dict(checkpoint.weights(path))
    return model


@lru_cache(1)
def all_taught(config: Config, out: Path, paths: tuple[Path, ...]) -> dict[str, Taught]:
    """Computed once in each process."""
    heard = data(paths)
    return {name: taught_by(teacher_of(config, out, name), heard) for name in config.teachers}


def teacher_of(config: Config, out: Path, name: str) -> Recogniser:
    return trained(models.TEACHERS[name](), path_of(out, task_name(config, name)))


def conclude(config: Config, options: Options, splits: Splits, jobs: Sequence[Job]) -> None:
    """Table, report.json, metrics.jsonl and plot."""
    lines = {job.task: log_of(options.out, job.task).read_bytes() for job in jobs}
    checkpoint.write_atomically(options.out / "metrics.jsonl", b"".join(lines.values()))
    records = metrics.read(options.out / "metrics.jsonl")
    rows = [row_of(job, records[job.task][-1]["word_error_rate"]) for job in jobs]
    teachers = [teacher_of(config, options.out, name) for name in config.teachers]
    student = student_of_lesson(next(job for job in reversed(jobs) if job.config.student_seed == config.seed))
    found = report.results(config, rows, deployed(teachers, student, data(splits.test)))
    report.write(options.out, found, options.seeds)
    report.publish(options.out)


def student_of_lesson(job: Job) -> Recogniser:
    """As it was trained, adapters and all."""
    model = models.student()
    models.adapt(model, job.config.lora_rank, job.config.backend)
    own = nn.ModuleDict({"student": model})
    weights = checkpoint.weights(job.path)
    own.load_state_dict({name: weights[name] for name in own.state_dict()})
    return model


def deployed(teachers: Sequence[Recogniser], student: Recogniser, test: Utterances) -> list[Deployed]:
    """The ensemble and the student, which loses its adapters, then most of its bits, or most of its weights."""
    plain = deployment.merged(student)
    versions: dict[str, Sequence[Recogniser]] = {
        "ensemble": teachers,
        "student": [plain],
        "student, int8": [deployment.quantised(plain)],
        f"student, {PRUNED:.0%} pruned": [deployment.pruned(plain, PRUNED)],
    }
    utterances = [test.batch([k]) for k in range(min(len(test), TIMED))]

    def run(versions: Sequence[Recogniser], k: int) -> list[Tensor]:
        return [each(utterances[k].frames, utterances[k].lengths) for each in versions]

    return [
        deployment.measured(name, each, partial(run, each), len(utterances), error_rate(each, test))
        for name, each in versions.items()
    ]


def row_of(job: Job, error_rate: float) -> report.Row:
    """Parameters are counted on a model like the one that was trained."""
    seconds = checkpoint.progress(job.path).seconds
    if job.name in LESSONS:
        count = student_of(job.config.teachers, LESSONS[job.name], job.config)
    else:
        built = models.student() if job.name == BASE else models.TEACHERS[job.name]()
        count = sum(p.numel() for p in built.parameters())
    return report.Row(job.name, job.config.student_seed, count, error_rate, seconds)
