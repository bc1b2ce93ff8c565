"""kdtrainer compress: its data, schedule, reductions and regulariser. Whole runs are tested beside this."""

import copy
import gzip
import struct
import types
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from compressing import TINY, compress, progress_of, quietly
from trainer import one_thread, path_of  # noqa: F401 a fixture

import kdkernels as kd
from kdtrainer import checkpoint, cli, data
from kdtrainer.compress import reductions, sequences, training
from kdtrainer.compress.config import Config
from kdtrainer.errors import RunError
from kdtrainer.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

ALONE = (*TINY, "--compare", "")


# Data


@pytest.mark.parametrize("length", [16, 64, 784])
def test_digits_are_sequences_of_pixels(length):
    found, images = sequences.load("digits", length), data.load(1, seed=0)
    assert found.train.shape == (len(images.train_images), length, 1) and found.classes == 10
    assert found.test.shape == (len(images.test_images), length, 1)
    assert torch.equal(found.test_labels, images.test_labels) and found.train.dtype == torch.float32
    assert found.train.mean().abs() < 1e-4 and abs(found.train.std() - 1) < 1e-4
    if length == 64:
        scaled = (images.test_images - images.train_images.mean()) / images.train_images.std()
        torch.testing.assert_close(found.test.squeeze(-1), scaled)


@pytest.mark.parametrize("length", [1, 63])
def test_digits_have_no_other_lengths(length):
    with pytest.raises(RunError, match=f"--length is {length}, but must be the square of a whole number"):
        sequences.load("digits", length)


def arrays(*shape, train=6, test=4, kind=np.uint8):
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 200, (train, *shape)).astype(kind),
        "y_train": np.arange(train) % 3,
        "x_test": draw.integers(0, 255, (test, *shape)).astype(kind),
        "y_test": np.arange(test) % 2,
    }


@pytest.mark.parametrize("kind", [np.uint8, np.float64, ">f4", ">u2"])
@pytest.mark.parametrize("shape, as_sequence", [((9,), (9, 1)), ((3, 5), (15, 1)), ((3, 5, 3), (15, 3))])
def test_files_of_the_users_own(tmp_path, shape, as_sequence, kind):
    """Row by row, and standardised by the training set alone."""
    given, path = arrays(*shape, kind=kind), tmp_path / "own.npz"
    np.savez(path, **given)
    found = sequences.load(str(path), 784)
    assert found.train.shape == (6, *as_sequence) and found.test.shape == (4, *as_sequence) and found.classes == 3
    assert found.train_labels.tolist() == [0, 1, 2, 0, 1, 2] and found.test_labels.tolist() == [0, 1, 0, 1]
    x = given["x_train"].astype(np.float64)
    for ours, key in ((found.train, "x_train"), (found.test, "x_test")):
        expected = (given[key].astype(np.float64) - x.mean()) / x.std(ddof=1)
        torch.testing.assert_close(ours.double().flatten(), torch.from_numpy(expected).flatten(), rtol=1e-5, atol=1e-5)
    given["x_test"] = given["x_test"] // 2
    np.savez(path, **given)
    again = sequences.load(str(path), 784)
    assert torch.equal(again.train, found.train) and not torch.equal(again.test, found.test)


