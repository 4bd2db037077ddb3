from __future__ import annotations

import pytest
import torch
from torch import nn

from medlsdm.models.ema import Ema


def one_weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_memory_grows_until_its_limit():
    layer, expected = one_weight(0.0), 0.0
    ema = Ema(layer, 0.5)
    for n in range(1, 30):
        nn.init.constant_(layer.weight, float(n))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.weights()["weight"].item() == pytest.approx(expected)


def test_the_average_is_lent_and_taken_back():
    layer = one_weight(1.0)
    ema = Ema(layer, 0.9)
    nn.init.constant_(layer.weight, 3.0)
    ema.update()
    with ema.applied():
        assert 1 < layer.weight.item() < 3
    assert layer.weight.item() == 3
    assert layer.weight.requires_grad


def test_going_on_from_a_saved_state_is_exact():
    torch.manual_seed(0)
    layers = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    first, second = (Ema(layer, 0.9) for layer in layers)
    for step in range(6):
        if step == 3:
            layers[1].load_state_dict(layers[0].state_dict())
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        x = torch.randn(8, 4)
        for layer, ema in zip(layers, (first, second), strict=True):
            layer(x)
            ema.update()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert int(first.weights()["num_batches_tracked"]) == 6


@pytest.mark.parametrize("longest", [-0.1, 1.0])
def test_refuses_a_decay_that_never_settles(longest):
    with pytest.raises(ValueError, match="never settles"):
        Ema(one_weight(0.0), longest)
