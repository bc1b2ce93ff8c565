"""`python -m kdtrainer whisper-step`, with a toy in the place of Whisper tiny."""

import json
import os

import pytest
import torch
from conftest import ROOT

pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn

import kdkernels as kd
from kdkernels.integrations import peft as integration
from kdkernels.integrations.peft import AcceleratedLinear
from kdkernels.nn import projection_alignment
from kdtrainer import cli
from kdtrainer.config import PHASES, StepConfig
from kdtrainer.whisper import cohort, step
from kdtrainer.whisper import pair as whisper

TOY = whisper.Shape("toy", 16, 2, 1, 2, 32, 50, 4, 12, 5, 2, 0.1)
SMALL = ("--threads", "1", "--batch", "2", "--dimension", "32", "--steps", "2")

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(whisper, "TINY_EN", TOY)


def run_here(*arguments):
    return cli.main(["whisper-step", *map(str, arguments)])


def joined(text):
    """Without the line breaks of the terminal."""
    return " ".join(text.split())


@pytest.mark.native
def test_both_ways_train_the_same_and_everything_is_told(toy, tmp_path, capsys):
    assert run_here(*SMALL, "--out", tmp_path) == cli.DONE
    text = joined(capsys.readouterr().out)
    for told in (*PHASES, "step", step.EAGER, step.OURS, "D = 32, 1 threads", "within the budget of 0.0001"):
        assert told in text
    assert "The products of both heads are part of the soft targets, not of the forward passes" in text
    assert "Medians of 2 steps" in text and "left to PEFT" not in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["compare"]["within_budget"] and 0 <= found["compare"]["loss"] <= 1e-4
    assert found["left_to_peft"] == [] and found["shape"]["width"] == 16
    for way in (step.EAGER, step.OURS):
        assert found["checked_losses"][way] == [sum(parts.values()) for parts in found["checked_parts"][way]]
        assert len(found["checked_losses"][way]) == step.CHECKED_STEPS and len(found["losses"][way]) == 2
        assert found["median_seconds"][way].keys() == {"step", *PHASES}
        assert all(seconds > 0 for seconds in found["median_seconds"][way].values())
    medians = found["median_seconds"]
    assert found["ratio"] == medians[step.EAGER]["step"] / medians[step.OURS]["step"]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "| **step** |" in (tmp_path / "report.md").read_text()
    assert cli.main(["report", str(tmp_path)]) == cli.DONE
    assert joined(capsys.readouterr().out) == text


@pytest.mark.native
def test_students_together_learn_what_each_learns_in_turn(toy, tmp_path, monkeypatch, capsys):
    right, calls = kd.lora_linear_group, []

    def counted(x, layers, **options):
        calls.append(len(layers))
        return right(x, layers, **options)

    monkeypatch.setattr(kd, "lora_linear_group", counted)
    assert run_here(*SMALL, "--students", 3, "--out", tmp_path) == cli.DONE
    found = json.loads((tmp_path / "report.json").read_text())["students"]
    assert found["count"] == 3 and found["within_budget"] and found["in_turn"] > 0 and found["together"] > 0
    assert found["ratio"] == found["in_turn"] / found["together"]
    assert calls == [9, 9] * 3, "q, k and v of three students, of encoder and decoder, in a step that warms up and two"
    assert "3 students on one base, without dropout" in joined(capsys.readouterr().out)


@pytest.mark.native
def test_a_student_with_anothers_layer_is_noticed(toy, tmp_path, monkeypatch):
    right = kd.lora_linear_group
    monkeypatch.setattr(kd, "lora_linear_group", lambda x, layers: right(x, layers)[::-1])
    assert run_here(*SMALL, "--students", 2, "--out", tmp_path) == cli.OVER_BUDGET
    assert not json.loads((tmp_path / "report.json").read_text())["students"]["within_budget"]


def test_a_student_before_the_first_is_refused(toy):
    pair = whisper.build(TOY, 32, seed=0)
    first, second = cohort.siblings(pair, [1])
    cohort.share_first_layers([first.student, second.student])
    with pytest.raises(RuntimeError, match="student 1 was run before the first of its cohort"):
        whisper.states(second.adapted(), whisper.batch(TOY, 2, seed=0))


@pytest.mark.native
def test_json_is_the_report(toy, tmp_path, capsys):
    assert run_here(*SMALL, "--out", tmp_path, "--json") == cli.DONE
    assert capsys.readouterr().out == (tmp_path / "report.json").read_text()


@pytest.mark.native
def test_a_budget_that_rounding_exceeds(toy, tmp_path, capsys):
    assert run_here(*SMALL, "--out", tmp_path, "--budget", "0") == cli.OVER_BUDGET
    assert "ABOVE the budget of 0" in joined(capsys.readouterr().out)


def per_mille_off_loss(monkeypatch):
    right = projection_alignment.projection_alignment_loss

    def wrong(*arguments, backend, **options):
        return right(*arguments, backend=backend, **options) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(projection_alignment, "projection_alignment_loss", wrong)


def per_mille_off_soft_targets(monkeypatch):
    right = kd.linear_distillation_loss
    monkeypatch.setattr(kd, "linear_distillation_loss", lambda *a, **options: 1.001 * right(*a, **options))


def per_cent_off_adapters(monkeypatch):
    right = integration.lora_linear
    monkeypatch.setattr(integration, "lora_linear", lambda *a, scaling, **o: right(*a, scaling=1.01 * scaling, **o))


@pytest.mark.native
@pytest.mark.parametrize("mistake", [per_mille_off_loss, per_mille_off_soft_targets, per_cent_off_adapters])
def test_a_wrong_kernel_is_over_the_budget(mistake, toy, tmp_path, monkeypatch, capsys):
    mistake(monkeypatch)
    assert run_here(*SMALL, "--out", tmp_path) == cli.OVER_BUDGET
    assert "ABOVE the budget" in joined(capsys.readouterr().out)


