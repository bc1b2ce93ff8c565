"""`python -m kdtrainer whisper`: Whisper tiny.en, trained, into its own first layers by LoRA."""

import dataclasses
import random
import warnings
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import kdkernels as kd
from kdkernels.integrations.peft import accelerate
from kdtrainer import checkpoint, metrics
from kdtrainer.compress.sequences import packaged
from kdtrainer.errors import RunError
from kdtrainer.page import Page, Table, origin, read_json, spread, write_json
from kdtrainer.progress import ProgressBar, progress_bar
from kdtrainer.ranks import Ranks, together
from kdtrainer.recipe import check_distils
from kdtrainer.speech import synthesis
from kdtrainer.speech.text import normalised, word_error_rate
from kdtrainer.train import Task, drawn, fit
from kdtrainer.whisper import pair as whisper
from kdtrainer.whisper import pretrained, sentences
from kdtrainer.whisper.cohort import share_first_layers, sibling, taught
from kdtrainer.whisper.config import Config
from kdtrainer.whisper.step import TEMPERATURE

RECIPE, TITLE = "whisper", "Whisper tiny.en into its own first layers"
RATE = 16000  # samples in a second, of what Whisper hears
POINTS_A_SECOND = 50  # of the encoder's
ACCENTS = ("en-us", "en-gb-x-rp", "en")  # espeak-ng's voices that the teacher understands best
VARIANTS = ("", "m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4", "linda", "Michael")
TEST_VARIANTS = ("m7", "m8", "f5", "paul")
RATES, PITCHES, DECIBELS = (120, 160), (40, 60), (20.0, 40.0)
IGNORED = -100  # tokens behind a sentence's end
LIBRIVOX, LIBRIVOX_PACKAGE = "librivox", "pocketsphinx-testdata"
CLIPS = tuple(f"sense_and_sensibility_01_austen_64kb-{k}.wav" for k in ("0870", "0880", "0890", "0920", "0930"))
EVALUATED = 10  # utterances at a time
TEACHER, BEFORE, AFTER = "teacher", "before", "after"
MEANINGS = {
    TEACHER: "tiny.en, 4 + 4 layers",
    BEFORE: "its first {0} + {0} layers",
    AFTER: "the same, with the adapters that were distilled into",
}


@dataclass(frozen=True)
class Heard:
    """Utterances as Whisper takes them."""

    features: Tensor  # (N, mels, 2 * points)
    texts: list[str]


def distillation(students: Sequence[whisper.Pair], heard: Heard, tokens: Tensor, config: Config, ranks: Ranks) -> Task:
    """Alignment of the last encoder states, and of every token that counts soft targets and the token itself.

    Tokens (N, most) are prompt, text, end, and IGNORED behind it. All students hear the same batches, and each learns
    as if it were alone: none shares a trained parameter with another, and the losses are summed.
    """
    words = config.soft_targets + config.hard_labels  # the weight of what is said of them
    options: dict[str, Any] = {
        "alpha": config.soft_targets / (words or 1), "temperature": TEMPERATURE, "backend": config.backend
    }  # fmt: skip

    def losses(chosen: Tensor) -> dict[str, Tensor]:
        counted = tokens[chosen, 1:] != IGNORED  # a token's states say what comes next
        counted = counted[:, : int(counted.sum(1).max())]
        batch = whisper.Batch(heard.features[chosen], tokens[chosen, : counted.shape[1]].clamp_min(0))
        teacher = taught(students[0], batch)
        theirs, share = teacher.decoder[counted], ranks.weight(counted.sum())  # (P, width)
        labels = tokens[chosen, 1:][:, : counted.shape[1]][counted]
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for k, pair in enumerate(students):
            student = whisper.states(pair.adapted(), batch)
            alignment = pair.aligner([student.encoder], [teacher.encoder])
            heads = whisper.head(pair.adapted()), whisper.head(pair.teacher)
            own = student.decoder[counted]
            targets = share * kd.linear_distillation_loss(own, heads[0], theirs, heads[1], labels=labels, **options)
            losses.append(config.alignment_weight * alignment + words * targets)
            which = f"_{k}" if len(students) > 1 else ""
            parts |= {f"alignment{which}": alignment, f"targets{which}": targets}
        return {"loss": torch.stack(losses).sum()} | parts

    trained = nn.ParameterList(p for pair in students for p in pair.trained().values())  # the rest is the teacher's
    draw = partial(drawn, (torch.arange(len(tokens)), config.batch))
    return Task("whisper", config.steps, config.rate, trained, draw, losses, dict)


def shape_of(config: Config) -> whisper.Shape:
    """Of the teacher and the first student."""
    points, rank = config.seconds * POINTS_A_SECOND, config.rank_of(0)
    return dataclasses.replace(
        whisper.TINY_EN, points=points, student_layers=config.layers, rank=rank, dropout=config.dropout
    )