def test_inputs_that_are_all_the_same_are_no_numbers_without_end(tmp_path):
    given = arrays(5) | {"x_train": np.full((6, 5), 7)}
    np.savez(tmp_path / "same.npz", **given)
    found = sequences.load(str(tmp_path / "same.npz"), 784)
    assert not found.train.any() and found.test.isfinite().all()
    np.savez(tmp_path / "one.npz", x_train=[[7]], y_train=[0], x_test=[[8]], y_test=[0])
    found = sequences.load(str(tmp_path / "one.npz"), 784)
    assert found.train.item() == 0 and found.test.item() == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"y_test": None}, "has no array 'y_test': it must have x_train, y_train, x_test, y_test"),
        ({"x_train": np.array([None, 1], dtype=object)}, "is no .npz file of arrays: Object arrays"),
        ({"x_train": np.array(["a"])}, "x_train of .* holds <U1, but must hold numbers"),
        ({"y_train": np.arange(6) > 2}, "y_train of .* holds bool, but must hold numbers"),
        ({"x_train": np.zeros((0, 5))}, "x_train of .* is empty"),
        ({"x_test": np.full((4, 5), np.nan)}, "x_test of .* holds numbers that are not finite"),
        ({"y_test": np.array([0, 1, np.inf, 1])}, "y_test of .* holds numbers that are not finite"),
        ({"x_train": np.zeros(6)}, r"x_train of .* has shape \(6,\), but must be \(N, T\), \(N, H, W\) or"),
        ({"x_train": np.zeros((6, 1, 2, 3, 4))}, r"x_train of .* has shape \(6, 1, 2, 3, 4\), but must be"),
        ({"x_test": np.zeros((4, 6))}, r"x_test of .* has shape \(4, 6\), but must be \(N, 5\)"),
        ({"x_test": np.zeros((4, 5, 1))}, r"x_test of .* has shape \(4, 5, 1\), but must be \(N, 5\)"),
        ({"y_train": np.arange(5)}, "y_train of .* has 5 labels for 6 inputs"),
        ({"y_test": np.zeros((4, 2))}, "y_test of .* has 8 labels for 4 inputs"),
        ({"y_train": np.arange(6) / 2}, "y_train of .* must hold whole numbers from 0 on"),
        ({"y_test": np.array([0, 1, -1, 1])}, "y_test of .* must hold whole numbers from 0 on"),
        ({"y_train": np.array([0, 1, 10**9, 1, 2, 0])}, "y_train of .* has the label 1000000000, but must have less"),
        ({"x_train": np.full((6, 5), 1e300)}, "x_train of .* holds numbers that are not finite"),
        ({"x_train": np.full((6, 5), 3e38) * np.array([1, -1, 1, -1, 1])}, "x_train of .* cannot be scaled by x_train"),
    ],
)
def test_a_wrong_data_file_is_told_what_is_wrong(tmp_path, capsys, changes, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **{key: value for key, value in (arrays(5) | changes).items() if value is not None})
    with pytest.raises(RunError, match=message):
        sequences.load(str(path), 784)
    assert compress(*ALONE, "--data", path, "--out", tmp_path / "out") == cli.REFUSED
    assert "wrong.npz" in capsys.readouterr().err and not (tmp_path / "out").exists()


def npy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def corrupt(path, where=0.5):
    np.savez_compressed(path, **arrays(50, train=60))
    content = bytearray(path.read_bytes())
    for k in range(40):
        content[int(len(content) * where) + k] ^= 0xA5
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"no zip at all"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\3\4 cut"),
        npy,
        corrupt,
        lambda path: corrupt(path, 0.1),
    ],
)
def test_what_is_no_file_of_arrays_is_said_to_be_none(tmp_path, make):
    make(tmp_path / "a.npz")
    with pytest.raises(RunError, match=r"a\.npz is no \.npz file of arrays: ."):
        sequences.load(str(tmp_path / "a.npz"), 784)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "a.npz"), "mnist"):
        with pytest.raises(RunError, match=f"--data is '{name}', but must be digits, fashion-mnist or a .npz file"):
            sequences.load(name, 784)


# Fashion-MNIST


