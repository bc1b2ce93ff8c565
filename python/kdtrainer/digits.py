"""`python -m kdtrainer digits`: teachers, a student without and with distillation, and what that gave."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdtrainer import checkpoint, data, metrics, models, report
from kdtrainer.compare import Deviation, deviation
from kdtrainer.config import Config
from kdtrainer.distill import DISTILLED_BATCH, LABELLED_BATCH, TEACHER_BATCH, ModelTask, distillation_task, labels_task
from kdtrainer.errors import RunError
from kdtrainer.progress import progress_bar
from kdtrainer.ranks import Ranks, together
from kdtrainer.recipe import check_distils
from kdtrainer.serving import explanation, serving_backend
from kdtrainer.train import fit

TEACHER_RATE, STUDENT_RATE = 3e-3, 1e-2
BASELINE, ALL_LABELS, DISTILLED, REFERENCE = "student", "student-all-labels", "distilled", "distilled-reference"


@dataclass(frozen=True)
class Options:
    """What does not change the numbers of a run."""

    out: Path
    resume: bool
    compare: bool
    checkpoint_every: int
    budget: float


def run(config: Config, options: Options) -> bool:
    """The whole experiment. False when `options.compare` found the backends further apart than the budget.

    Raises RunError when the run cannot start or go on, `train.Interrupted` after Ctrl-C.
    """
    config = replace(config, backend=serving_backend(config.backend))
    if options.compare and config.backend == "reference":
        raise RunError(f"--compare has nothing to compare: only the reference serves here\n{explanation('auto')}")
    if options.compare and config.soft_targets and config.divergence == "tvd":
        # measured: the same to 1e-7 for a hundred steps, then 1e-2 apart
        raise RunError(
            "--compare cannot judge --divergence tvd: its gradient jumps where probabilities of student and teachers "
            "cross, so rounding alone leads two runs apart. Must be forward_kl, reverse_kl or jsd"
        )
    if config.lora_rank and config.method == "gram":
        raise RunError("--method gram needs projections, and --lora-rank aligns logits without: must be auto or direct")
    check_distils(config.alignment_weight, config.soft_targets)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    digits = data.load(config.labels, config.seed_of("labels"))
    with together() as ranks:
        config = replace(config, world=ranks.world)
        few = min(LABELLED_BATCH, len(digits.labelled))
        sizes = {"a teacher's batch": TEACHER_BATCH, "a batch of labelled images": few}
        ranks.check_shares(sizes | {"a batch of distilled images": DISTILLED_BATCH})
        keep = partial(checkpoint.prepare, options.out, options.resume, config)
        with metrics.leading(ranks, options.out / "metrics.jsonl", keep) as log:
            done = train_all(config, options, digits, log, ranks)
        verdict = ranks.led(lambda: conclude(config, options, digits, done))
        return all(each is not False for each in ranks.gather(verdict))


def checkpoint_path(out: Path, task: str) -> Path:
    return out / "checkpoints" / f"{task}.safetensors"


def train_all(
    config: Config, options: Options, digits: data.Digits, log: metrics.MetricsLog | None, ranks: Ranks
) -> dict[str, ModelTask]:
    """Every task of the experiment, done, by its name; the teachers first."""
    done: dict[str, ModelTask] = {}
    everything = torch.arange(len(digits.train_images))
    with progress_bar(ranks.leads) as bar:

        def train(task: ModelTask) -> None:
            path = checkpoint_path(options.out, task.name)
            torch.manual_seed(config.seed_of("batches"))
            on_step = bar.task(task.name, task.steps)
            fit(task, config, path, log, options.checkpoint_every, on_step, ranks=ranks)
            task.model.eval()
            done[task.name] = task

        for name in config.teachers:
            torch.manual_seed(config.seed_of(name))
            teacher = models.TEACHERS[name]()
            size, steps = TEACHER_BATCH, config.teacher_steps
            train(labels_task(name, teacher, digits, everything, size, steps, TEACHER_RATE))
        teachers = [(name, done[name].model) for name in config.teachers]

        def new_student() -> models.Classifier:
            torch.manual_seed(config.seed_of("student"))  # all students start from the same weights
            return models.student()

        def student_to_distil(backend: str) -> models.Classifier:
            if not config.lora_rank:
                return new_student()
            torch.manual_seed(config.seed_of("adapters"))  # the same ones for every backend
            student = deepcopy(done[BASELINE].model).train()
            models.adapt(student, config.lora_rank, backend)
            return student

        for name, labelled in ((BASELINE, digits.labelled), (ALL_LABELS, everything)):
            student = new_student()
            train(labels_task(name, student, digits, labelled, LABELLED_BATCH, config.steps, STUDENT_RATE))
        backends = {DISTILLED: config.backend} | ({REFERENCE: "reference"} if options.compare else {})
        for name, backend in backends.items():
            train(distillation_task(name, student_to_distil(backend), teachers, digits, config, STUDENT_RATE, backend))
    return done


def conclude(config: Config, options: Options, digits: data.Digits, done: dict[str, ModelTask]) -> bool:
    """Evaluate, compare, and tell."""
    predicted = {name: models.probabilities(task.model, digits.test_images) for name, task in done.items()}
    progress = {name: checkpoint.progress(checkpoint_path(options.out, name)) for name in done}
    rows = [
        report.Row(
            name,
            models.parameter_count(task.model),
            models.trained_parameter_count(task.trained),
            models.accuracy(predicted[name], digits.test_labels),
            progress[name].seconds,
        )
        for name, task in done.items()
    ]
    teachers = [row for row in rows if row.name in config.teachers]
    mixture = torch.stack([predicted[name] for name in config.teachers]).mean(0)  # (N, 10)
    ensemble = report.Row(
        "ensemble",
        sum(row.parameters for row in teachers),
        sum(row.trained_parameters for row in teachers),
        models.accuracy(mixture, digits.test_labels),
        sum(row.seconds for row in teachers),
    )
    rows.insert(len(teachers), ensemble)
    records = metrics.read(options.out / "metrics.jsonl")
    found = deviation_of_backends(options, records, done[DISTILLED].model) if options.compare else None
    report.write(options.out, config, rows, found)
    report.publish(options.out)
    return found is None or found.within_budget


def deviation_of_backends(
    options: Options, records: dict[str, list[dict[str, Any]]], student: models.Classifier
) -> Deviation:
    """Of what was trained of the student: frozen weights, the same in both runs, would make it look smaller."""
    trained = {f"student.{name}" for name, p in student.named_parameters() if p.requires_grad}

    def losses(task: str) -> list[float]:
        return [record["loss"] for record in records[task]]

    def weights(task: str) -> dict[str, torch.Tensor]:
        tensors = checkpoint.weights(checkpoint_path(options.out, task))
        return {name: value for name, value in tensors.items() if name in trained}

    return deviation(losses(DISTILLED), losses(REFERENCE), weights(DISTILLED), weights(REFERENCE), options.budget)