@pytest.mark.native
def test_each_way_is_what_it_says():
    """PEFT's own layers and the reference on one side, ours on the other, from the same weights."""
    ways, left = step.both_ways(StepConfig(dimension=32), TOY)
    eager, ours = (ways[name].pair for name in (step.EAGER, step.OURS))
    layers = [[m for m in pair.student.modules() if isinstance(m, integration.Linear)] for pair in (eager, ours)]
    assert not left and len(layers[0]) == len(layers[1]) == 16  # six of the encoder's layer, ten of the decoder's
    assert {type(m) for m in layers[0]} == {integration.Linear} and {type(m) for m in layers[1]} == {AcceleratedLinear}
    targets = [ways[name].soft_targets for name in (step.EAGER, step.OURS)]
    assert targets == [step.soft_targets_of_logits, step.soft_targets_of_states]
    assert (eager.aligner.backend, ours.aligner.backend) == ("reference", "auto")
    theirs = eager.trained()
    assert ours.trained().keys() == theirs.keys()
    for name, parameter in ours.trained().items():
        assert parameter is not theirs[name] and parameter.equal(theirs[name])
        assert ".lora_" in name or name.startswith("aligner.")
    ours.set_dropout(0.25)
    dropouts = [m for m in ours.student.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 16 and {m.p for m in dropouts} == {0.25}


def test_the_student_is_the_teachers_first_layers():
    pair = whisper.build(TOY, 32, seed=0)
    teacher, base = pair.teacher.state_dict(), pair.student.get_base_model().state_dict()
    for name, value in base.items():
        if "lora_" not in name:
            assert value.equal(teacher[name.replace(".base_layer", "")]), name
    assert {len(pair.student.get_base_model().get_encoder().layers), len(pair.teacher.get_encoder().layers)} == {1, 2}


def test_states_are_those_of_the_whole_models_and_no_logits_are_made():
    """The student's through PEFT, too; the head is the embedding."""
    pair, batch = whisper.build(TOY, 32, seed=0), whisper.batch(TOY, 2, seed=0)
    pair.set_dropout(0.0)
    inputs = {"input_features": batch.features, "decoder_input_ids": batch.tokens}
    for whole, model in ((pair.teacher, pair.teacher), (pair.student, pair.adapted())):
        wanted = whole(**inputs)
        hook = model.proj_out.register_forward_hook(lambda *_: pytest.fail("logits were made"))
        states = whisper.states(model, batch)
        hook.remove()
        assert states.encoder.equal(wanted.encoder_last_hidden_state)
        torch.testing.assert_close(states.decoder @ whisper.head(model).T, wanted.logits)
        assert model.proj_out.bias is None and whisper.head(model) is model.get_input_embeddings().weight
        assert not whisper.head(model).requires_grad


@pytest.mark.parametrize("soft_targets", [step.soft_targets_of_logits, step.soft_targets_of_states])
def test_a_step_has_the_gradients_of_one_backward(monkeypatch, soft_targets):
    pair, batch = whisper.build(TOY, 32, seed=0), whisper.batch(TOY, 2, seed=0)
    pair.set_dropout(0.0)
    trained = pair.trained()
    inputs = {"input_features": batch.features, "decoder_input_ids": batch.tokens}
    teacher, student = pair.teacher(**inputs), pair.student(**inputs)
    alignment = pair.aligner([student.encoder_last_hidden_state], [teacher.encoder_last_hidden_state])
    targets = divergence(student.logits, teacher.logits)
    wanted = torch.autograd.grad(alignment + targets, list(trained.values()))
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    monkeypatch.setattr(optimizer, "step", lambda: None)
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    found, seconds = step.train(step.Way(pair, optimizer, soft_targets), batch)
    assert found == pytest.approx({"alignment": alignment.item(), "soft targets": targets.item()}, rel=1e-5)
    assert tuple(seconds) == PHASES
    for parameter, grad in zip(trained.values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
        assert grad.any()


def divergence(student, teacher):
    """T² KL(teacher ‖ student) of logits, the mean over tokens."""
    p, q = ((x / step.TEMPERATURE).softmax(-1) for x in (teacher, student))
    return step.TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("soft_targets", [step.soft_targets_of_logits, step.soft_targets_of_states])
def test_soft_targets_are_the_divergence_at_a_temperature(soft_targets):
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 4)
    student_head, teacher_head = torch.randn(7, 5), torch.randn(7, 4)
    found = soft_targets(student, student_head, teacher, teacher_head)
    wanted = divergence(student @ student_head.T, teacher @ teacher_head.T)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, wanted)))


def test_nothing_to_compare_is_refused(toy, tmp_path, capsys):
    with kd.use_backend("reference"):
        assert run_here(*SMALL, "--out", tmp_path) == cli.REFUSED
    assert "there is nothing to compare" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--steps", "--batch", "--dimension"])
@pytest.mark.parametrize("value, message", [("0", "0 is too small, must be at least 1"), ("x", "'x' is no number")])
def test_bad_options_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_here(option, value)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_missing_packages_are_named_with_their_extra(monkeypatch, capsys):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("peft", "transformers") else found(name))
    assert run_here() == cli.REFUSED
    message = "kdtrainer: transformers and peft must be installed: pip install 'kdkernels[whisper]'\n"
    assert capsys.readouterr().err == message


def test_digits_needs_neither_transformers_nor_peft(python, environment):
    program = "import sys; sys.modules['peft'] = sys.modules['transformers'] = None; import kdtrainer.digits"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    python(environment | {"PYTHONPATH": paths}, "-c", program, check=True)
