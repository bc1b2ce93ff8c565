"""A teacher kept as the k most probable tokens of each point: what it stands for, its file, and what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import kdkernels as kd
from kdkernels.testing.compare import relative_error
from kdkernels.testing.linear_distillation.inputs import make_inputs

NATIVE = pytest.param("native", marks=pytest.mark.native)
everywhere = pytest.mark.parametrize("backend", ["reference", NATIVE])


def teacher_of(k, tail="uniform", N=23, V=45):
    inputs = make_inputs(N, V=V, plain=True)
    return inputs, kd.topk_teacher(inputs.teachers[0], inputs.heads[0], k=k, tail=tail)


def test_the_most_probable_tokens_first():
    inputs, found = teacher_of(5)
    log_p = (inputs.teachers[0] @ inputs.heads[0].weight.T).log_softmax(-1)
    best, places = log_p.topk(5)
    assert relative_error(found.log_probs, best) < 1e-6
    assert torch.equal(found.indices.long(), places)
    assert (found.k, found.vocabulary, found.tail) == (5, 45, "uniform")
    assert found.indices.dtype is torch.int32 and found.log_probs.dtype is torch.float32


def test_of_logits_of_a_head_and_of_leading_dimensions():
    inputs = make_inputs(24)
    head = inputs.heads[0]._replace(softcap=3.0, scale=0.5, lora_A=torch.ones(2, 17), lora_B=torch.ones(45, 2) / 9)
    x = inputs.teachers[0]
    y = (x @ head.weight.T + head.bias + x @ head.lora_A.T @ head.lora_B.T) * 0.5
    y = 3 * torch.tanh(y / 3)
    found = kd.topk_teacher(x.reshape(2, 3, 4, 17), head, k=6)
    plain = kd.topk_teacher(y, k=6)
    assert found.log_probs.shape == found.indices.shape == (2, 3, 4, 6)
    assert relative_error(found.log_probs.reshape(24, 6), plain.log_probs) < 1e-6


def test_blocks_do_not_matter(monkeypatch):
    _, whole = teacher_of(4)
    monkeypatch.setattr("kdkernels.ops.linear_distillation.top_k.ROOM", 8 * 45 * 3)
    _, parts = teacher_of(4)
    assert torch.equal(whole.indices, parts.indices)
    assert relative_error(parts.log_probs, whole.log_probs) < 1e-6


@everywhere
@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
def test_all_tokens_are_the_teacher_itself(backend, T):
    inputs, whole = teacher_of(100)
    assert whole.k == 45
    student, head = inputs.trained.values()
    options = {"temperature": T, "backend": backend}
    found = kd.linear_distillation_loss(student, head, whole, **options)
    expected = kd.linear_distillation_loss(student, head, inputs.teachers, inputs.heads, **options)
    assert relative_error(found, expected) < 1e-5


@everywhere
@pytest.mark.parametrize("tail", ["uniform", "renormalise"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_the_rest_goes_where_the_rule_says(backend, tail, T):
    inputs, few = teacher_of(5, tail)
    p = torch.zeros(23, 45, dtype=torch.float64)
    if tail == "uniform":
        p += ((1 - few.log_probs.double().exp().sum(-1)) / 40)[:, None]
    p.scatter_(1, few.indices.long(), few.log_probs.double().exp())
    p = p ** (1 / T)
    p /= p.sum(-1, keepdim=True)
    student, head = (x.double() for x in inputs.trained.values())
    log_q = (student @ head.T / T).log_softmax(-1)
    expected = T**2 * torch.xlogy(p, p).sub(p * log_q).sum(-1).mean()
    found = kd.linear_distillation_loss(*inputs.trained.values(), few, temperature=T, backend=backend)
    assert relative_error(found, expected) < 2e-6


@everywhere
@pytest.mark.parametrize("gap", [10, 20, 40])
def test_the_rest_of_a_teacher_that_is_certain(backend, gap):
    """1 − Σ p in float32 would be rounding noise, which a temperature makes large."""
    draw = torch.Generator().manual_seed(0)
    student, y = (torch.randn(4, 1000, generator=draw) for _ in range(2))
    y[:, 3] += gap
    for options in ({"temperature": 4.0}, {"divergence": "jsd", "temperature": 10.0}, {"divergence": "reverse_kl"}):
        found = kd.linear_distillation_loss(student, None, kd.topk_teacher(y, k=8), backend=backend, **options)
        wide = kd.topk_teacher(y.double(), k=8)
        expected = kd.linear_distillation_loss(student.double(), None, wide, backend="reference", **options)
        assert relative_error(found, expected) < 2e-5, options


def test_autocast_leaves_it_alone():
    draw = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 128, generator=draw), torch.randn(500, 128, generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        found = kd.topk_teacher(x, W, k=8)
    assert torch.equal(found.log_probs, kd.topk_teacher(x, W, k=8).log_probs)


@everywhere
@pytest.mark.parametrize("cut", [5, 30, 44])
def test_a_longer_vocabulary_that_is_cut(backend, cut):
    """Tokens beyond are dropped, whichever they are."""
    inputs, few = teacher_of(9)
    head = inputs.trained["student_head"][:cut]
    found = kd.linear_distillation_loss(inputs.trained["student"], head, few, vocab_map="truncate", backend=backend)
    others = ((few.rest.double() - torch.tensor(36.0).log())[:, None]).expand(23, 45)
    y = others.scatter(1, few.indices.long(), few.log_probs.double())[:, :cut]
    expected = kd.linear_distillation_loss(inputs.trained["student"].double(), head.double(), y, backend="reference")
    assert relative_error(found, expected) < 2e-6


def test_batches_of_an_epoch():
    _, few = teacher_of(5)
    batch = few[torch.tensor([3, 1, 2])].to("cpu")
    assert torch.equal(batch.log_probs, few.log_probs[[3, 1, 2]]) and torch.equal(batch.rest, few.rest[[3, 1, 2]])
    assert (batch.vocabulary, batch.tail) == (45, "uniform")
    assert few == few and few != batch


def test_log_probabilities_of_bfloat16():
    kd.TopKTeacher(torch.tensor([[0.5, 0.5]]).log().bfloat16(), torch.tensor([[0, 1]]), 2)


def test_many_writers_of_one_file(tmp_path):
    _, few = teacher_of(5)
    path = tmp_path / "teacher.safetensors"
    few.save(path)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(few.save if i % 2 else kd.TopKTeacher.load, path) for i in range(80)]:
            done.result()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(FileNotFoundError, match="nowhere is no folder, but teacher was to be written there"):
        few.save(tmp_path / "nowhere" / "teacher")


def umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_file_gives_back_the_same_bits(tmp_path):
    _, few = teacher_of(5, "renormalise")
    path = tmp_path / "teacher.safetensors"
    few.save(path, {"teacher": "large"})
    found = kd.TopKTeacher.load(path)
    assert torch.equal(found.log_probs, few.log_probs) and torch.equal(found.indices, few.indices)
    assert (found.vocabulary, found.tail) == (45, "renormalise")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["teacher"] == "large"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary is left


def test_saving_over_a_file_is_all_or_nothing(tmp_path, monkeypatch):
    _, few = teacher_of(5)
    path = tmp_path / "teacher.safetensors"
    few.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        teacher_of(3)[1].save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("cut", [0, 4, 8, 60, 300, -1])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    _, few = teacher_of(5)
    path = tmp_path / "teacher.safetensors"
    few.save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"teacher\.safetensors is no safetensors file, or was cut short"):
        kd.TopKTeacher.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors holds weight, but is no file of TopKTeacher.save"):
        kd.TopKTeacher.load(path)
    with pytest.raises(FileNotFoundError):
        kd.TopKTeacher.load(tmp_path / "nothing")


def changed(name, edit):
    def change(tensors, metadata):
        tensors[name] = edit(tensors[name].clone())

    return change


def meta(name, value):
    def change(tensors, metadata):
        metadata[name] = value

    return change


def put(x, value):
    x[1, 2] = value
    return x


DAMAGES = {
    "NaN": (changed("log_probs", lambda x: put(x, torch.nan)), "log_probs holds NaN"),
    "a probability above 1": (
        changed("log_probs", lambda x: put(x, 0.5)),
        "probabilities that add up to .* not exceed 1",
    ),
    "sums above 1": (changed("log_probs", lambda x: x * 0 - 0.5), "probabilities that add up to 3.033"),
    "no probability": (changed("log_probs", lambda x: x - torch.inf), "without a token of any probability"),
    "shapes": (
        changed("indices", lambda x: x[:, :3].contiguous()),
        r"log_probs has shape \(23, 5\) and indices \(23, 3\)",
    ),
    "points": (changed("indices", lambda x: x[:9]), r"log_probs has shape \(23, 5\) and indices \(9, 5\)"),
    "a token beyond": (
        changed("indices", lambda x: put(x, 45)),
        "indices holds 45, but must be at least 0 and below 45",
    ),
    "a token below": (changed("indices", lambda x: put(x, -1)), "indices holds -1"),
    "a token twice": (changed("indices", lambda x: put(x, x[1, 1])), "indices has a point that names a token twice"),
    "dtype": (changed("indices", lambda x: x.float()), "indices has dtype torch.float32, but must be int32 or int64"),
    "vocabulary": (meta("vocabulary", "3"), "log_probs has k = 5, but must have 1 to 3"),
    "no number": (meta("vocabulary", "many"), "vocabulary is 'many', but must be a whole number"),
    "a huge vocabulary": (meta("vocabulary", "9" * 20), "vocabulary is '9"),
    "the rest": (changed("rest", lambda x: x[:4].contiguous()), r"rest has shape \(4\), but must be \(23\)"),
    "the rest above 1": (changed("rest", lambda x: x * 0), "probabilities that add up"),
    "tail": (meta("tail", "fat"), "tail is 'fat', but must be one of 'uniform', 'renormalise'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, damage):
    _, few = teacher_of(5)
    path = tmp_path / "teacher.safetensors"
    few.save(path)
    tensors = load_file(path)
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    change, message = DAMAGES[damage]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=rf"teacher\.safetensors is damaged: .*{message}"):
        kd.TopKTeacher.load(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0, but must be a whole number of at least 1"),
        ({"k": 3, "tail": "none"}, ValueError, "tail is 'none'"),
        ({"k": 3, "teacher": torch.ones(4).long()}, TypeError, "teacher has dtype torch.int64"),
        ({"k": 3, "teacher_head": torch.ones(7, 4)}, ValueError, r"teacher_head has shape \(7, 4\), .* d = 5"),
        ({"k": 3, "teacher_head": kd.Head(torch.ones(7, 5), softcap=-3.0)}, ValueError, "teacher_head.softcap is -3.0"),
        ({"k": 3, "teacher_head": kd.Head(torch.ones(7, 5), lora_A=torch.ones(2, 5))}, ValueError, "one of lora_A and"),
        ({"k": 3, "teacher_head": [1.0]}, TypeError, "teacher_head is list"),
        ({"k": 3, "teacher_head": None, "teacher": torch.ones(4, 0)}, ValueError, "teacher has no token"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    given = {"teacher": torch.ones(4, 5), "teacher_head": torch.ones(7, 5)} | arguments
    with pytest.raises(error, match=message):
        kd.topk_teacher(given.pop("teacher"), given.pop("teacher_head"), **given)


def test_no_points():
    found = kd.topk_teacher(torch.ones(0, 3, 9), k=4)
    assert found.log_probs.shape == (0, 3, 4)
    value = kd.linear_distillation_loss(torch.ones(0, 3, 2), torch.ones(9, 2), found)
    assert value == 0