def idx(array, kind=0x08):
    return gzip.compress(struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four tiny files, as `dpkg -L` lists it."""
    given = arrays(28, 28)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, array in zip(names, given.values(), strict=True):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(idx(array.astype(np.uint8)))
    listed = "\n".join(["/.", "/usr/share/doc/README.gz", *map(str, sorted(tmp_path.iterdir()))])
    asked = []

    def run(command, **_):
        asked.append(command)
        return types.SimpleNamespace(stdout=listed, returncode=0)

    monkeypatch.setattr(sequences.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sequences.subprocess, "run", run)
    return types.SimpleNamespace(folder=tmp_path, given=given, asked=asked)


@pytest.mark.filterwarnings("error")
def test_fashion_mnist_is_found_by_dpkg(package):
    found = sequences.load("fashion-mnist", 784)
    assert package.asked == [["dpkg", "-L", "dataset-fashion-mnist"]]
    np.savez(package.folder / "same.npz", **package.given)
    expected = sequences.load(str(package.folder / "same.npz"), 784)
    assert found.train.shape == (6, 784, 1)
    for name in ("train", "train_labels", "test", "test_labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        b"",
        idx(np.zeros((6, 28, 28), np.uint8))[:-20],
        gzip.compress(b"\0\0"),
        gzip.compress(b"\1\0\x08\1\0\0\0\1x"),
        gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 6, 28, 28) + b"too short"),
        gzip.compress(struct.pack(">4BI", 0, 0, 8, 3, 6)),
        idx(np.zeros((6, 28, 28), np.float32), kind=0x0D),
        b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 40,
    ],
    ids=range(9),  # the contents hold the time, and the names of tests must not
)
def test_a_bad_idx_file_is_named(package, content):
    (package.folder / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(RunError, match=r"t10k-images-idx3-ubyte\.gz cannot be read: ."):
        sequences.load("fashion-mnist", 784)


def test_a_file_of_the_package_that_is_gone_is_named(package):
    (package.folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(RunError, match=r"train-labels-idx1-ubyte\.gz cannot be read: .*No such file"):
        sequences.load("fashion-mnist", 784)


@pytest.mark.parametrize("dpkg", [None, "/usr/bin/dpkg"])
def test_a_missing_package_is_named(monkeypatch, dpkg):
    monkeypatch.setattr(sequences.shutil, "which", lambda name: dpkg)
    monkeypatch.setattr(sequences.subprocess, "run", lambda *a, **o: types.SimpleNamespace(stdout="", returncode=1))
    with pytest.raises(RunError, match=r"train-images.* is not here: apt-get install dataset-fashion-mnist, or give"):
        sequences.load("fashion-mnist", 784)


# Schedule


@pytest.mark.parametrize(
    "steps, share, count, expected",
    [
        (1000, 0.1, 4, [25, 50, 75, 100]),
        (24, 0.6, 4, [4, 7, 11, 14]),
        (10, 0.1, 4, [1]),
        (100, 1.0, 3, [33, 67, 100]),
        (100, 0.5, 1, [50]),
    ],
)
def test_reductions_are_equidistant_within_their_share(steps, share, count, expected):
    assert Config(steps=steps, reduction_share=share, reductions=count).reduction_steps() == expected


def test_the_rate_rises_and_then_follows_half_a_cosine():
    config = Config(steps=100, warm_up=0.1)
    assert [config.rate(step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.rate(55) == pytest.approx(0.5) and config.rate(100) == pytest.approx(0.0)
    rates = [config.rate(step) for step in range(10, 101)]
    assert all(a > b for a, b in pairwise(rates))
    assert Config(steps=100, warm_up=0.0).rate(1) == 1.0


def test_every_epoch_visits_every_index_once_in_an_order_of_its_own():
    config = Config(batch=5)
    epochs = [torch.cat([training.batch_of(20, config, 4 * e + k) for k in (1, 2, 3, 4)]) for e in range(2)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(20))
    assert not torch.equal(*epochs)
    assert not torch.equal(training.batch_of(20, config, 1), training.batch_of(20, replace(config, seed=1), 1))
    other = replace(config, states=3, tolerance=0.5, learning_rate=1.0, reductions=1, moments="reset")
    assert torch.equal(training.batch_of(20, config, 7), training.batch_of(20, other, 7)), "not what a model is"
    assert training.batch_of(3, config, 9).sort().values.tolist() == [0, 1, 2]


def test_processes_share_a_batch():
    shares = [Ranks(rank, 3).share(torch.arange(9)) for rank in range(3)]
    assert all(len(x) == 3 for x in shares) and torch.cat(shares).sort().values.tolist() == list(range(9))


def small_data(steps=8):
    torch.manual_seed(0)
    return sequences.Sequences(
        torch.randn(12, steps, 1), torch.arange(12) % 3, torch.randn(6, steps, 1), torch.zeros(6)
    )


def test_the_same_sizes_start_with_the_same_weights():
    config, given = Config(features=4), small_data()
    first = training.build(config, given, [6, 6]).state_dict()
    torch.manual_seed(77)
    torch.rand(5)
    again = training.build(replace(config, tolerance=0.5), given, [6, 6]).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = training.build(replace(config, seed=1), given, [6, 6]).state_dict()
    assert not torch.equal(first["blocks.0.lru.nu_log"], other["blocks.0.lru.nu_log"])


def test_recurrences_learn_more_slowly_and_do_not_decay():
    config = Config(features=4, ssm_rate_factor=0.3, weight_decay=0.07)
    model = training.build(config, small_data(), [6])
    own, others = training.optimizer_of(model, config).param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in model.blocks[0].lru.parameters()}
    assert len(own["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert (own["factor"], own["weight_decay"], others["factor"], others["weight_decay"]) == (0.3, 0.0, 1.0, 0.07)


# Reductions


def test_pruning_keeps_the_states_that_it_says():
    config, sizes = Config(features=4), {5: [3]}
    for which in ("random", "smallest", "modal"):
        model = training.build(config, small_data(), [8])
        lru = model.blocks[0].lru
        radii, worth = lru.eigenvalues().detach().abs(), reductions.alone(lru)
        before = {name: p.detach().clone() for name, p in lru.named_parameters()}
        reductions.keeping(which, config, sizes)(model, training.optimizer_of(model, config), 5)
        kept = (before["nu_log"].unsqueeze(0) == lru.nu_log.detach().unsqueeze(1)).nonzero()[:, 1]
        assert len(kept) == 3 and model.states == [3]
        assert torch.equal(lru.B_re, before["B_re"][kept]) and torch.equal(lru.C_im, before["C_im"][:, kept])
        if which == "smallest":
            assert set(kept.tolist()) == set(worth.argsort()[:3].tolist())
        if which == "modal":
            assert set(kept.tolist()) == set(radii.argsort()[-3:].tolist())


def test_a_state_alone_is_worth_its_hankel_singular_value():
    lru = training.build(Config(features=4), small_data(), [5]).double().blocks[0].lru
    Lambda, B, C = (x.detach() for x in lru.system())
    for i, worth in enumerate(reductions.alone(lru)):
        one = kd.hankel_singular_values(Lambda[i : i + 1], B[i : i + 1], C[:, i : i + 1])
        torch.testing.assert_close(worth, one[0])


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two layers, the model before and after each reduction, and a checkpoint from just before it."""
    out = tmp_path_factory.mktemp("watched")
    right, events = kd.nn.truncate, []

    def truncate(model, optimizer=None, **options):
        path = out / f"before{len(events)}.safetensors"
        checkpoint.save(path, model, optimizer, Config(), types.SimpleNamespace())
        before = copy.deepcopy(model)
        events.append((path, before, right(model, optimizer, **options), copy.deepcopy(model)))
        return events[-1][2]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kd.nn, "truncate", truncate)
        quietly(*ALONE, "--blocks", "2", "--reductions", "3", "--out", out)
    return out, events


