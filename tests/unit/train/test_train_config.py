"""Settings of training: what contradicts itself is refused."""

import pytest

from mutirao.config import parse_recipe
from mutirao.errors import RecipeError
from mutirao.train.config import PrivateConfig


def test_more_units_than_there_are_cannot_be_expected():
    with pytest.raises(RecipeError, match="units_per_step=5"):
        parse_recipe(PrivateConfig, {"num_units": 4, "units_per_step": 5, "noise_multiplier": 1.0})
