"""`kd.nn.truncate` and `keep_states`: certificate, ranks, what is stored, optimisers, errors."""

import copy
import math
from math import pi

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import kdkernels as kd
from kdkernels.nn import LRU, LRUClassifier, keep_states, truncate
from kdkernels.nn.moments import Basis, Transport
from kdkernels.nn.replacing import NAMES
from kdkernels.nn.truncation import stored
from kdkernels.ops.hankel.truncation import BalancedTruncation
from kdkernels.testing.hankel.inputs import frequency_response

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3, initial_accumulator_value=0.25),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def classifier(states=16, blocks=2, features=4, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return LRUClassifier(3, features, states, 5, blocks=blocks, dtype=dtype, min_radius=0.3, max_radius=0.99, **options)


def layers(model):
    return [x for x in model.modules() if isinstance(x, LRU)]


def steps(model, optimizer, count=3, seed=0):
    """Train; the losses."""
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(16, 12, 3, dtype=dtype), torch.randint(5, (16,))
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wide_system(layer):
    """Λ, γB and C in float64, of the parameters as they are."""
    with torch.no_grad():
        return copy.deepcopy(layer).double().system()


def circle(*poles):
    """A dense grid of |z| = 1, with points packed around the angle of every pole."""
    grid = [torch.linspace(-pi, pi, 300, dtype=torch.float64)]
    for pole in torch.cat(poles):
        near = (1 - pole.abs()).clamp(1e-8) * torch.tensor([-10, -3, -1, -0.3, 0, 0.3, 1, 3, 10], dtype=torch.float64)
        grid.append(pole.angle() + near)
    return torch.polar(torch.ones(()).double(), torch.cat(grid))


def gain_between(before, after):
    """The largest ‖G(z) − G_r(z)‖ on the circle."""
    z = circle(before[0], after[0])
    return torch.linalg.matrix_norm(frequency_response(*before, z) - frequency_response(*after, z), 2).max().item()


def output(system, u):
    """y = Re(Ch) of (N, T, H), step by step, in float64; then 400 steps more without input."""
    Lambda, B, C = system
    h = torch.zeros(len(u), len(Lambda), dtype=torch.complex128)
    outputs = []
    for x in [*u.double().unbind(1), *[torch.zeros(len(u), u.shape[-1]).double()] * 400]:
        h = Lambda * h + x.to(B.dtype) @ B.mT
        outputs.append((h @ C.mT).real)
    return torch.stack(outputs, 1)


# ---- the certificate


def data_inputs(model):
    """What the layers of a model see of scikit-learn's digits."""
    images = pytest.importorskip("sklearn.datasets").load_digits().images[:8].reshape(8, 64, 1)
    seen = []
    hooks = [x.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())) for x in layers(model)]
    model(torch.as_tensor(images / 16, dtype=torch.float32).expand(8, 64, 3))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("goal", ({"tolerance": 0.02}, {"tolerance": 0.3}, {"ranks": 5}, {"error": 0.5}))
def test_outputs_change_by_no_more_than_the_certificate(goal):
    tight = 0
    for seed in range(4):
        model = classifier(seed=seed)
        before, data = [wide_system(x) for x in layers(model)], data_inputs(model)
        truncation = truncate(model, **goal)
        after = [wide_system(x) for x in layers(model)]
        for old, new, seen, layer in zip(before, after, data, truncation.layers, strict=True):
            error = gain_between(old, new)
            assert error <= layer.error_bound
            tight += error > 0.2 * layer.error_bound > 0
            for u in (seen, torch.randn(4, 50, 4)):
                change = (output(old, u) - output(new, u)).flatten(1).norm(dim=-1)
                assert (change <= layer.error_bound * u.double().flatten(1).norm(dim=-1)).all()
    assert tight  # a bound that is always far away says nothing


def test_the_certificate_counts_how_parameters_are_stored():
    """A layer that holds a smaller one loses nothing but float32's rounding, which the bound has to cover."""
    torch.manual_seed(1)
    layer = LRU(2, 12, min_radius=0.99, max_radius=0.99999)
    with torch.no_grad():
        for B in (layer.B_re, layer.B_im):
            B[6:] = 0
    before = wide_system(layer)
    (report,) = truncate(layer, ranks=6).layers
    error = gain_between(before, wide_system(layer))
    assert 2 * report.singular_values[6:].sum() < 1e-3 * error and error <= report.error_bound