def test_singular_values_found_in_training_are_those_of_the_checkpoint(watched):
    out, events = watched
    path = path_of(out, "seed0-compressed")
    spectra, found = checkpoint.extra(path), progress_of(out, "seed0-compressed").reductions
    assert len(spectra) == 2 * len(events) == 2 * len(found) == 6
    given = sequences.load("digits", 16)
    for (saved, *_), event in zip(events, found, strict=True):
        config = Config(features=4, blocks=2)
        model = training.build(config, given, event["before"])
        model.load_state_dict(checkpoint.weights(saved))
        for i, layer in enumerate(training.layers_of(model.double())):
            ours, expected = spectra[f"{event['step']}.{i}"], kd.hankel_singular_values(*layer.system()).detach()
            assert ours.dtype == torch.float64 and len(ours) == event["before"][i]
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected[0]))
            total, r = ours.sum(), event["states"][i]
            if r < len(ours):
                assert ours[:r].sum() >= 0.8 * total * (1 - 1e-12) and ours[: r - 1].sum() < 0.8 * total


def layer_inputs(model, data):
    """What each recurrence sees of the data."""
    seen, model = [], copy.deepcopy(model).double().eval()
    for layer in training.layers_of(model):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(data.double())
    return seen


def test_outputs_are_off_by_no_more_than_the_certificate(watched):
    """Of each layer, over time, on its real inputs and on random ones."""
    found, given, tight = progress_of(watched[0], "seed0-compressed").reductions, sequences.load("digits", 16), 0
    for (_, before, truncation, after), event in zip(watched[1], found, strict=True):
        assert event["error_bounds"] == [layer.error_bound for layer in truncation.layers]
        pairs = zip(*(training.layers_of(copy.deepcopy(model).double()) for model in (before, after)), strict=True)
        with torch.no_grad():
            seen = layer_inputs(before, given.test[:200])
            for (x, y), inputs, bound in zip(pairs, seen, event["error_bounds"], strict=True):
                assert (bound > 0) == (x.states > y.states)
                for u in (inputs, torch.randn(50, 400, 4, dtype=torch.float64)):
                    moved = (x(u) - y(u)).flatten(1).norm(dim=1)
                    assert (moved <= bound * u.flatten(1).norm(dim=1) * (1 + 1e-9)).all()
                    tight = max(tight, float((moved / u.flatten(1).norm(dim=1)).max() / bound) if bound else 0)
    assert 0.01 < tight <= 1, "a bound that nothing comes near says nothing"