def run(config: Config, out: Path, resume: bool, checkpoint_every: int) -> None:
    """Distil, measure, and write the report. Raises RunError, and `train.Interrupted` after Ctrl-C."""
    torch.set_num_threads(config.threads)
    with together() as ranks:
        config = dataclasses.replace(config, world=ranks.world)
        distil(config, out, resume, checkpoint_every, ranks)


def distil(config: Config, out: Path, resume: bool, checkpoint_every: int, ranks: Ranks) -> None:
    ranks.check_shares({"--batch": min(config.batch, config.train)})
    if not config.hard_labels:  # alone they are what distillation is compared with
        check_distils(config.alignment_weight, config.soft_targets)
    if config.students < len(config.lora_ranks):
        raise RunError(
            f"--lora-rank has {len(config.lora_ranks)} ranks, but must have at most one for each of "
            f"{config.students} students"
        )
    # what cannot go on is refused before anything is made
    kept = ranks.led(lambda: checkpoint.check(out, config)) if resume else None
    tokenizer = pretrained.tokenizer()
    shape = shape_of(config)
    first = whisper.build(shape, config.dimension, config.seed_of("adapters"), pretrained.teacher(shape))
    others = (sibling(first, config.seed_of(f"adapters/{k}"), config.rank_of(k)) for k in range(1, config.students))
    students = [first, *others]
    if config.backend != "reference":
        for pair in students:
            pair.aligner.backend = config.backend
            accelerate(pair.student)
        if len(students) > 1:
            share_first_layers([pair.student for pair in students])
    with progress_bar(ranks.leads) as bar:
        heard = synthetic("train", config.train, config, bar)
        sets = {"synthetic": synthetic("test", config.test, config, bar)} | librivox(config) if ranks.leads else {}
        rates: dict[str, dict[str, list[float]]] = {}

        def evaluate(name: str, *models: WhisperForConditionalGeneration) -> None:
            on_step = bar.task(f"words of {name}", len(sets))
            rates[name] = {}
            for k, (part, heard) in enumerate(sets.items()):
                rates[name][part] = [error_rate(model, heard, tokenizer) for model in models]
                on_step(k + 1, None)

        if ranks.leads:
            evaluate(TEACHER, first.teacher)
            evaluate(BEFORE, first.adapted())
        task = distillation(students, heard, encoded(heard, tokenizer), config, ranks)
        path = out / "checkpoints" / "whisper.safetensors"
        torch.manual_seed(config.seed_of("batches"))
        with metrics.leading(
            ranks, out / "metrics.jsonl", lambda: checkpoint.clear(out) if kept is None else kept
        ) as log:
            on_step = bar.task("distillation", config.steps)
            fit(task, config, path, log, checkpoint_every, on_step, ranks=ranks)
        if not ranks.leads:
            return
        evaluate(AFTER, *(pair.adapted() for pair in students))
    content = {**origin(RECIPE), "config": config.as_json(), "word_error_rates": rates}
    beside = size(first.aligner)  # what is trained beside the adapters
    adapters = [sum(p.numel() for p in pair.trained().values()) - beside for pair in students[: len(config.lora_ranks)]]
    content["parameters"] = {"teacher": size(first.teacher), "aligner": beside, "adapters": adapters}
    content["seconds"] = checkpoint.progress(path).seconds
    write_json(out, content)
    publish(out)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def synthetic(split: str, count: int, config: Config, bar: ProgressBar) -> Heard:
    """Sentences in espeak-ng's voices; those of the test are not heard in training."""
    waves, texts, on_step = [], [], bar.task(f"utterances, {split}", count)
    for k in range(count):
        chance = random.Random(f"{config.seed}/whisper/{split}/{k}")
        text, variants = sentences.draw(chance), TEST_VARIANTS if split == "test" else VARIANTS
        utterance = synthesis.Utterance(
            text, chance.choice(ACCENTS), chance.choice(variants), chance.randint(*RATES), chance.randint(*PITCHES),
            chance.uniform(*DECIBELS), chance.uniform(0.0, 2.0), k,
        )  # fmt: skip
        samples, rate = synthesis.render(utterance)
        waves.append(resampled(samples, rate))
        texts.append(text)
        on_step(k + 1, None)
    return Heard(features(waves, config), texts)


def librivox(config: Config) -> dict[str, Heard]:
    """Five recordings of a Debian package, where it is installed."""
    try:
        *paths, said = packaged(LIBRIVOX_PACKAGE, (*CLIPS, "transcription"))
    except RunError:
        return {}
    texts = [line.removeprefix("<s> ").partition(" </s>")[0] for line in said.read_text().splitlines()]
    return {LIBRIVOX: Heard(features([recording(path) for path in paths], config), texts)}


