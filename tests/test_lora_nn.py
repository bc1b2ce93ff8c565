"""LoRALinear against plain PyTorch, and the life of its adapter: fresh, trained, merged, unmerged, saved."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.nn import LoRALinear

BACKENDS = ("reference", pytest.param("native", marks=pytest.mark.native))

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")


def lora(in_features=6, out_features=5, rank=3, **options):
    """A layer whose adapter does something."""
    torch.manual_seed(7)
    layer = LoRALinear(in_features, out_features, rank, **{"dtype": torch.float64, "backend": "reference", **options})
    torch.nn.init.normal_(layer.lora_B)
    return layer


def points(*leading, d=6, seed=1, dtype=torch.float64):
    return torch.randn(*leading, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(layer, x, scaling):
    """What a user would write."""
    return F.linear(x, layer.weight, layer.bias) + scaling * F.linear(F.linear(x, layer.lora_A), layer.lora_B)


# The layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options, scaling",
    [({}, 1.0), ({"alpha": 12}, 4.0), ({"alpha": 12.0, "rslora": True}, 12 / 3**0.5), ({"rslora": True}, 3**0.5)],
)
def test_equals_plain_pytorch(backend, options, scaling):
    for bias, leading in itertools.product((False, True), ((), (4,), (2, 3), (0,))):
        layer = lora(bias=bias, backend=backend, **options)
        layer.weight.requires_grad_()
        x = points(*leading).requires_grad_()
        ours, theirs = layer(x), plain(layer, x, scaling)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        used = (x, layer.weight, layer.lora_A, layer.lora_B)
        grad = torch.randn_like(theirs)
        for a, b in zip(torch.autograd.grad(ours, used, grad), torch.autograd.grad(theirs, used, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_new_adapter_changes_nothing_and_alone_is_trained(bias):
    layer = LoRALinear(6, 5, 3, bias=bias, alpha=20, backend="reference")
    x = points(4, dtype=torch.float32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.lora_B.grad.any()


def test_is_drawn_as_linear_and_peft_draw():
    torch.manual_seed(3)
    layer = LoRALinear(400, 300, 8)
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(400)  # kaiming_uniform(a=√5) of fan-in 400, for both
    for drawn in (layer.weight, layer.lora_A, layer.bias):
        assert 0.97 * bound < drawn.abs().max() <= bound
        assert drawn.mean().abs() < 0.2 * bound
    before = copy.deepcopy(layer.state_dict())
    torch.nn.init.ones_(layer.lora_B)
    layer.reset_parameters()
    assert not layer.lora_B.any()
    assert not any(torch.equal(getattr(layer, name), before[name]) for name in ("weight", "bias", "lora_A"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_while_training_alone(backend):
    layer = lora(400, 5, 3, dropout=0.25, backend=backend)
    x = points(50, d=400)
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    assert (first - plain(layer, x, 1.0)).abs().max() > 0.1
    state = torch.get_rng_state()
    torch.testing.assert_close(layer.eval()(x), plain(layer, x, 1.0))
    assert torch.equal(torch.get_rng_state(), state), "a mask was drawn while evaluating"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_adapter_beside_a_bfloat16_base(backend):
    layer = lora(dtype=torch.bfloat16, adapter_dtype=torch.float32, backend=backend)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {
        "weight": torch.bfloat16, "bias": torch.bfloat16, "lora_A": torch.float32, "lora_B": torch.float32,
    }  # fmt: skip
    x = points(4, dtype=torch.bfloat16)
    assert layer(x).dtype is torch.bfloat16
    torch.testing.assert_close(layer(x).double(), plain(layer.double(), x.double(), 1.0), rtol=0.01, atol=0.02)


def test_the_backend_reaches_the_operator():
    with pytest.raises(ValueError, match="backend='triton' cannot serve lora_linear"):
        lora(backend="triton")(points(4))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5, "bias": False}])
def test_compiles_as_one_graph(options):
    layer = lora(dtype=torch.float32, **options)
    x = points(4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training, merged in ((True, False), (False, False), (False, True)):
        layer.train(training)
        if merged:
            layer.merge()
        torch.manual_seed(0)
        eager = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), eager)


def test_repr_tells_the_configuration():
    shown = repr(lora(alpha=12, dropout=0.1, rslora=True))
    for part in ("in_features=6", "out_features=5", "rank=3", "alpha=12", "dropout=0.1", "bias=True", "rslora=True"):
        assert part in shown
    assert "backend='reference'" in shown and "merged" not in shown
    layer = LoRALinear(6, 5, 3)
    assert "backend" not in repr(layer) and "rslora" not in repr(layer)
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_features": 0}, "in_features is 0, but must be a whole number of at least 1"),
        ({"in_features": 6.0}, "in_features is 6.0, but must be a whole number"),
        ({"out_features": -1}, "out_features is -1, but must be a whole number of at least 1"),
        ({"rank": 0}, "rank is 0, but must be a whole number of at least 1"),
        ({"rank": True}, "rank is True, but must be a whole number"),
        ({"rank": None}, "rank is None, but must be a whole number"),
        ({"alpha": float("inf")}, "alpha is inf, but must be a finite number"),
        ({"alpha": "16"}, "alpha is '16', but must be a finite number"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1, but must be"),
        ({"dropout": float("nan")}, "dropout is nan, but must be"),
        ({"dropout": None}, "dropout is None, but must be a number"),
        ({"bias": 1}, "bias is 1, but must be True or False"),
        ({"rslora": "yes"}, "rslora is 'yes', but must be True or False"),
        ({"backend": "cuda"}, "backend is 'cuda', but must be one of 'auto'"),
        ({"device": "gpu0"}, "device is 'gpu0', but must be a torch.device"),
        ({"device": 1.5}, "device is 1.5, but must be a torch.device"),
        ({"dtype": torch.int8}, "dtype is torch.int8, but must be one of torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn, but must be one of torch.float32"),
        ({"dtype": "float32"}, "dtype is 'float32', but must be one of torch.float32"),
        ({"adapter_dtype": torch.bool}, "adapter_dtype is torch.bool, but must be one of torch.float32"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LoRALinear(**{"in_features": 6, "out_features": 5, "rank": 3, **options})


# A layer that exists


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_adopts_the_very_same_parameters(bias):
    linear = torch.nn.Linear(6, 5, bias=bias, dtype=torch.float64).eval()
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(linear, 3, alpha=6, backend="reference", adapter_dtype=torch.float32)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and (bias is False or not linear.bias.requires_grad)
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad and layer.lora_A.dtype is torch.float32
    assert layer.scaling == 2 and not layer.training
    torch.testing.assert_close(layer(points(4)), linear(points(4)))
    torch.manual_seed(0)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(3, 6), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, expected), "the generator was used for more than lora_A"


def test_from_linear_may_train_the_base():
    linear = torch.nn.Linear(6, 5).requires_grad_(False)
    layer = LoRALinear.from_linear(linear, 3, train_base=True, backend="reference")
    assert all(p.requires_grad for p in layer.parameters()) and linear.weight.requires_grad


def test_from_linear_on_meta_then_made_real():
    layer = LoRALinear.from_linear(torch.nn.Linear(6, 5, device="meta"), 3, backend="reference")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(points(4, dtype=torch.float32)).isfinite().all() and not layer.lora_B.any()


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": math.nan}, {"dropout": 2}, {"train_base": None}])
def test_from_linear_refuses_and_leaves_the_linear_as_it_was(options):
    linear = torch.nn.Linear(6, 5)
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is .*, but must be"):
        LoRALinear.from_linear(linear, **{"rank": 3, **options})
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_from_linear_names_what_it_cannot_adapt():
    with pytest.raises(TypeError, match=r"linear is Conv1d, but must be a torch\.nn\.Linear"):
        LoRALinear.from_linear(torch.nn.Conv1d(6, 5, 1), 3)
    normalised = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5))
    with pytest.raises(TypeError, match=r"linear\.weight is Tensor, but must be a torch\.nn\.Parameter"):
        LoRALinear.from_linear(normalised, 3)


# Merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_is_the_same_layer_and_unmerge_restores_every_bit(dtype):
    layer = lora(alpha=12, dtype=dtype, adapter_dtype=torch.promote_types(dtype, torch.float32)).eval()
    parameter, before = layer.weight, layer.weight.clone()
    x = points(20, dtype=dtype)
    apart = layer(x)
    layer.merge()
    assert layer.merged and layer.weight is parameter and not torch.equal(layer.weight, before)
    exact = before.double() + 4 * layer.lora_B.double() @ layer.lora_A.double()
    unit, wide_unit = (torch.finfo(kind).eps for kind in (dtype, layer.lora_A.dtype))
    magnitude = before.double().abs() + 4 * layer.lora_B.double().abs() @ layer.lora_A.double().abs()
    allowed = unit / 2 * exact.abs() + 4 * wide_unit * magnitude  # rounded once, after sums in the wide dtype
    assert ((layer.weight.double() - exact).abs() <= allowed).all()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), apart, rtol=20 * unit, atol=20 * unit * apart.abs().max().item())
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before)
    assert torch.equal(layer(x), apart)


def test_merging_twice_or_undoing_nothing_is_refused():
    layer = lora()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    for again in (layer.merge, layer.reset_adapter, layer.reset_parameters):
        with pytest.raises(RuntimeError, match=r"merged.*: call unmerge\(\)"):
            again()
    assert torch.equal(layer.weight, merged)


def test_a_merged_layer_drops_nothing():
    layer = lora(dropout=0.5)
    layer.merge()
    assert torch.equal(layer(points(9)), F.linear(points(9), layer.weight, layer.bias))


# Saving


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias):
    layer = lora(bias=bias)
    saved = copy.deepcopy(layer.state_dict())
    assert list(saved) == ["weight", *(["bias"] if bias else []), "lora_A", "lora_B"]
    other = LoRALinear(6, 5, 3, bias=bias, dtype=torch.float64, backend="reference")
    assert not torch.equal(other(points(4)), layer(points(4)))
    other.load_state_dict(saved)
    assert torch.equal(other(points(4)), layer(points(4)))


def test_a_merged_layer_saves_the_weight_without_the_adapter():
    model = torch.nn.Sequential(lora())
    before = copy.deepcopy(model.state_dict())
    model[0].merge()
    saved = model.state_dict()
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)


def test_a_merged_layer_refuses_to_be_loaded():
    model = torch.nn.Sequential(lora())
    saved = copy.deepcopy(model.state_dict())
    model[0].merge()
    merged = model[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"0 is merged: call unmerge\(\) before it is loaded"):
        model.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="the module is merged"):
        model[0].load_state_dict(lora().state_dict())
    assert torch.equal(model[0].weight, merged)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_merged_layer_can_be_unmerged(copied):
    layer = lora()
    before = layer.weight.clone()
    layer.merge()
    other = copied(layer)
    other.unmerge()
    assert torch.equal(other.weight, before) and layer.merged


def test_exported():
    assert kd.nn.LoRALinear is LoRALinear
