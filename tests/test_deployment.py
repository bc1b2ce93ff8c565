"""kdtrainer's models as they are shipped: merged, quantised, pruned, and what is measured of them."""

import copy

import pytest
import torch
from torch import nn

from kdkernels.nn import LoRALinear
from kdtrainer.deployment import Deployed, bytes_of, measured, merged, pruned, quantised


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(32, 48, 4), nn.GELU(), LoRALinear(48, 8, 4, dropout=0.5, bias=False))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    return model


def test_a_merged_model_is_plain_and_does_the_same(student):
    x, before = torch.randn(5, 32), copy.deepcopy(student.state_dict())
    plain = merged(student)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.GELU, nn.Linear] and plain[2].bias is None
    torch.testing.assert_close(plain(x), student.eval()(x))
    assert not any(p.requires_grad for p in plain.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    student[0].merge()  # and of one that is merged already
    torch.testing.assert_close(merged(student)(x), plain(x))


def test_a_quantised_model_is_a_quarter_of_the_bytes_and_nearly_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).eval()
    small, x = quantised(model), torch.randn(16, 256)
    exact, found = model(x), small(x)
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert bytes_of(small) < 0.3 * bytes_of(model)
    assert type(model[0]) is nn.Linear and not isinstance(small[0], nn.Linear)


def test_pruning_takes_the_weights_nearest_to_zero_of_all_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # so that they all go first
    made = pruned(model, 0.9)
    weights = torch.cat([layer.weight.flatten() for layer in (made[0], made[2])])
    assert int((weights == 0).sum()) == round(0.9 * weights.numel())
    assert not made[0].weight.any() and made[2].weight.any()
    kept = made[2].weight != 0
    assert model[2].weight[kept].abs().min() >= model[2].weight[~kept].abs().max()
    assert torch.equal(made[0].bias, model[0].bias) and torch.equal(made[1].weight, model[1].weight)
    assert model[0].weight.all() and set(made.state_dict()) == set(model.state_dict())


def test_what_is_measured_of_models():
    one, other, ran = nn.Linear(4, 3), nn.Linear(4, 3, bias=False), []
    nn.init.zeros_(other.weight)
    found = measured("both", [one, other], ran.append, 2, 0.25)
    assert isinstance(found, Deployed) and found.name == "both" and found.metric == 0.25
    assert (found.parameters, found.kept) == (15 + 12, 15)
    assert found.bytes == bytes_of(one) + bytes_of(other) and found.seconds > 0
    assert set(ran) == {0, 1} and len(ran) > 2
    small = measured("int8", [quantised(one)], lambda k: one(torch.ones(1, 4)), 1, 0.0)
    assert small.parameters == 15
