"""A teacher kept as the k most probable tokens of each point: what it stands for, its file, and what is refused."""

import json

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
    "no number": (meta("vocabulary", "many"), "invalid literal"),
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
        ({"k": 3, "teacher_head": torch.ones(7, 4)}, ValueError, r"teacher_head.weight has shape \(7, 4\), .* d_t = 5"),
        ({"k": 3, "teacher_head": None, "teacher": torch.ones(4, 0)}, ValueError, "teacher has a vocabulary of 0"),
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
