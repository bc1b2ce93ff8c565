"""LinearDistillation and head_of against the modules themselves, which make logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import kdkernels as kd
from kdkernels.nn import LinearDistillation, LoRALinear, head_of

pytestmark = pytest.mark.filterwarnings("ignore:kdkernels runs on plain PyTorch:RuntimeWarning")

V, WIDTH, WIDE = 37, 12, 20


def states(*leading, width=WIDTH, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, width, generator=generator, dtype=dtype).requires_grad_()


def linear(width=WIDTH, V=V, seed=1, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    layer = nn.Linear(width, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def adapted(dropout=0.0, width=WIDTH, dtype=torch.float64):
    layer = LoRALinear.from_linear(linear(width, dtype=dtype), 3, alpha=6, dropout=dropout, train_base=True)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def tokens(*leading, seed=2):
    return torch.randint(0, V, leading, generator=torch.Generator().manual_seed(seed))


def plain(y, targets, labels, T, alpha, shares):
    p = sum(share * (t / T).softmax(-1) for share, t in zip(shares, targets, strict=True))
    q = (y / T).log_softmax(-1)
    soft = F.kl_div(q, p, reduction="none").sum(-1) * T**2
    return (alpha * soft + (1 - alpha) * F.cross_entropy(y.mT, labels, reduction="none")).mean()


def gradients(loss, *wanted):
    return torch.autograd.grad(loss, wanted)


def agree(ours, theirs, *wanted, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for mine, other in zip(gradients(ours, *wanted), gradients(theirs, *wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("kind", [linear, adapted])
def test_equals_plain_pytorch_on_the_modules_logits(kind, backend):
    head, teachers = kind(), [linear(WIDTH), adapted(width=WIDE)]
    loss = LinearDistillation(temperature=2, alpha=0.7, teacher_weights=[0.25, 0.75], backend=backend)
    x, labels = states(2, 5), tokens(2, 5)
    y = [states(2, 5, seed=3), states(2, 5, width=WIDE, seed=4)]
    theirs = plain(head(x), [t(h).detach() for t, h in zip(teachers, y, strict=True)], labels, 2, 0.7, (0.25, 0.75))
    agree(loss(x, head, y, teachers, labels=labels), theirs, x, *head.parameters())


def test_heads_of_every_kind_are_the_same():
    head, other, x, y = linear(bias=False), linear(WIDE, bias=False), states(5), states(5, width=WIDE)
    loss = LinearDistillation(divergence="jsd", beta=0.3)
    expected = kd.linear_distillation_loss(x, head.weight, y, other.weight, divergence="jsd", beta=0.3)
    for own, teacher in ((head, other), (head.weight, other.weight), (head_of(head), [head_of(other)])):
        torch.testing.assert_close(loss(x, own, y, teacher), expected, rtol=0, atol=0)
    torch.testing.assert_close(loss(head(x), None, other(y)), expected)
    teacher = kd.topk_teacher(y, other.weight, k=V)
    torch.testing.assert_close(loss(x, head, [teacher, y], [None, other]), expected)


def test_weights_labels_and_reductions():
    head, x, y, labels = linear(), states(2, 5), states(2, 5, width=V), tokens(2, 5)
    labels[0, :3] = -7
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    each = LinearDistillation(alpha=0.5, ignore_index=-7, reduction="none")(x, head, y, labels=labels, weights=mask)
    assert each.shape == (2, 5) and (each == 0).sum() == 4
    for reduction, expected in (("sum", each.sum()), ("mean", each.sum() / 6)):
        loss = LinearDistillation(alpha=0.5, ignore_index=-7, reduction=reduction)
        torch.testing.assert_close(loss(x, head, y, labels=labels, weights=mask), expected)


def test_a_tied_head_adds_to_the_gradient_of_its_embedding():
    embedding, head, ids, y = nn.Embedding(V, WIDTH).double(), linear(bias=False), tokens(2, 5), states(2, 5, width=V)
    head.weight = embedding.weight
    ours = LinearDistillation()(embedding(ids).tanh(), head, y)
    agree(ours, plain(head(embedding(ids).tanh()), [y.detach()], ids, 1, 1, (1,)), embedding.weight)


def test_dropout_of_an_adapter_follows_the_modules_mode():
    layer, x, y = adapted(dropout=0.5), states(40), states(40, width=V)
    assert head_of(layer).dropout_p == 0.5 and head_of(layer.eval()).dropout_p == 0
    loss = LinearDistillation()
    torch.testing.assert_close(loss(x, layer, y), loss(layer(x), None, y))
    layer.train()
    torch.manual_seed(0)
    first = loss(x, layer, y)
    assert not first.equal(loss(x, layer, y))
    torch.manual_seed(0)
    assert first.equal(loss(x, layer, y))


def test_merged_is_the_merged_weight():
    layer, x, y = adapted(), states(5), states(5, width=V)
    expected = LinearDistillation()(x, layer, y)
    layer.merge()
    assert head_of(layer).lora_A is None
    torch.testing.assert_close(LinearDistillation()(x, layer, y), expected)


def test_maps_are_buffers_that_are_not_saved():
    columns = torch.arange(V).flip(0)
    x, y, head = states(5), states(5, width=V), linear()
    expected = kd.linear_distillation_loss(x, head_of(head), y, vocab_map=columns)
    alone, listed = LinearDistillation(vocab_map=columns), LinearDistillation(vocab_map=[None, columns.int()])
    assert not alone.state_dict() and not listed.state_dict() and len(list(listed.buffers())) == 1
    torch.testing.assert_close(alone(x, head, y), expected, rtol=0, atol=0)
    assert copy.deepcopy(listed).to("meta").vocab_map[1].device.type == "meta" and listed.vocab_map[0] is None
    assert listed.half().vocab_map[1].dtype is torch.int32
    both = LinearDistillation(vocab_map=[None, columns], teacher_weights=[0, 1])
    torch.testing.assert_close(both(x, head, [y, y]), expected)
    short = LinearDistillation(vocab_map="truncate")
    torch.testing.assert_close(
        short(x, head, y[:, :30]), kd.linear_distillation_loss(x, head_of(head), y[:, :30], vocab_map="truncate")
    )


def test_what_it_says_of_itself():
    assert repr(LinearDistillation()) == "LinearDistillation(divergence='forward_kl', temperature=1, alpha=1)"
    full = LinearDistillation(
        divergence="jsd", beta=0.3, teacher_weights=[1 / 3, 2 / 3], mixture="geometric", reduction="sum",
        vocab_map=[None, torch.arange(V)], ignore_index=-1, backend="reference", temperature=2.5, alpha=0.5,
    )  # fmt: skip
    assert repr(full) == (
        "LinearDistillation(divergence='jsd', temperature=2.5, beta=0.3, alpha=0.5, teacher_weights=(0.333, 0.667), "
        "mixture='geometric', vocab_map=[None, <37 tokens>], ignore_index=-1, reduction='sum', backend='reference')"
    )
    assert "vocab_map='truncate'" in repr(LinearDistillation(vocab_map="truncate"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(divergence="kl"), "divergence is 'kl'"),
        (dict(temperature=0), "temperature is 0"),
        (dict(temperature="hot"), "temperature is str"),
        (dict(beta=1), "beta is 1"),
        (dict(alpha=1.5), "alpha is 1.5"),
        (dict(mixture="mean"), "mixture is 'mean'"),
        (dict(reduction="all"), "reduction is 'all'"),
        (dict(backend="fast"), "backend is 'fast'"),
        (dict(ignore_index=0.5), "ignore_index is 0.5"),
        (dict(teacher_weights=[0.5, 0.6]), "teacher_weights is"),
        (dict(teacher_weights=[]), "teacher_weights is empty"),
        (dict(teacher_weights=1), "teacher_weights is 1"),
        (dict(vocab_map="cut"), "vocab_map is 'cut'"),
        (dict(vocab_map=3), "vocab_map is int"),
        (dict(vocab_map=[]), "vocab_map is empty"),
        (dict(vocab_map=[None, "truncate"]), r"vocab_map\[1\] is str"),
        (dict(vocab_map=torch.zeros(3)), "vocab_map has dtype torch.float32"),
        (dict(vocab_map=[torch.zeros(3, 1).long()]), r"vocab_map\[0\] has shape \(3, 1\)"),
    ],
)
def test_options_are_checked_at_construction(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LinearDistillation(**options)


def parametrized():
    return parametrizations.weight_norm(linear())


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def replaced():
    layer = linear()
    layer.forward = lambda x: x
    return layer


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Held(torch.Tensor):
    """A tensor of its own kind, as quantised ones are."""


def quantised():
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(V, WIDTH).as_subclass(Held), requires_grad=False)
    return layer


UNSERVED = [
    (lambda: nn.Conv1d(2, 3, 1), TypeError, "is a torch.nn.modules.conv.Conv1d"),
    (lambda: Doubled(WIDTH, V), TypeError, "Doubled, but must be a torch.nn.Linear"),
    (parametrized, TypeError, "parametriz|plain tensor"),
    (quantised, TypeError, "module.weight is a Held"),
    (hooked, ValueError, "module has hooks"),
    (replaced, ValueError, "module has a forward of its own"),
]


@pytest.mark.parametrize("make, kind, message", UNSERVED)
def test_what_a_head_cannot_say_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        head_of(make())
    with pytest.raises(kind, match=rf"teacher_heads\[1\]: .*({message})"):
        LinearDistillation()(states(5), linear(), [states(5)] * 2, [linear(), make()])


def test_scale_and_softcap_are_the_heads():
    layer, x, y = linear(), states(5), states(5, width=V)
    head = head_of(layer, softcap=3.0, scale=0.5)
    assert head.weight is layer.weight and (head.softcap, head.scale) == (3.0, 0.5)
    torch.testing.assert_close(
        LinearDistillation()(x, head, y), LinearDistillation()(3 * (layer(x) / 6).tanh(), None, y)
    )
    with pytest.raises(ValueError, match=r"head\.softcap is 0"):
        head_of(layer, softcap=0)
    with pytest.raises(TypeError, match=r"head\.scale is str"):
        head_of(layer, scale="1")
    with pytest.raises(TypeError, match="module is Parameter"):
        head_of(layer.weight)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, layer=None, **options):
    """PEFT's layer with an adapter that is not 0."""
    options = dict(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False) | options
    torch.manual_seed(5)
    return peft.get_peft_model(nn.Sequential(layer or linear()), peft.LoraConfig(**options))


