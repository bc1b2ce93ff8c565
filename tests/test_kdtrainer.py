"""kdtrainer: its data, checkpoints, resumption and comparison. Runs are short: what is learned is not tested here.

Soft targets are in test_kdtrainer_soft_targets.py.
"""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from trainer import (
    QUICK,
    SHORT,
    SHORT_STEPS,
    assert_same_bits,
    final_state,
    finish,
    lines_of,
    needs_accelerated,
    one_thread,  # noqa: F401 a fixture
    run_here,
    start,
)

from kdkernels.nn import lora_linear, projection_alignment
from kdtrainer import checkpoint, cli, data, metrics, models
from kdtrainer.compare import deviation
from kdtrainer.config import TEACHERS, Config
from kdtrainer.distill import distillation_task, states_of
from kdtrainer.errors import RunError
from kdtrainer.states import standardised

LORA = ("--lora-rank", "4")
TASKS = ("mlp", "cnn", "student", "student-all-labels", "distilled")

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    code, output, errors = finish(start(*SHORT, "--out", out))
    assert code == 0, errors
    assert "distilled" in output and "teacher, all labels" in output
    return out


@pytest.fixture(scope="module")
def uninterrupted_lora(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted_lora")
    code, output, errors = finish(start(*SHORT, *LORA, "--out", out))
    assert code == 0, errors
    assert "LoRA of rank 4 trains 808 parameters: 0.75% of the teachers' 107,604" in output
    return out


# Data and models


def test_the_split_is_fixed_stratified_and_disjoint():
    a, b = data.load(10, seed=0), data.load(10, seed=1)
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_labels, b.test_labels)
    assert len(a.train_images) + len(a.test_images) == 1797 and len(a.test_images) == 540
    train_share, test_share = (torch.bincount(y, minlength=10) / len(y) for y in (a.train_labels, a.test_labels))
    assert (train_share - test_share).abs().max() < 0.003
    train, test = ({tuple(image.tolist()) for image in images} for images in (a.train_images, a.test_images))
    assert not train & test
    assert a.train_images.min() == 0 and a.train_images.max() == 1


def test_labelled_images_are_as_many_of_each_class_and_drawn_by_the_seed():
    a, again, b = data.load(7, seed=0), data.load(7, seed=0), data.load(7, seed=1)
    assert torch.bincount(a.train_labels[a.labelled]).tolist() == [7] * 10
    assert len(set(a.labelled.tolist())) == 70
    assert torch.equal(a.labelled, again.labelled) and not torch.equal(a.labelled, b.labelled)


def test_more_labelled_images_than_there_are_is_refused(tmp_path, capsys):
    most = int(torch.bincount(data.load(1, seed=0).train_labels).min())
    assert len(data.load(most, seed=0).labelled) == 10 * most
    assert run_here("--labels", most + 1, "--out", tmp_path) == cli.REFUSED
    assert f"--labels is {most + 1}, but must be at most {most}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_teachers_are_of_different_architectures_and_larger_than_the_student():
    assert set(models.TEACHERS) == set(TEACHERS)
    built = {name: make() for name, make in models.TEACHERS.items()}
    kinds = {name: {type(module).__name__ for module in model.modules()} for name, model in built.items()}
    assert "Conv2d" in kinds["cnn"] and "Conv2d" not in kinds["mlp"] | kinds["transformer"]
    assert "MultiheadAttention" in kinds["transformer"] and "MultiheadAttention" not in kinds["mlp"] | kinds["cnn"]
    student = models.parameter_count(models.student())
    for model in (*built.values(), models.student()):
        logits, states = model(torch.rand(5, 64))
        assert logits.shape == (5, 10) and tuple(s.shape for s in states) == tuple((5, w) for w in model.widths)
    assert all(models.parameter_count(model) > 4 * student for model in built.values())


def test_standardised_states():
    for state in standardised(states_of(models.RowTransformer(), torch.rand(50, 64))):
        assert state.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(state.square().mean(), torch.tensor(1.0))