def recording(path: Path) -> np.ndarray:
    """(samples,) of a 16-bit .wav file, resampled."""
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
        return resampled(samples, file.getframerate())


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """By its spectrum, to RATE."""
    if rate == RATE:
        return samples
    count = len(samples) * RATE // rate
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


def features(waves: Sequence[np.ndarray], config: Config) -> Tensor:
    """(N, mels, 2 * points) of Whisper's own log-mel, silence behind what is shorter."""
    extract = WhisperFeatureExtractor(chunk_length=config.seconds)
    found = extract([x[: config.seconds * RATE] for x in waves], sampling_rate=RATE, return_tensors="np")
    return torch.from_numpy(found.input_features)


def encoded(heard: Heard, tokenizer: Any) -> Tensor:
    """(N, tokens): the prompt, the sentence, the end, and IGNORED behind it."""
    rows = [[*pretrained.PROMPT, *tokenizer.encode(f" {text}"), pretrained.END] for text in heard.texts]
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, IGNORED)


def error_rate(model: WhisperForConditionalGeneration, heard: Heard, tokenizer: Any) -> float:
    """WER of what the model writes, taking the likeliest token each time."""
    was = model.training
    model.eval()
    found = [text for part in heard.features.split(EVALUATED) for text in written(model, part, tokenizer)]
    model.train(was)
    return word_error_rate([plain(text) for text in heard.texts], [plain(text) for text in found])


def plain(text: str) -> str:
    return normalised(text.replace("Mr.", "mister"))


@torch.no_grad()
def written(model: WhisperForConditionalGeneration, heard: Tensor, tokenizer: Any, most: int = 60) -> list[str]:
    """The text of each utterance (N, mels, frames)."""
    encoder = model.model.encoder(heard).last_hidden_state
    tokens = torch.tensor([pretrained.PROMPT]).expand(len(heard), -1)
    cache, new = EncoderDecoderCache(DynamicCache(), DynamicCache()), tokens
    ended = torch.zeros(len(heard), dtype=torch.bool)
    while not ended.all() and tokens.shape[1] < most:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the argument's next name is not in all versions
            states = model.model.decoder(new, encoder_hidden_states=encoder, past_key_values=cache, use_cache=True)
        logits = F.linear(states.last_hidden_state[:, -1:], whisper.head(model))
        new = logits[..., : pretrained.END + 1].argmax(-1)  # what is behind are marks, and no text
        ended |= new.squeeze(1) == pretrained.END
        tokens = torch.cat([tokens, new], 1)
    said = (row[len(pretrained.PROMPT) :].tolist() for row in tokens)
    return [tokenizer.decode(row[: row.index(pretrained.END)] if pretrained.END in row else row) for row in said]


def models(
    rates: dict[str, dict[str, list[float]]], config: Config
) -> Iterator[tuple[str, str, Iterable[Sequence[float]]]]:
    """Name, what it is, and its error rates on each set; students of several ranks have a row for each rank."""
    ranks = config.lora_ranks
    for name, found in rates.items():
        what = MEANINGS[name].format(config.layers)
        if name != AFTER or len(ranks) == 1:
            yield name, what, found.values()
            continue
        for k, rank in enumerate(ranks):
            yield f"{name}, rank {rank}", what, [each[k :: len(ranks)] for each in found.values()]


def publish(out: Path) -> None:
    """report.md and the table, from report.json."""
    content = read_json(out)
    config, rates = Config.from_json(content["config"]), content["word_error_rates"]
    columns = ("model", "what", *(f"WER, {part}, %" for part in rates[TEACHER]))
    rows = [[name, what, *(spread(each, 1, 100) for each in own)] for name, what, own in models(rates, config)]
    count = content["parameters"]
    adapters = ", ".join(f"{each:,}" for each in count["adapters"])
    shares = ", ".join(f"{each / count['teacher']:.2%}" for each in count["adapters"])
    beside = f", for {config.students} students beside each other" if config.students > 1 else ""
    remarks = [
        f"{adapters} parameters of adapters were trained, {shares} of the teacher's, "
        f"and {count['aligner']:,} of the projections, which are dropped at the end.",
        f"{config.steps} steps of {config.batch} utterances took {content['seconds']:.0f} s{beside}.",
    ]
    if LIBRIVOX not in rates[TEACHER]:
        remarks.append(f"Not measured on LibriVox's recordings: apt-get install {LIBRIVOX_PACKAGE}.")
    told = Page("Whisper tiny.en into its own first layers", [Table(f"seed {config.seed}", columns, rows, 2)], remarks)
    told.write(out / "report.md", content)
    told.show(out)