def test_pefts_adapter_is_in_the_head(peft):
    """A fused path that read `.weight` alone would drop it."""
    model = lora(peft).double()
    layer, x, y = model.base_model.model[0], states(2, 5), states(2, 5, width=V)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    ours, theirs = LinearDistillation()(x, layer, y), plain(layer(x), [y.detach()], tokens(2, 5), 1, 1, (1,))
    agree(ours, theirs, x, *trained)
    bare = LinearDistillation()(x, layer.weight, y)
    assert (ours - bare).abs() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(
            LinearDistillation()(x, layer, y), LinearDistillation()(layer.base_layer(x), None, y)
        )
    merged = copy.deepcopy(layer)
    merged.merge()
    assert head_of(merged).lora_A is None
    torch.testing.assert_close(LinearDistillation()(x, merged, y), ours)
    merged.enable_adapters(False)
    with pytest.raises(ValueError, match="disabled adapters that are merged"):
        head_of(merged)


def test_pefts_dropout_and_acceleration(peft):
    from kdkernels.integrations.peft import accelerate

    model = lora(peft, lora_dropout=0.25)
    layer = model.base_model.model[0]
    assert head_of(layer).dropout_p == 0.25 and head_of(layer.eval()).dropout_p == 0
    with accelerate(model):
        assert head_of(layer).lora_A is layer.lora_A["default"].weight