def test_singular_values_are_those_of_the_saved_parameters(tmp_path):
    model = classifier()
    steps(model, torch.optim.Adam(model.parameters()))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    truncation = truncate(model, tolerance=0.1)
    again = classifier(dtype=torch.float64, seed=1)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    for layer, report in zip(layers(again), truncation.layers, strict=True):
        sigma = kd.hankel_singular_values(*layer.system()).detach()
        torch.testing.assert_close(report.singular_values, sigma, rtol=1e-9, atol=1e-12)


# ---- how many states


def test_error_is_met_and_no_smaller_rank_meets_it():
    for seed in range(3):
        for error in (0.03, 0.5, 4.0):
            model = classifier(seed=seed)
            original = copy.deepcopy(model)
            truncation = truncate(model, error=error)
            assert all(x.error_bound <= error for x in truncation.layers)
            fewer = {x.name: x.states - 1 for x in truncation.layers if x.states > 1}
            less = truncate(original, ranks=fewer)
            assert all(x.error_bound > error for x in less.layers if x.name in fewer)


def test_an_error_below_the_rounding_of_the_parameters_leaves_the_layer_alone():
    model = classifier(states=24)
    before = list(model.parameters())
    assert not truncate(model, error=1e-9).reduced
    assert all(x is y for x, y in zip(before, model.parameters(), strict=True))


def test_the_gate_is_of_each_layer():
    """At 0.95 n and above nothing is done, whatever the other layers do."""
    model = classifier(states=20)
    with torch.no_grad():
        for part in (model.blocks[1].lru.B_re, model.blocks[1].lru.B_im):
            part[5:] *= 1e-3
    sigma = [kd.hankel_singular_values(*wide_system(x)) for x in layers(model)]
    share = sigma[0].cumsum(0) / sigma[0].sum()
    tau = 1 - (share[17] + share[18]).item() / 2  # rank 19 in the first layer
    truncation = truncate(model, tolerance=tau)
    assert truncation.states[0] == 20 and truncation.states[1] < 19 and truncation.reduced
    assert truncation.layers[0].error_bound == 0 and truncation.layers[0].condition == 1
    tau = 1 - (share[16] + share[17]).item() / 2  # rank 18
    assert truncate(model, tolerance=tau).states[0] == 18


@pytest.mark.parametrize(
    ("ranks", "expected"),
    ((7, [7, 7]), ([5, 16], [5, 16]), ((16, 1), [16, 1]), ({"blocks.1.lru": 3}, [16, 3]), ({}, [16, 16])),
)
def test_forms_of_ranks(ranks, expected):
    model = classifier()
    kept = [list(x.parameters()) for x in layers(model)]
    truncation = truncate(model, ranks=ranks)
    assert truncation.states == model.states == expected
    assert truncation.reduced == (expected != [16, 16])
    for layer, before, report in zip(layers(model), kept, truncation.layers, strict=True):
        assert layer.D is before[-1]
        assert all((x is y) == (report.states == 16) for x, y in zip(layer.parameters(), before[:-1], strict=False))
        assert report.states_before == 16 and layer(torch.randn(2, 4, 4)).isfinite().all()


def test_the_report():
    model = LRU(3, 8)
    truncation = truncate(model, ranks=4)
    assert [x.name for x in truncation.layers] == [""]
    assert str(truncation).startswith("model: 8 -> 4 states, error at most ")
    assert not truncation.layers[0].singular_values.requires_grad
    named = truncate(classifier(), ranks=3)
    assert [x.name for x in named.layers] == ["blocks.0.lru", "blocks.1.lru"]
    assert str(named).count("\n") == 1


# ---- what is stored


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_devices_dtypes_flags_and_gradients(dtype):
    model = classifier(dtype=dtype)
    first, second = layers(model)
    first.B_re.requires_grad_(False)
    first.nu_log.requires_grad_(False)
    model(torch.randn(2, 5, 3, dtype=dtype)).sum().backward()
    order = [name for name, _ in model.named_parameters()]
    truncate(model, ranks=[6, 16])
    assert [name for name, _ in model.named_parameters()] == order
    assert all(getattr(first, name).requires_grad == (name not in ("B_re", "nu_log")) for name in NAMES)
    assert all(getattr(first, name).grad is None and getattr(first, name).is_leaf for name in NAMES)
    assert first.D.grad is not None and second.C_im.grad is not None
    assert all(x.dtype is dtype and x.is_contiguous() for x in model.parameters())
    gamma = first.gamma_log.double().exp()
    torch.testing.assert_close(gamma, (1 - wide_system(first)[0].abs() ** 2).sqrt(), rtol=1e-6, atol=0)