def test_the_distilled_student_learns_from_the_alignment():
    """The loss says what it is made of, and its gradient reaches the student and the learned projections alone."""
    digits, config = data.load(2, seed=0), Config(alignment_weight=3.0)
    teachers = [(name, models.TEACHERS[name]().requires_grad_(False)) for name in TEACHERS]
    torch.manual_seed(0)
    task = distillation_task("distilled", models.student(), teachers, digits, config, 1e-3, "reference")
    losses = task.losses(*task.draw())
    torch.testing.assert_close(losses["loss"], losses["cross_entropy"] + 3 * losses["alignment"])
    losses["alignment"].backward()
    names = {name for name, p in task.trained.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, _ in task.trained.named_parameters()} - names == {
        "student.head.weight",
        "student.head.bias",
    }
    assert {name.split(".")[1] for name in names if name.startswith("aligners")} == set(TEACHERS)


@pytest.mark.parametrize(
    "make, linear", [(models.student, ("hidden.0", "hidden.1", "head")), (models.CNN, ("hidden", "head"))]
)
def test_adapting_freezes_a_model_and_changes_nothing_yet(make, linear):
    model, images = make(), torch.rand(5, 64)
    logits, states = model(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.adapt(model, 4, "reference")
    for ours, theirs in zip((model(images)[0], *model(images)[1]), (logits, *states), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora_{x}" for layer in linear for x in "AB"}


def test_rank_4_trains_less_than_a_hundredth_of_the_teachers_parameters():
    model = models.student()
    models.adapt(model, 4, "reference")
    teachers = sum(models.parameter_count(make()) for make in models.TEACHERS.values())
    assert models.trained_parameter_count(model) == 4 * ((64 + 32) + (32 + 32) + (32 + 10)) < 0.01 * teachers


@pytest.mark.parametrize("metric", ["cosine", "mse", "angular"])
def test_with_lora_the_teachers_logits_reach_the_adapters_alone(metric):
    digits, config = data.load(2, seed=0), Config(alignment_weight=3.0, lora_rank=2, metric=metric)
    teachers = [(name, models.TEACHERS[name]()) for name in TEACHERS]
    torch.manual_seed(0)
    student = models.student()
    models.adapt(student, 2, "reference")
    task = distillation_task("distilled", student, teachers, digits, config, 1e-3, "reference")
    losses = task.losses(*task.draw())
    torch.testing.assert_close(losses["loss"], losses["cross_entropy"] + 3 * losses["alignment"])
    losses["alignment"].backward()
    trained = {name for name, p in task.trained.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {name for name, p in task.trained.named_parameters() if p.grad is not None and p.grad.any()} == {
        name
        for name in trained
        if name.endswith("lora_B")  # lora_A waits for a B that is not 0
    }
    assert all(p.grad is None for _, teacher in teachers for p in teacher.parameters())


# Checkpoints


def trained_a_little(seed=0):
    torch.manual_seed(seed)
    model = models.student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 64))[0].square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "a.safetensors"
    model, optimizer = trained_a_little()
    checkpoint.save(path, model, optimizer, Config(seed=3), checkpoint.Progress(3, 77, 1.5))
    expected_rng = torch.rand(4)
    other, other_optimizer = trained_a_little(seed=1)
    checkpoint.restore(path, other, other_optimizer)
    assert torch.equal(torch.rand(4), expected_rng)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    saved, restored = (o.state_dict()["state"] for o in (optimizer, other_optimizer))
    assert saved.keys() == restored.keys()
    for index, state in saved.items():
        assert state.keys() == restored[index].keys()
        assert all(torch.equal(value, restored[index][name]) for name, value in state.items())
    assert checkpoint.progress(path) == checkpoint.Progress(3, 77, 1.5)
    checkpoint.check_config(path, Config(seed=3))
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    checkpoint.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    happened = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), rename(a, b)))
    checkpoint.write_atomically(tmp_path / "a", b"x")
    assert happened[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", bytes(range(64)), b"\xff" * 64])
def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"a\.safetensors is no checkpoint of kdtrainer, or was damaged"):
        checkpoint.check_config(path, Config())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        lambda content: content.replace(b'"F32"', b'"I32"', 1),
        lambda content: content.replace(b"seed", b"sewd", 1),
        lambda content: content.replace(b'\\"seed\\":', b'\\"seed\\"x', 1),
        lambda content: content.replace(b"a.safetensors", b"b.safetensors", 1),
    ],
)
def test_one_changed_byte_in_a_checkpoint_is_noticed(tmp_path, change):
    model, optimizer = trained_a_little()
    path = tmp_path / "checkpoints" / "a.safetensors"
    checkpoint.save(path, model, optimizer, Config(), checkpoint.Progress(3, 77, 1.5))
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert path.read_bytes() != content
    with pytest.raises(RunError, match="was damaged"):
        checkpoint.restore(path, model, optimizer)
    with pytest.raises(RunError, match="was damaged"):
        checkpoint.prepare(tmp_path, True, Config())


