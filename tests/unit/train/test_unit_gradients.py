"""Gradients per unit: the vectorised path against the slow one, and what it refuses."""

import pytest
import torch
from torch import nn
from toy_units import adapted_model, language_units, squared_error, toy_model, toy_units

from mutirao.errors import InputError, ShapeError
from mutirao.train.config import PrivateConfig
from mutirao.train.private import example_loss
from mutirao.train.unit_gradients import unit_gradients

PRIVATE = PrivateConfig(num_units=4, units_per_step=2.0, noise_multiplier=0.0, max_unit_norm=0.5)


@pytest.mark.parametrize("freeze_a", [True, False])
@pytest.mark.parametrize("records_per_pass", [1, 3, 100])
def test_the_vectorized_path_is_the_slow_one(tiny_model_directory, freeze_a, records_per_pass):
    model = adapted_model(tiny_model_directory, freeze_a=freeze_a)
    loss = example_loss(0, autocast=False)

    def gradients(**changes):
        config = PRIVATE.model_copy(update=changes)
        return torch.stack(list(unit_gradients(model, language_units(), loss, config)))

    slow_UP = gradients(records_per_pass=1)
    fast_UP = gradients(records_per_pass=records_per_pass, is_vectorized=True)
    assert slow_UP.abs().amax(dim=1).min() > 1e-3
    torch.testing.assert_close(fast_UP, slow_UP, rtol=1e-4, atol=1e-5)


def test_the_vectorized_path_knows_biases_and_layers_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 1, bias=False)

        def forward(self, x):
            return self.out(self.layer(torch.tanh(self.layer(x))))

    model, units = Twice().double(), toy_units()
    units = [[(x.double(), y.double()) for x, y in unit] for unit in units]
    slow = list(unit_gradients(model, units, squared_error, PRIVATE))
    fast = list(
        unit_gradients(
            model, units, squared_error, PRIVATE.model_copy(update={"is_vectorized": True})
        )
    )
    torch.testing.assert_close(torch.stack(fast), torch.stack(slow), rtol=1e-12, atol=1e-12)


def test_the_vectorized_path_refuses_what_it_cannot_take_apart():
    fast = PRIVATE.model_copy(update={"is_vectorized": True})
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1))
    with pytest.raises(InputError, match="something else than linear layers"):
        list(unit_gradients(model, toy_units(), squared_error, fast))

    def joined(model, records):
        return model(torch.cat([x for x, _ in records])[None, :3]).sum()

    with pytest.raises(ShapeError, match="one row for each of 7 records"):
        list(unit_gradients(toy_model(), toy_units(), joined, fast))