def reduced_of(Lambda, bound=0.0):
    """A reduced system with these poles."""
    Lambda = torch.as_tensor(Lambda, dtype=torch.complex128)
    r = len(Lambda)
    B, C = torch.ones(r, 2, dtype=torch.complex128), torch.ones(3, r, dtype=torch.complex128)
    one = torch.ones((), dtype=torch.float64)
    return BalancedTruncation(Lambda, B, C, torch.ones(r + 1).double(), bound * one, one, r, B, C)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_every_pole_can_be_stored(dtype):
    """0, angle 0, negative angles, and |λ| that float32 would round to 1."""
    poles = [0, 0.5, -0.5, 0.9j, -0.9j, 0.99 * torch.exp(torch.tensor(-1e-6j, dtype=torch.complex128)), 1 - 1e-12]
    reduced = reduced_of(poles)
    kept = stored(reduced, dtype)
    values = kept.parameters
    assert all(x.isfinite().all() and x.dtype is dtype for x in values.values())
    Lambda = torch.exp(torch.complex(-values["nu_log"].exp(), values["theta_log"].exp()))
    assert (Lambda.abs() < 1).all()
    tolerance = 2e-6 if dtype is torch.float32 else 2e-8  # of λ = 0
    torch.testing.assert_close(Lambda.to(torch.complex128), reduced.Lambda, rtol=0, atol=tolerance)
    turned = values["theta_log"].exp()
    assert (turned > 1e-3).all() and (turned < 2 * pi + 1e-3).all()  # the gradient of θ_log is not dead
    wide = {name: x.double() for name, x in values.items()}
    error = gain_between(tuple(reduced.__dict__[k] for k in ("Lambda", "B", "C")), Basis(wide).system())
    assert error <= kept.error_bound


def test_gradients_reach_new_parameters_and_training_goes_on():
    for name, make in OPTIMIZERS.items():
        for moments in ("transport", "reset", "slice"):
            model = classifier()
            optimizer = make(model.parameters())
            before = steps(model, optimizer, 6)
            truncate(model, optimizer, ranks=[9, 12], moments=moments)
            after = steps(model, optimizer, 6)
            assert after[-1] < before[0], (name, moments)
            held = {id(x) for group in optimizer.param_groups for x in group["params"]}
            assert held == {id(x) for x in model.parameters()}
            assert set(map(id, optimizer.state)) == held
            for parameter, state in optimizer.state.items():
                shapes = {x.shape for x in state.values() if isinstance(x, torch.Tensor) and x.numel() > 1}
                assert parameter.grad is not None and (name == "Adafactor" or shapes <= {parameter.shape})


def test_saved_models_load_into_the_sizes_reported():
    model = classifier()
    truncation = truncate(model, tolerance=0.2)
    again = classifier(states=truncation.states, seed=3)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 6, 3)
    assert torch.equal(model(x), again(x))


def test_a_shared_layer_is_reduced_once():
    model = classifier()
    model.blocks[1].lru = model.blocks[0].lru
    truncation = truncate(model, torch.optim.Adam(model.parameters()), ranks=[4])
    assert truncation.states == [4] and model.blocks[1].lru is model.blocks[0].lru and model.states == [4, 4]


def test_compiled_models():
    model = classifier()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 6, 3)
    compiled(x)
    truncation = truncate(compiled, ranks={"blocks.0.lru": 5})
    assert truncation.states == [5, 16]
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("moments", ("transport", "reset", "slice"))
def test_the_same_bits_for_every_thread_count(moments):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(1)
        model = classifier(states=120, features=8)
        optimizer = torch.optim.Adam(model.parameters())
        steps(model, optimizer, 2)
        torch.set_num_threads(threads)
        truncate(model, optimizer, tolerance=0.3, moments=moments)
        assert torch.get_num_threads() == threads
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    for state, moved in results[1:]:
        assert all(torch.equal(x, results[0][0][name]) for name, x in state.items())
        assert all(torch.equal(x, results[0][1][i][k]) for i, s in moved.items() for k, x in s.items())


