"""What each recogniser is trained on: text for teachers and base, text and teachers for the students."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.nn import ProjectionAlignment, head_of
from kdtrainer.ranks import ALONE, Ranks
from kdtrainer.speech import models
from kdtrainer.speech.config import ALL, Config, Lesson
from kdtrainer.speech.corpus import Batch, Utterances
from kdtrainer.speech.models import Recogniser
from kdtrainer.speech.text import BLANK, greedy, word_error_rate
from kdtrainer.states import standardised
from kdtrainer.train import Task, drawn

PAIRS = ((0, 0), (1, 1))  # middle and last states of the student and of each teacher
EVALUATED = 50  # utterances at a time


@dataclass(frozen=True)
class Taught:
    """What a frozen teacher says of all training utterances."""

    teacher: Recogniser
    last: list[Tensor]  # (T, d_t) of each utterance, as the head takes them
    aligned: list[list[Tensor]]  # by layer of PAIRS: likewise, standardised


def ctc(logits: Tensor, batch: Batch) -> Tensor:
    """Of (B, T, CLASSES), for each character."""
    scores = logits.log_softmax(-1).transpose(0, 1)  # (T, B, CLASSES)
    total = F.ctc_loss(scores, batch.characters, batch.lengths, batch.counts, blank=BLANK, reduction="sum")
    return total / batch.counts.sum()


def labels_task(
    name: str, model: Recogniser, heard: Utterances, test: Utterances, steps: int, size: int, rate: float, ranks: Ranks
) -> Task:
    """CTC on all texts."""

    def losses(chosen: Tensor) -> dict[str, Tensor]:
        batch = heard.batch(chosen.tolist())
        return {"loss": ranks.weight(batch.counts.sum()) * ctc(model(batch.frames, batch.lengths), batch)}

    draw = partial(drawn, (torch.arange(len(heard)), size))
    return Task(name, steps, rate, model, draw, losses, on_test_set(model, test))


def student_task(
    name: str,
    lesson: Lesson,
    base: Recogniser,
    heard: Utterances,
    test: Utterances,
    taught: Mapping[str, Taught],
    config: Config,
    ranks: Ranks,
) -> Task:
    """CTC on the few labelled utterances, and the lesson on all: adapters and projectors alone are trained."""
    torch.manual_seed(config.seed_of("adapters"))  # the same ones for every lesson
    model = copy.deepcopy(base)
    models.adapt(model, config.lora_rank, config.backend)
    teachers = taught if lesson.teachers == ALL else dict(list(taught.items())[:1])
    aligners = nn.ModuleDict()
    if lesson.metric:
        aligners.update({each: Aligner(each, lesson, model, teachers[each].teacher, config) for each in teachers})
    labelled = torch.randperm(len(heard), generator=torch.Generator().manual_seed(config.seed_of("labelled")))
    kinds = [(labelled[: config.labels], config.labelled_batch)]
    if lesson != Lesson():
        kinds.append((torch.arange(len(heard)), config.batch))
    heads = [head_of(each.teacher.head) for each in teachers.values()]

    def losses(*chosen: Tensor) -> dict[str, Tensor]:
        """Of utterances with text, and of others without, if any are to be heard."""
        with_text, *others = [indices.tolist() for indices in chosen]
        without = others[0] if others else []
        batch = heard.batch(with_text + without)
        states = model.states(batch.frames, batch.lengths)
        labelled = heard.batch(with_text)
        logits = model.head(states[-1][: len(with_text), : labelled.frames.shape[1]])
        parts = {"ctc": ranks.weight(labelled.counts.sum()) * ctc(logits, labelled)}
        loss = parts["ctc"]
        points = models.counted(batch.frames, batch.lengths).squeeze(-1)
        points[: len(with_text)] = False
        states = [state[points] for state in states]  # (P, width)
        share = ranks.weight(len(states[-1]))
        if lesson.metric:
            targets = {each: [gathered(layer, without) for layer in teachers[each].aligned] for each in aligners}
            alignments = torch.stack([aligners[each](states, targets[each]) for each in aligners])
            parts["alignment"] = share * alignments.mean()
            loss = loss + config.alignment_weight * parts["alignment"]
        if lesson.soft_targets:
            parts["soft_targets"] = share * kd.linear_distillation_loss(
                states[-1],
                head_of(model.head),
                [gathered(each.last, without) for each in teachers.values()],
                heads,
                temperature=config.temperature,
                backend=config.backend,
            )
            loss = loss + config.soft_targets * parts["soft_targets"]
        return {"loss": loss} | parts

    trained = nn.ModuleDict({"student": model, "aligners": aligners})
    return Task(name, config.steps, config.rate, trained, partial(drawn, *kinds), losses, on_test_set(model, test))


def on_test_set(model: Recogniser, test: Utterances) -> Callable[[], dict[str, float]]:
    return lambda: {"word_error_rate": error_rate([model], test)}


def gathered(states: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """(P, d): the frames of these utterances, one after the other."""
    return torch.cat([states[i] for i in indices])


class Aligner(nn.Module):
    """A student's states to a teacher's: as they are, by a learned linear projection, or by a small network.

    The teacher's are projected by a frozen orthogonal matrix: a learned one could make the alignment easy by making
    the space poor.
    """

    def __init__(self, name: str, lesson: Lesson, student: Recogniser, teacher: Recogniser, config: Config) -> None:
        super().__init__()
        assert lesson.metric is not None
        D = config.embedding_width
        self.before = nn.ModuleList()
        widths = student.widths
        if lesson.projector == "mlp":
            self.before.extend(nn.Sequential(nn.Linear(d, D), nn.GELU()) for d in widths)
            widths = (D, D)
        if lesson.projector == "none":
            self.align = ProjectionAlignment(
                PAIRS,
                widths,
                teacher.widths,
                widths[0],
                metric=lesson.metric,
                student_projection="none",
                teacher_projection="none",
                backend=config.backend,
            )
        else:
            self.align = ProjectionAlignment(
                PAIRS,
                widths,
                teacher.widths,
                D,
                metric=lesson.metric,
                teacher_projection="orthogonal",
                bias=True,
                seed=config.seed_of(f"projection/{name}"),
                backend=config.backend,
            )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        if len(self.before):
            student = [network(state) for network, state in zip(self.before, student, strict=True)]
        return self.align(student, teacher)


@torch.no_grad()
def taught_by(teacher: Recogniser, heard: Utterances) -> Taught:
    """Computed once: the teacher is frozen."""
    teacher.eval()
    layers: list[list[Tensor]] = [[] for _ in PAIRS]
    for first in range(0, len(heard), EVALUATED):
        batch = heard.batch(range(first, min(first + EVALUATED, len(heard))))
        points = models.counted(batch.frames, batch.lengths).squeeze(-1)
        for found, state in zip(layers, teacher.states(batch.frames, batch.lengths), strict=True):
            found.append(state[points])
    joined = [torch.cat(found) for found in layers]  # (all frames, d_t)
    lengths = [len(frames) for frames in heard.frames]
    aligned = [list(state.split(lengths)) for state in standardised(joined)]
    return Taught(teacher, list(joined[-1].split(lengths)), aligned)


@torch.no_grad()
def error_rate(recognisers: Sequence[Recogniser], heard: Utterances) -> float:
    """WER of the mean of the recognisers' probabilities, by the best path."""
    found: list[str] = []
    training = [each.training for each in recognisers]
    for each in recognisers:
        each.eval()
    for first in range(0, len(heard), EVALUATED):
        batch = heard.batch(range(first, min(first + EVALUATED, len(heard))))
        mean = sum(each(batch.frames, batch.lengths).softmax(-1) for each in recognisers)
        assert isinstance(mean, Tensor)
        found += [greedy(scores, length) for scores, length in zip(mean, batch.lengths.tolist(), strict=True)]
    for each, was in zip(recognisers, training, strict=True):
        each.train(was)
    return word_error_rate(heard.texts, found)


def student_of(teachers: Sequence[str], lesson: Lesson, config: Config) -> int:
    """The parameters that a student would train."""
    built = {name: Taught(models.TEACHERS[name](), [], []) for name in teachers}
    none = Utterances([], [])
    task = student_task("", lesson, models.student(), none, none, built, config, ALONE)
    return sum(p.numel() for p in task.trained.parameters() if p.requires_grad)