def test_truncation_after_training_leaves_the_trained_model_alone():
    config, given = Config(features=4), small_data()
    model = training.build(config, given, [8])
    progress = training.Progress(1, 0, 0.0, 0.0, 0.0, [8], [], [])
    small = reductions.after_training(training.Trained("uncompressed", model, progress, {}), [3])
    assert small.states == [3] and model.states == [8]
    expected = copy.deepcopy(model)
    kd.nn.truncate(expected, ranks=3)
    assert all(map(torch.equal, small.parameters(), expected.parameters()))
    assert reductions.after_training(training.Trained("uncompressed", model, progress, {}), [9]).states == [8]


# The regulariser


def test_the_regularizer_is_the_sum_over_all_layers():
    model = training.build(Config(features=4), small_data(), [5, 7])
    values = [kd.hankel_singular_values(*layer.system()) for layer in training.layers_of(model)]
    torch.testing.assert_close(training.regularizer(model, "nuclear"), sum(v.sum() for v in values))
    torch.testing.assert_close(training.regularizer(model, "energy"), sum(v.square().sum() for v in values))
    training.regularizer(model, "energy").backward()
    assert all(layer.C_re.grad.any() for layer in training.layers_of(model))


def test_a_regularizer_makes_less_of_what_it_weighs(tmp_path, capsys):
    options = (*ALONE, "--tolerance", "0", "--learning-rate", "0.05")  # all states stay
    quietly(*options, "--out", tmp_path / "none")
    for kind in ("nuclear", "energy"):
        printed = quietly(*options, "--hsv-regularizer", kind, "--hsv-weight", "1", "--out", tmp_path / kind)
        assert f"The {kind} regulariser and its gradient took " in printed
        progress = progress_of(tmp_path / kind, "seed0-compressed")
        assert 0 < progress.regularizing < progress.seconds and progress.states == [10]
    given, ends = sequences.load("digits", 16), {}
    for name in ("none", "nuclear", "energy"):
        model = training.build(Config(features=4), given, [10])
        model.load_state_dict(checkpoint.weights(path_of(tmp_path / name, "seed0-compressed")))
        ends[name] = {kind: training.regularizer(model, kind).item() for kind in ("nuclear", "energy")}
    for kind in ("nuclear", "energy"):
        assert ends[kind][kind] < 0.7 * ends["none"][kind]
    assert progress_of(tmp_path / "none", "seed0-compressed").regularizing == 0
    assert compress(*options, "--hsv-regularizer", "energy", "--resume", "--out", tmp_path / "none") == cli.REFUSED
    assert "hsv_regularizer was None and is now 'energy'" in capsys.readouterr().err