# ---- moments


def padded_layer(seed=0):
    """A layer in float64 with 5 states, and 4 that nothing reaches: rank 5 changes the basis alone."""
    torch.manual_seed(seed)
    layer = LRU(3, 9, min_radius=0.4, max_radius=0.95, dtype=torch.float64)
    with torch.no_grad():
        layer.gamma_log += 0.3 * torch.randn(9)  # as training may have left it
        for B in (layer.B_re, layer.B_im):
            B[[1, 3, 4, 8]] = 0
    return layer


def loss_of(layer, seed=0):
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(4, 20, 3, generator=draw, dtype=torch.float64)
    return (layer(u) * torch.randn(4, 20, 3, generator=draw, dtype=torch.float64)).sum()


def test_transported_gradients_are_those_in_the_new_basis():
    layer = padded_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    before = loss_of(layer)
    before.backward()
    optimizer.step()  # the buffers are the gradients now
    assert truncate(layer, optimizer, ranks=5).layers[0].error_bound < 1e-9
    after = loss_of(layer)
    torch.testing.assert_close(after, before)
    after.backward()
    for name in NAMES:
        parameter = getattr(layer, name)
        moved = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_transported_moments_of_adam_after_one_step():
    """Then v is (1 − β₂) g² and m is (1 − β₁) g: nothing fluctuates, and both are known in the new basis."""
    layer = padded_layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0, betas=(0.8, 0.99))
    loss_of(layer).backward()
    optimizer.step()
    truncate(layer, optimizer, ranks=5)
    loss_of(layer).backward()
    for name in NAMES:
        parameter = getattr(layer, name)
        state = optimizer.state[parameter]
        assert state["step"] == 1
        torch.testing.assert_close(state["exp_avg"], 0.2 * parameter.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(state["exp_avg_sq"], 0.01 * parameter.grad.square(), rtol=1e-6, atol=1e-9)


def random_transport(n=6, r=4, seed=0):
    torch.manual_seed(seed)
    old, new = (
        Basis({k: getattr(x, k).detach() for k in NAMES}) for x in (LRU(3, k, dtype=torch.float64) for k in (n, r))
    )
    return Transport(
        old, new, torch.randn(n, r, dtype=torch.complex128), 0.5 * torch.randn(r, n, dtype=torch.complex128)
    )


def test_variances_are_those_of_independent_fluctuations():
    transport = random_transport()
    spread = {k: torch.rand_like(x) + 0.1 for k, x in transport.old.parameters.items()}
    samples = []
    for _ in range(4000):
        noise = {k: v.sqrt() * torch.randn_like(v) for k, v in spread.items()}
        samples.append(transport.first(noise))
    found = transport.variances(spread)
    for name in ("B_re", "B_im", "C_re", "C_im", "gamma_log"):
        measured = torch.stack([x[name] for x in samples]).var(0)
        torch.testing.assert_close(found[name], measured, rtol=0.15, atol=0)


def test_variances_of_eigenvalues_are_those_of_a_full_state_matrix():
    """Its gradient has the variances α_j s_k; the diagonal alone, which is what is known, would give too little."""
    transport = random_transport(seed=1)
    old, new = transport.old, transport.new
    s = old.system()[1].abs().square().sum(-1) / (1 - old.system()[0].abs() ** 2)
    alpha = torch.rand(6, dtype=torch.float64) + 0.1
    part = (0.5 * alpha * s * old.system()[0].abs() ** 2).expand(2, -1)  # of log λ, radial and angular
    given = {k: torch.zeros_like(x) for k, x in old.parameters.items()}
    given |= {"nu_log": part[0] * old.nu.square(), "theta_log": part[1] * old.theta.square()}
    g = (alpha[:, None] * s).sqrt() * torch.randn(20000, 6, 6, dtype=torch.complex128)
    moved = torch.einsum("ji,njk,ik->ni", transport.lift.conj(), g, transport.projection.conj())
    of_log = new.system()[0].conj() * moved
    found = transport.variances(given)
    torch.testing.assert_close(found["nu_log"], (new.nu * of_log.real).var(0), rtol=0.1, atol=0)
    torch.testing.assert_close(found["theta_log"], (new.theta * of_log.imag).var(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ("Adam", "AdamW", "RMSprop", "Adagrad"))
def test_transported_second_moments_are_positive_and_bound_the_step(name):
    model = classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 5)
    truncate(model, optimizer, ranks=7)
    new = [getattr(x, k) for x in layers(model) for k in NAMES]
    seconds = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
    for parameter in new:
        state = optimizer.state[parameter]
        assert all((state[k] > 0).all() for k in seconds if k in state)
        assert {k for k in seconds if k in state} and state["step"] == 5
        if "exp_avg" in state:
            m, v = state["exp_avg"] / (1 - 0.9**5), state["exp_avg_sq"] / (1 - 0.999**5)
            assert (m.abs() <= v.sqrt() * (1 + 1e-4)).all()
        if "grad_avg" in state:
            assert (state["grad_avg"].square() <= state["square_avg"] * (1 + 1e-4)).all()
            assert not state["momentum_buffer"].any()  # of steps, which begin again


def test_reset_drops_and_slice_takes_the_first_rows():
    for moments in ("reset", "slice"):
        model = classifier()
        optimizer = torch.optim.Adam(model.parameters())
        steps(model, optimizer)
        old = {k: copy.deepcopy(optimizer.state[getattr(layers(model)[0], k)]) for k in NAMES}
        untouched = optimizer.state[layers(model)[1].B_re]
        head = optimizer.state[model.head.weight]
        truncate(model, optimizer, ranks=[6, 16], moments=moments)
        assert optimizer.state[layers(model)[1].B_re] is untouched and optimizer.state[model.head.weight] is head
        for name, state in old.items():
            parameter = getattr(layers(model)[0], name)
            if moments == "reset":
                assert parameter not in optimizer.state
                continue
            for key in ("exp_avg", "exp_avg_sq"):
                rows = state[key][:, :6] if name.startswith("C") else state[key][:6]
                assert torch.equal(optimizer.state[parameter][key], rows)
            assert optimizer.state[parameter]["step"] == 3


def test_states_of_unknown_tensors_are_reset():
    for name, count in (("Adamax", 3), ("Adafactor", 3)):
        model = classifier()
        optimizer = OPTIMIZERS[name](model.parameters())
        steps(model, optimizer, count)
        truncate(model, optimizer, ranks=6)
        assert not any(getattr(x, k) in optimizer.state for x in layers(model) for k in NAMES)
        assert model.head.weight in optimizer.state


def test_parameters_the_optimizer_does_not_have():
    """Two groups, and one layer left out, as a layer with frozen parts is."""
    model = classifier()
    first, second = layers(model)
    slow = [first.nu_log, first.theta_log]
    optimizer = torch.optim.Adam([{"params": [first.B_re, first.C_im]}, {"params": slow, "lr": 1e-5}])
    steps(model, optimizer)
    truncate(model, optimizer, ranks=6)
    assert optimizer.param_groups[0]["params"] == [first.B_re, first.C_im]
    assert [id(x) for x in optimizer.param_groups[1]["params"]] == [id(first.nu_log), id(first.theta_log)]
    assert len(optimizer.state) == 4 and optimizer.param_groups[1]["lr"] == 1e-5
    assert second.states == 6
    steps(model, optimizer)


# ---- untouched where something fails


def snapshot(model, optimizer):
    return (
        [(name, id(x), x.detach().clone()) for name, x in model.named_parameters()],
        [[id(x) for x in group["params"]] for group in optimizer.param_groups],
        {id(x): {k: torch.as_tensor(v).clone() for k, v in state.items()} for x, state in optimizer.state.items()},
    )


def same(a, b):
    return (
        all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a[0], b[0], strict=True))
        and a[1] == b[1]
        and a[2].keys() == b[2].keys()
        and all(torch.equal(v, b[2][i][k]) for i, state in a[2].items() for k, v in state.items())
    )


