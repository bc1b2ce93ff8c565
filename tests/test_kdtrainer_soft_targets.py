"""kdtrainer's soft targets: what they are, whom they teach, and whole runs with them."""

import json
import random
import signal
import time

import pytest
import torch
from torch import nn
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

import kdkernels as kd
from kdkernels.nn import head_of
from kdtrainer import cli, data, distill, metrics, models
from kdtrainer.config import TEACHERS, Config

SOFT = ("--soft-targets", "0.5", "--temperature", "3", "--divergence", "jsd", "--mixture", "geometric")
ALONE = ("--soft-targets", "1", "--alignment-weight", "0")

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture(scope="module")
def digits():
    return data.load(2, seed=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    code, output, errors = finish(start(*SHORT, *SOFT, "--out", out))
    assert code == 0, errors
    assert "the teachers' states and soft targets of the other images" in output
    return out


def adapted_student(rank):
    """With adapters that do something already, where `rank` is not 0."""
    torch.manual_seed(0)
    student = models.student()
    if rank:
        models.adapt(student, rank, "reference")
        for name, parameter in student.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
    return student


def task_of(config, digits, backend="reference"):
    """The same student and teachers in every call."""
    student = adapted_student(config.lora_rank)
    teachers = [(name, models.TEACHERS[name]()) for name in config.teachers]
    return distill.distillation_task("distilled", student, teachers, digits, config, 1e-3, backend), teachers


def losses_of(task, seed=5):
    torch.manual_seed(seed)  # of the batch
    return task.losses(*task.draw())


def plain_soft_targets(task, teachers, digits, temperature, seed=5):
    """T² KL(mean of the teachers' distributions ‖ the student's), of logits, on the batch of `losses_of`."""
    torch.manual_seed(seed)
    _, distilled = task.draw()
    images = digits.train_images[distilled]  # (DISTILLED_BATCH, 64)
    with torch.no_grad():
        p = torch.stack([(teacher(images)[0] / temperature).softmax(-1) for _, teacher in teachers]).mean(0)
    log_q = (task.model(images)[0] / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()


# What they are


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("make", [*models.TEACHERS.values(), models.student])
def test_a_head_makes_the_models_logits_of_its_last_state(make, rank):
    model, images = make(), torch.rand(5, 64)
    if rank:
        models.adapt(model, rank, "reference")
        nn.init.normal_(model.head.lora_B)
    model.eval()
    head, state = head_of(model.head), model.states(images)[-1]
    logits = state @ head.weight.T + head.bias
    if rank:
        logits = logits + head.scaling * state @ head.lora_A.T @ head.lora_B.T
        assert head.lora_A is model.head.lora_A and head.lora_B is model.head.lora_B and head.scaling == 16 / rank
    torch.testing.assert_close(logits, model(images)[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_dropout_of_a_heads_adapter_is_that_of_training(training):
    student = models.student()
    student.head = kd.nn.LoRALinear.from_linear(student.head, 2, dropout=0.3)
    assert head_of(student.train(training).head).dropout_p == (0.3 if training else 0.0)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_loss_says_what_it_is_made_of(digits, rank):
    config = Config(alignment_weight=3.0, soft_targets=0.5, temperature=1.5, lora_rank=rank)
    task, teachers = task_of(config, digits)
    losses = losses_of(task)
    assert losses.keys() == {"loss", "cross_entropy", "alignment", "soft_targets"}
    torch.testing.assert_close(
        losses["loss"], losses["cross_entropy"] + 3 * losses["alignment"] + 0.5 * losses["soft_targets"]
    )
    torch.testing.assert_close(losses["soft_targets"], plain_soft_targets(task, teachers, digits, 1.5))


@pytest.mark.parametrize(
    "weights, parts", [((10.0, 0.0), {"alignment"}), ((0.0, 1.0), {"soft_targets"}), ((0.0, 0.0), set())]
)
def test_a_part_of_weight_0_is_not_computed(digits, monkeypatch, weights, parts):
    def fail(*_, **__):
        raise AssertionError("it was computed")

    if "alignment" not in parts:
        monkeypatch.setattr(distill, "ProjectionAlignment", fail)
    if "soft_targets" not in parts:
        monkeypatch.setattr(kd, "linear_distillation_loss", fail)
    task, _ = task_of(Config(alignment_weight=weights[0], soft_targets=weights[1]), digits)
    assert losses_of(task).keys() == {"loss", "cross_entropy"} | parts


def test_teachers_are_asked_for_their_states_once_and_never_for_logits(digits, monkeypatch):
    asked = []
    for kind in (models.MLP, models.CNN, models.RowTransformer):
        right = kind.states
        monkeypatch.setattr(kind, "states", lambda self, x, right=right: (asked.append(self), right(self, x))[1])
    task, teachers = task_of(Config(soft_targets=1.0), digits)
    for _, teacher in teachers:
        teacher.head.register_forward_hook(lambda *_: pytest.fail("a teacher made logits"))
    for seed in range(3):
        losses_of(task, seed)["loss"].backward()
    assert [sum(model is teacher for model in asked) for _, teacher in teachers] == [1, 1, 1]
    assert all(p.grad is None for _, teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("rank", [0, 3])
def test_their_gradients_are_those_of_plain_pytorch(digits, rank):
    """The adapter of the student's head gets its share."""
    task, teachers = task_of(Config(alignment_weight=0.0, soft_targets=1.0, lora_rank=rank), digits)
    trained = {name: p for name, p in task.trained.named_parameters() if p.requires_grad}
    heads = {name for name in trained if ".head." in name}
    assert heads == {f"student.head.{name}" for name in (("lora_A", "lora_B") if rank else ("weight", "bias"))}
    found = torch.autograd.grad(losses_of(task)["soft_targets"], list(trained.values()))
    wanted = torch.autograd.grad(plain_soft_targets(task, teachers, digits, 2.0), list(trained.values()))
    for name, ours, theirs in zip(trained, found, wanted, strict=True):
        assert theirs.any(), name
        torch.testing.assert_close(ours, theirs, msg=name)


@needs_accelerated
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("mixture", ["arithmetic", "geometric"])
@pytest.mark.parametrize("divergence", cli.DIVERGENCES)
def test_native_and_reference_agree(digits, divergence, mixture, rank):
    config = Config(alignment_weight=0.0, soft_targets=1.0, divergence=divergence, mixture=mixture, lora_rank=rank)
    found = []
    for backend in ("native", "reference"):
        task, _ = task_of(config, digits, backend)
        loss = losses_of(task)["soft_targets"]
        trained = [p for p in task.trained.parameters() if p.requires_grad]
        found.append((loss.detach(), *torch.autograd.grad(loss, trained)))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_options_change_the_loss(digits):
    """Each reaches the operator."""
    kinds = [
        {},
        *({"divergence": kind} for kind in cli.DIVERGENCES[1:]),
        {"mixture": "geometric"},
        {"temperature": 1.0},
    ]
    found = {losses_of(task_of(Config(soft_targets=1.0, **kind), digits)[0])["soft_targets"].item() for kind in kinds}
    assert len(found) == len(kinds)


# Whole runs


def test_a_run_with_them_alone_reports_them(tmp_path, capsys):
    assert run_here(*SHORT, *ALONE, "--out", tmp_path) == cli.DONE
    assert "100 labels, and the teachers' soft targets of the other images" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert rows["distilled"]["trained_parameters"] == rows["student"]["trained_parameters"] == 3466
    assert report["config"]["soft_targets"] == 1.0 and report["config"]["alignment_weight"] == 0.0
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert all(
        {"cross_entropy", "soft_targets"} < row.keys() and "alignment" not in row for row in records["distilled"]
    )
    assert not any("soft_targets" in row for task in (*TEACHERS[:2], "student") for row in records[task])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_both_parts_are_in_the_metrics(uninterrupted):
    for row in metrics.read(uninterrupted / "metrics.jsonl")["distilled"]:
        sum_of_parts = row["cross_entropy"] + 10 * row["alignment"] + 0.5 * row["soft_targets"]
        assert row["loss"] == pytest.approx(sum_of_parts, rel=1e-6)


def test_killed_while_distilling_and_resumed_gives_the_same_bits(uninterrupted, tmp_path):
    moment = random.randint(95, SHORT_STEPS - 8)
    process = start(*SHORT, *SOFT, "--out", tmp_path)
    while lines_of(tmp_path) < moment and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code, _, errors = finish(process)
    assert code == -signal.SIGKILL, f"it ended before it could be killed at line {moment}: {errors}"
    assert run_here(*SHORT, *SOFT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


@pytest.mark.parametrize(
    "changed, message",
    [
        (("--soft-targets", "0"), "soft_targets was 0.5 and is now 0.0"),
        (("--alignment-weight", "1"), "alignment_weight was 10.0 and is now 1.0"),
        (("--temperature", "2"), "temperature was 3.0 and is now 2.0"),
        (("--divergence", "tvd"), "divergence was 'jsd' and is now 'tvd'"),
        (("--mixture", "arithmetic"), "mixture was 'geometric' and is now 'arithmetic'"),
    ],
)
def test_resuming_with_others_is_refused(uninterrupted, capsys, changed, message):
    before = final_state(uninterrupted)
    assert run_here(*SHORT, *SOFT, *changed, "--out", uninterrupted, "--resume") == cli.REFUSED
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
    assert_same_bits(final_state(uninterrupted), before)


@needs_accelerated
@pytest.mark.parametrize("rank", ["0", "4"])
def test_compare_is_within_budget_unless_they_are_wrong(tmp_path, monkeypatch, capsys, rank):
    compared = (*QUICK, *ALONE, "--lora-rank", rank, "--compare")
    assert run_here(*compared, "--out", tmp_path / "right") == cli.DONE
    assert "within the budget" in capsys.readouterr().out
    right = kd.linear_distillation_loss

    def one_per_mille_off(*arguments, backend, **options):
        return right(*arguments, backend=backend, **options) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(kd, "linear_distillation_loss", one_per_mille_off)
    assert run_here(*compared, "--out", tmp_path / "wrong") == cli.OVER_BUDGET
    assert "ABOVE the budget" in capsys.readouterr().out


# The command line


@needs_accelerated
def test_compare_refuses_the_divergence_whose_gradient_jumps(tmp_path, capsys):
    assert run_here(*QUICK, *ALONE, "--divergence", "tvd", "--compare", "--out", tmp_path) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "--compare cannot judge --divergence tvd" in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_to_distil_is_refused(tmp_path, capsys):
    assert run_here(*SHORT, "--alignment-weight", "0", "--out", tmp_path) == cli.REFUSED
    errors = capsys.readouterr().err
    assert "so nothing is distilled: one must be above 0" in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value, message",
    [
        *((option, "-1", "-1 is too small, must be at least 0") for option in ("--soft-targets", "--alignment-weight")),
        *((option, "inf", "inf is too large, must be at most") for option in ("--soft-targets", "--temperature")),
        *((option, "nan", "nan is too small") for option in ("--soft-targets", "--temperature")),
        ("--soft-targets", "all", "'all' is no number"),
        ("--temperature", "0", "0 is too small, must be above 0"),
        ("--divergence", "kl", "invalid choice: 'kl'"),
        ("--mixture", "sum", "invalid choice: 'sum'"),
    ],
)
def test_bad_options_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_here(option, value)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_tells_of_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_here("--help")
    text = capsys.readouterr().out
    for option in ("--soft-targets", "--alignment-weight", "--temperature", "--divergence", "--mixture"):
        assert option in text