def test_another_models_checkpoint_in_its_place_is_noticed(tmp_path):
    model, optimizer = trained_a_little()
    checkpoint.save(tmp_path / "a.safetensors", model, optimizer, Config(), checkpoint.Progress(3, 77, 1.5))
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    with pytest.raises(RunError, match=r"b\.safetensors is no checkpoint of kdtrainer, or was damaged"):
        checkpoint.weights(tmp_path / "b.safetensors")


def test_a_fresh_run_clears_its_own_files_alone(tmp_path):
    model, optimizer = trained_a_little()
    own, damaged, others = (tmp_path / "checkpoints" / f"{name}.safetensors" for name in ("own", "damaged", "theirs"))
    checkpoint.save(own, model, optimizer, Config(), checkpoint.Progress(3, 77, 1.5))
    damaged.write_bytes(own.read_bytes()[:100])
    save_file({"x": torch.zeros(3)}, others)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RunError, match=r"theirs\.safetensors is no checkpoint of kdtrainer"):
        checkpoint.prepare(tmp_path, False, Config())
    assert own.exists() and (tmp_path / "report.json").exists()
    others.unlink()
    assert checkpoint.prepare(tmp_path, False, Config()) == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_an_unusable_folder_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run_here("--out", str(tmp_path / "file"), "--steps", "1", "--teacher-steps", "1") == 2
    assert "kdtrainer: " in capsys.readouterr().err


def test_metrics_are_cut_back_to_what_the_checkpoint_vouches_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.MetricsLog(path)
    log.append({"task": "a", "step": 1})
    kept = log.sync()
    log.append({"task": "a", "step": 2})
    log.close()
    log = metrics.MetricsLog(path, kept)
    log.append({"task": "b", "step": 1})
    log.close()
    assert metrics.read(path) == {"a": [{"task": "a", "step": 1}], "b": [{"task": "b", "step": 1}]}
    with pytest.raises(RunError, match="it was changed since"):
        metrics.MetricsLog(path, 10_000)


def test_metrics_that_are_gone_are_said_to_be(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RunError, match=r"metrics\.jsonl is missing, .* put it back, or start afresh, without --resume"):
        metrics.MetricsLog(path, 77)
    assert not path.exists(), "an empty file in its place would be said to have been changed"