def test_nothing_changes_where_something_fails(monkeypatch):
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer)
    calls = []

    def fails_in_the_second_layer(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return honest(*args)

    from kdkernels.nn import truncation

    honest = truncation.transported
    before = snapshot(model, optimizer)
    monkeypatch.setattr(truncation, "transported", fails_in_the_second_layer)
    with pytest.raises(RuntimeError, match="out of memory"):
        truncate(model, optimizer, ranks=5)
    assert len(calls) == 2 and same(before, snapshot(model, optimizer))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"ranks of blocks\.1\.lru is 17"):
        truncate(model, optimizer, ranks=[3, 17])
    with pytest.raises(ValueError, match=r"states of blocks\.1\.lru"):
        keep_states(model, optimizer, states=[[1, 2], [16]])
    assert same(before, snapshot(model, optimizer))
    truncate(model, optimizer, ranks=5)
    assert not same(before, snapshot(model, optimizer))


# ---- keep_states


@pytest.mark.parametrize("name", ("Adam", "SGD", "Adamax", "Adagrad", "Adafactor"))
def test_keep_states_slices_parameters_and_their_state(name):
    model = classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer)
    first, second = layers(model)
    old = copy.deepcopy(first)
    states = {k: copy.deepcopy(optimizer.state[getattr(first, k)]) for k in NAMES}
    second_before = second.B_re
    kept = torch.tensor([9, 2, 14])
    keep_states(model, optimizer, states={"blocks.0.lru": kept})
    assert model.states == [3, 16] and second.B_re is second_before
    for k in NAMES:
        parameter, index = getattr(first, k), (slice(None), kept) if k.startswith("C") else (kept,)
        assert torch.equal(parameter, getattr(old, k)[index])
        if name == "Adafactor":
            assert parameter not in optimizer.state or k in ("nu_log", "theta_log", "gamma_log")
            continue
        for key, value in states[k].items():
            assert torch.equal(optimizer.state[parameter][key], value if value.numel() == 1 else value[index])
    steps(model, optimizer)
    keep_states(model, optimizer, states=[[0], range(16)])
    assert model.states == [1, 16] and second.B_re is second_before