def test_pefts_saved_copy_is_the_one_that_is_active(peft):
    layers = nn.ModuleDict({"body": linear(), "head": linear(V)})
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    wrapper = model.base_model.model["head"]
    assert head_of(wrapper).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head_of(wrapper).weight is wrapper.original_module.weight


def second(model, peft):
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])


def put(path, value):
    parent, _, name = path.rpartition(".")
    return lambda model, peft: setattr(model.base_model.model[0].get_submodule(parent), name, value)


def unscaled(model, peft):
    model.base_model.model[0].scaling["default"] = float("nan")


def watched(model, peft):
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda *_: None)


PEFTS_OWN = [
    (dict(use_dora=True), None, ValueError, "'default' is a variant of LoRA, Dora"),
    (dict(lora_bias=True), None, ValueError, "'default' has a bias"),
    ({}, second, ValueError, "2 active adapters"),
    ({}, put("fan_in_fan_out", True), ValueError, "fan_in_fan_out"),
    ({}, put("base_layer", nn.Conv1d(1, 1, 1)), TypeError, r"module\.base_layer is a Conv1d"),
    ({}, put("lora_dropout.default", nn.GELU()), ValueError, r"module\.lora_dropout\.default is GELU"),
    ({}, unscaled, ValueError, "scaling of nan"),
    ({}, watched, ValueError, r"module\.lora_A\.default has hooks"),
]


@pytest.mark.parametrize("options, change, kind, message", PEFTS_OWN)
def test_pefts_layers_that_a_head_cannot_say_are_refused(peft, options, change, kind, message):
    model = lora(peft, **options)
    if change is not None:
        change(model, peft)
    with pytest.raises(kind, match=message):
        head_of(model.base_model.model[0])


def test_peft_is_not_needed(python, environment):
    program = (
        "import sys; sys.modules['peft'] = None; import torch, kdkernels as kd; kd.nn.head_of(torch.nn.Linear(2, 3))"
    )
    python(environment, "-c", program, check=True)