# Whole runs


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("command"),
        lambda report: report.update(machine={}),
        lambda report: report.update(recipe=[]),
        lambda report: report.update(models=[]),
    ],
)
def test_a_damaged_report_is_said_to_be_one(uninterrupted, tmp_path, capsys, spoil):
    report = json.loads((uninterrupted / "report.json").read_text())
    spoil(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    shutil.copy(uninterrupted / "metrics.jsonl", tmp_path)
    assert run_here(str(tmp_path), experiment="report") == 2
    assert f"kdtrainer: {tmp_path / 'report.json'} is " in capsys.readouterr().err


def test_a_damaged_line_of_metrics_is_said_to_be_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in ("{", "[]", "{}", "3"):
        path.write_text(line)
        with pytest.raises(RunError, match="has a line that is none of a run's"):
            metrics.read(path)


@pytest.mark.parametrize("arguments", [("--threads", "99999999999"), ("--seed", "1" + 30 * "0"), ("--budget", "1e300")])
def test_numbers_that_torch_cannot_hold_are_refused(capsys, arguments):
    with pytest.raises(SystemExit):
        run_here(*arguments)
    assert "is too large, must be at most" in capsys.readouterr().err


def test_a_run_reports_everything(uninterrupted):
    report = json.loads((uninterrupted / "report.json").read_text())
    assert [row["name"] for row in report["models"]] == ["mlp", "cnn", "ensemble", *TASKS[2:]]
    assert all(0 <= row["accuracy"] <= 1 and row["parameters"] > 0 for row in report["models"])
    assert report["config"]["backend"] == "reference" and report["config"]["steps"] == 40
    for name in ("loss.png", "accuracy.png"):
        assert (uninterrupted / name).read_bytes().startswith(b"\x89PNG")
    records = metrics.read(uninterrupted / "metrics.jsonl")
    assert tuple(records) == TASKS
    for task, rows in records.items():
        assert [row["step"] for row in rows] == list(range(1, (6 if task in TEACHERS else 40) + 1))
        assert "accuracy" in rows[-1]


def test_students_start_from_the_same_weights_and_the_same_batch(uninterrupted):
    records = metrics.read(uninterrupted / "metrics.jsonl")
    assert records["student"][0]["loss"] == pytest.approx(records["distilled"][0]["cross_entropy"], rel=1e-6)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(uninterrupted, tmp_path):
    for seed in (0, 1):
        assert run_here(*SHORT, "--out", tmp_path / str(seed), "--seed", seed) == cli.DONE
    assert_same_bits(final_state(tmp_path / "0"), final_state(uninterrupted))
    assert final_state(tmp_path / "1")[1] != final_state(uninterrupted)[1]


# One kill in the teachers' part, one in the plain students', one in the distillation, each at a random step.
@pytest.mark.parametrize("least, most", [(1, 11), (13, 90), (95, SHORT_STEPS - 8)])
def test_killed_at_a_random_moment_and_resumed_gives_the_same_bits(uninterrupted, tmp_path, least, most):
    moment = random.randint(least, most)
    process = start(*SHORT, "--out", tmp_path)
    while lines_of(tmp_path) < moment and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == -signal.SIGKILL, f"it ended before it could be killed at line {moment}: {errors}"
    assert lines_of(tmp_path) < SHORT_STEPS
    assert run_here(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(uninterrupted, tmp_path):
    process = start(*SHORT, "--out", tmp_path, "--checkpoint-every", 1000)
    while lines_of(tmp_path) < 60 and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == cli.INTERRUPTED and "interrupted; add --resume" in errors and "Traceback" not in errors
    stopped = checkpoint.progress(tmp_path / "checkpoints" / "student-all-labels.safetensors").step
    assert 0 < stopped < 40 and lines_of(tmp_path) == 6 + 6 + 40 + stopped, "the step it stopped at was not saved"
    assert run_here(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_resuming_with_another_config_is_refused(uninterrupted, capsys):
    before = final_state(uninterrupted)
    changed = ("--out", uninterrupted, "--resume", "--metric", "cosine", "--seed", "5")
    assert run_here(*SHORT, *changed) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "metric was 'mse' and is now 'cosine'" in errors and "seed was 0 and is now 5" in errors
    assert_same_bits(final_state(uninterrupted), before)


def test_every_field_of_the_config_is_guarded(tmp_path):
    path = tmp_path / "checkpoints" / "a.safetensors"
    model, optimizer = trained_a_little()
    checkpoint.save(path, model, optimizer, Config(), checkpoint.Progress(1, 0, 0.0))
    for name, value in Config().as_json().items():
        other = ("mlp", "cnn") if name == "teachers" else value + ("x" if isinstance(value, str) else 1)
        with pytest.raises(RunError, match=f"{name} was .* and is now"):
            checkpoint.check_config(path, replace(Config(), **{name: other}))


# --lora-rank


def test_a_lora_run_reports_what_it_trains(uninterrupted, uninterrupted_lora):
    report = json.loads((uninterrupted_lora / "report.json").read_text())
    teachers = 85_002 + 22_602
    assert report["lora"] == {
        "rank": 4, "trained_parameters": 808, "teachers_parameters": teachers, "share": 808 / teachers,
    }  # fmt: skip
    rows = {row["name"]: row for row in report["models"]}
    assert rows["distilled"]["trained_parameters"] == 808 and rows["distilled"]["parameters"] == 3466 + 808
    assert rows["student"]["trained_parameters"] == rows["student"]["parameters"] == 3466
    assert "LoRA of rank 4" in rows["distilled"]["trained_on"]

    report = json.loads((uninterrupted / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    projections = sum(2 * 64 * (32 + 1) for _ in ("mlp", "cnn"))
    assert report["lora"] is None and rows["distilled"]["trained_parameters"] == 3466 + projections
    assert "LoRA" not in rows["distilled"]["trained_on"]


def test_lora_starts_from_the_plain_student_and_leaves_it_frozen(uninterrupted, uninterrupted_lora):
    plain, adapted = (
        checkpoint.weights(uninterrupted_lora / "checkpoints" / f"{task}.safetensors")
        for task in ("student", "distilled")
    )
    for name, value in plain.items():
        assert torch.equal(adapted[f"student.{name}"], value), name
    adapters = adapted.keys() - {f"student.{name}" for name in plain}
    assert len(adapters) == 6 and all(adapted[name].any() for name in adapters)
    without, with_lora = (final_state(out)[0] for out in (uninterrupted, uninterrupted_lora))
    assert all(torch.equal(without["student"][name], value) for name, value in with_lora["student"].items())


@pytest.mark.parametrize("least, most", [(55, 90), (95, SHORT_STEPS - 8)])
def test_a_killed_lora_run_resumes_to_the_same_bits(uninterrupted_lora, tmp_path, least, most):
    moment = random.randint(least, most)
    process = start(*SHORT, *LORA, "--out", tmp_path)
    while lines_of(tmp_path) < moment and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == -signal.SIGKILL, f"it ended before it could be killed at line {moment}: {errors}"
    assert run_here(*SHORT, *LORA, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted_lora))


@pytest.mark.parametrize("rank", ["0", "5"])
def test_resuming_with_another_rank_is_refused(uninterrupted_lora, capsys, rank):
    before = final_state(uninterrupted_lora)
    assert run_here(*SHORT, "--lora-rank", rank, "--out", uninterrupted_lora, "--resume") == cli.REFUSED
    assert f"lora_rank was 4 and is now {rank}" in capsys.readouterr().err
    assert_same_bits(final_state(uninterrupted_lora), before)


def test_lora_learns_from_the_teachers(tmp_path):
    """What a student of 100 labels lacks it gets through 808 parameters."""
    steps = ("--teachers", "mlp,cnn", "--teacher-steps", "100", "--steps", "150", "--backend", "reference")
    assert run_here(*steps, *LORA, "--out", tmp_path) == cli.DONE
    report = json.loads((tmp_path / "report.json").read_text())
    accuracy = {row["name"]: row["accuracy"] for row in report["models"]}
    assert accuracy["distilled"] > max(0.9, accuracy["student"] + 0.03)


def test_lora_has_no_projections_for_the_gram_method(tmp_path, capsys):
    assert run_here(*QUICK, *LORA, "--method", "gram", "--out", tmp_path) == cli.REFUSED
    assert "--method gram needs projections" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --compare


COMPARED = (*QUICK, "--compare")


@needs_accelerated
def test_compare_is_within_budget(tmp_path, capsys):
    assert run_here(*COMPARED, "--out", tmp_path) == cli.DONE
    assert "within the budget" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())["compare"]
    assert found["within_budget"] and 0 <= found["loss"] <= found["budget"]


@needs_accelerated
def test_compare_fails_under_a_budget_that_rounding_exceeds(tmp_path, capsys):
    assert run_here(*COMPARED, "--out", tmp_path, "--budget", "0") == cli.OVER_BUDGET
    assert "ABOVE the budget of 0" in capsys.readouterr().out


@needs_accelerated
def test_compare_fails_when_a_backend_is_wrong(tmp_path, monkeypatch, capsys):
    right = projection_alignment.projection_alignment_loss

    def one_per_mille_off(*arguments, backend, **options):
        return right(*arguments, backend=backend, **options) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(projection_alignment, "projection_alignment_loss", one_per_mille_off)
    assert run_here(*COMPARED, "--out", tmp_path) == cli.OVER_BUDGET
    assert "ABOVE the budget" in capsys.readouterr().out


@needs_accelerated
def test_compare_with_lora_is_within_budget_unless_an_adapter_is_wrong(tmp_path, monkeypatch, capsys):
    assert run_here(*COMPARED, *LORA, "--out", tmp_path / "right") == cli.DONE
    assert "within the budget" in capsys.readouterr().out
    right = lora_linear.lora_linear

    def one_per_mille_off(*arguments, scaling, backend, **options):
        wrong = scaling * (1 if backend == "reference" else 1.001)
        return right(*arguments, scaling=wrong, backend=backend, **options)

    monkeypatch.setattr(lora_linear, "lora_linear", one_per_mille_off)
    assert run_here(*COMPARED, *LORA, "--out", tmp_path / "wrong") == cli.OVER_BUDGET
    assert "ABOVE the budget" in capsys.readouterr().out


def test_compare_refuses_to_compare_the_reference_with_itself(tmp_path, capsys):
    assert run_here(*COMPARED, "--backend", "reference", "--out", tmp_path) == cli.REFUSED
    assert "--compare has nothing to compare" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_deviation_is_relative_and_over_the_whole_run():
    w = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    moved = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([[4.0]])}
    found = deviation([2.0, 1.1, 5.0], [2.0, 1.0, 5.0], moved, w, budget=0.1)
    assert found.loss == pytest.approx(0.1) and found.weights == pytest.approx(0.1)
    assert deviation([1.0], [1.0], w, w, budget=0.0).within_budget
    assert not deviation([1.2], [1.0], w, w, budget=0.1).within_budget
    assert not deviation([1.0], [1.0], moved, w, budget=0.05).within_budget
    assert not deviation([float("nan")], [1.0], w, w, budget=1.0).within_budget


# The command line


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_here("--help")
    text = capsys.readouterr().out
    for option in (
        "--out",
        "--resume",
        "--compare",
        "--teachers",
        "--lora-rank",
        "--checkpoint-every",
        "--budget",
        "--threads",
    ):
        assert option in text
    assert "None" not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--teachers", "mlp"), "at least two teachers"),
        (("--teachers", "mlp,mlp"), "each once"),
        (("--teachers", "mlp,rnn"), "'rnn' is no teacher, must be of mlp, cnn, transformer"),
        (("--steps", "0"), "0 is too small, must be at least 1"),
        (("--steps", "many"), "'many' is no number"),
        (("--lora-rank", "-1"), "-1 is too small, must be at least 0"),
        (("--budget", "nan"), "too small"),
        (("--metric", "euclid"), "invalid choice: 'euclid'"),
        (("--epochs", "3"), "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_here(*arguments)
    assert message in capsys.readouterr().err


def test_missing_packages_are_named_once(monkeypatch, capsys):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "safetensors") else found(name))
    assert run_here() == cli.REFUSED
    assert capsys.readouterr().err == (
        "kdtrainer: rich and safetensors must be installed: pip install 'kdkernels[trainer]'\n"
    )