def test_keep_states_of_a_layer_without_an_optimizer():
    layer = LRU(2, 5)
    u = torch.randn(1, 7, 2)
    with torch.no_grad():
        layer.C_re[:, 3] = layer.C_im[:, 3] = 0
    expected = layer(u)
    keep_states(layer, states=[[0, 1, 2, 4]])
    torch.testing.assert_close(layer(u), expected)


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({}, ValueError, "tolerance, ranks and error: exactly one of them must be given"),
        ({"tolerance": 0.1, "error": 1.0}, ValueError, "tolerance, ranks and error: exactly one"),
        ({"ranks": 17}, ValueError, r"ranks of blocks\.0\.lru is 17, but must be at most n = 16"),
        ({"ranks": 0}, ValueError, r"ranks of blocks\.0\.lru is 0, but must be a whole number of at least 1"),
        ({"ranks": [3]}, ValueError, "ranks has 1 entries, but must have one for each of 2 layers"),
        ({"ranks": 2.5}, TypeError, "ranks is float, but must be a sequence or a mapping"),
        (
            {"ranks": {"blocks.2.lru": 3}},
            ValueError,
            r"ranks has 'blocks\.2\.lru', but the layers are",
        ),
        ({"tolerance": -0.5}, ValueError, "tolerance is -0.5, but must be at least 0"),
        ({"error": float("nan")}, ValueError, "error is nan, but must be at least 0"),
        ({"error": "1"}, TypeError, "error is str, but must be a number"),
        ({"ranks": 3, "moments": "keep"}, ValueError, "moments is 'keep', but must be one of 'transport', 'reset'"),
        ({"ranks": 3, "optimizer": "Adam"}, TypeError, "optimizer is str, but must be a torch.optim.Optimizer"),
        ({"ranks": 3, "backend": "fast"}, ValueError, "backend is 'fast'"),
    ),
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        truncate(classifier(), **options)


def test_wrong_models_are_named():
    with pytest.raises(TypeError, match=r"model is str, but must be a torch\.nn\.Module"):
        truncate("model", ranks=3)
    with pytest.raises(ValueError, match=r"model is Linear without any kdkernels\.nn\.LRU"):
        truncate(nn.Linear(2, 2), ranks=3)
    for value, name in ((torch.nan, "theta_log"), (torch.inf, "C_im")):
        model = classifier()
        with torch.no_grad():
            getattr(model.blocks[1].lru, name).view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"blocks\.1\.lru: {name} is not finite"):
            truncate(model, ranks=3)
    for name, value, message in (
        ("theta_log", 1000.0, "its parameters are finite, but Λ is not"),
        ("gamma_log", 1000.0, "its parameters are finite, but γB is not"),
        ("nu_log", -90.0, r"nu_log is -90, so that \|λ\| is 1, not below"),
    ):
        model = classifier()
        with torch.no_grad():
            getattr(model.blocks[1].lru, name)[2] = value
        with pytest.raises(ValueError, match=rf"blocks\.1\.lru: {message}"):
            truncate(model, ranks=3)
    model = classifier()
    model.blocks[1].lru.B_re = model.blocks[0].lru.B_re
    with pytest.raises(ValueError, match=r"blocks\.1\.lru\.B_re and blocks\.0\.lru\.B_re are one parameter"):
        truncate(model, ranks=3)
    model = classifier()
    with pytest.raises(TypeError, match="optimizer is LBFGS"):
        truncate(model, torch.optim.LBFGS(model.parameters()), ranks=3)


def test_distributed_models_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = classifier()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match=r"DistributedDataParallel.*pass model\.module, and wrap it again"):
                truncate(outer, ranks=3)
        assert truncate(wrapped.module, ranks=3).states == [3, 3]
        again = nn.parallel.DistributedDataParallel(model)
        again(torch.randn(2, 5, 3)).sum().backward()
        assert model.blocks[0].lru.nu_log.grad.shape == (3,)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("states", "error", "message"),
    (
        ([[0]], ValueError, "states has 1 entries, but must have one for each of 2 layers"),
        ([[0], []], ValueError, r"states of blocks\.1\.lru"),
        (
            [[0], [1, 1]],
            ValueError,
            "must be indices from 0 to 15, at least one and each once",
        ),
        ([[0], [-1]], ValueError, r"states of blocks\.1\.lru"),
        ([[0.5], [1]], TypeError, r"states of blocks\.0\.lru has dtype torch\.float32"),
        ([["a"], [1]], TypeError, r"states of blocks\.0\.lru is list, but must be indices"),
        (3, TypeError, "states is int, but must be a sequence or a mapping"),
        ({"lru": [1]}, ValueError, "states has 'lru', but the layers are"),
    ),
)
def test_wrong_states_are_named(states, error, message):
    with pytest.raises(error, match=message):
        keep_states(classifier(), states=states)


@pytest.mark.parametrize("how", ["parametrized", "pruned", "weight_norm", "tied"])
def test_parameters_that_cannot_be_replaced_are_refused_before_anything_changes(how):
    model = classifier()
    lru = model.blocks[1].lru
    if how == "parametrized":
        parametrize.register_parametrization(lru, "B_re", nn.Identity())
    elif how == "pruned":
        prune.l1_unstructured(lru, "B_re", 0.5)
    elif how == "weight_norm":
        nn.utils.weight_norm(lru, "B_re")
    else:
        model.head.weight = lru.B_re
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: x.data_ptr() for name, x in model.named_parameters()}
    message = "head.weight and blocks.1.lru.B_re are one parameter" if how == "tied" else "B_re is made of other param"
    for change in (
        lambda: truncate(model, optimizer, ranks=5),
        lambda: keep_states(model, optimizer, states=[[0], [1]]),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    assert before == {name: x.data_ptr() for name, x in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_parameters_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"blocks.0.lru: nu_log has dtype {dtype}, but must have"):
        truncate(classifier().to(dtype), ranks=3)


@pytest.mark.parametrize("moments", ["transport", "reset", "slice"])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_sgd_goes_on_whatever_becomes_of_its_momentum(moments, kind):
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, **{kind: True})
    steps(model, optimizer)
    truncate(model, optimizer, ranks=5, moments=moments)
    assert all(map(math.isfinite, steps(model, optimizer)))


def test_a_momentum_that_has_not_begun():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    steps(model, optimizer)
    optimizer.state[model.blocks[0].lru.B_re]["momentum_buffer"] = None
    truncate(model, optimizer, ranks=5)
    assert optimizer.state[model.blocks[0].lru.B_re]["momentum_buffer"] is None
    assert all(map(math.isfinite, steps(model, optimizer)))
