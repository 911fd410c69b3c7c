"""The law of one checkpoint, against rises that follow a known one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mutirao.advise.checkpoint_law import LARGEST_RISE, fit_checkpoint
from mutirao.advise.measuring import Measured
from mutirao.advise.ways import Way
from mutirao.compress.loss import CompressionLoss
from mutirao.errors import DataError, OutOfRangeError

CONSTANTS = {"rtn": 8.0, "gptq": 2.5}
POWER = 1.15


def _noise(way):
    return 0.35 * 4.0 ** -(way.bits - 2) * (0.5 if way.group_size else 1.0)


def _true(way):
    return CONSTANTS[way.method] * _noise(way) ** POWER


def _measured(ways, seed=0, spread=0.05, error=1e-4):
    draw = np.random.default_rng(seed)
    found = []
    for way in ways:
        rise = _true(way) * math.exp(spread * draw.normal()) + error * draw.normal()
        found.append(Measured(way, CompressionLoss(3.0, 3.0 + rise, rise, error, rise, 10_000)))
    return found


WAYS = [Way("rtn", bits, size) for bits in (3, 4, 5, 6) for size in (None, 32)]
WAYS += [Way("gptq", bits, 32) for bits in (3, 4)]
NOISES = {way: _noise(way) for way in WAYS}


def test_constants_and_power_come_out():
    law = fit_checkpoint(_measured(WAYS, spread=0.001, error=1e-6), NOISES)
    assert law.fitted.parameters["noise_power"] == pytest.approx(POWER, rel=0.01)
    for method, constant in CONSTANTS.items():
        assert math.exp(law.fitted.parameters[f"log_c[{method}]"]) == pytest.approx(
            constant, rel=0.03
        )


def test_intervals_hold_ways_that_were_not_measured():
    asked = Way("rtn", 4, 64)
    noise = 0.012
    truth, held = CONSTANTS["rtn"] * noise**POWER, 0
    for seed in range(12):
        law = fit_checkpoint(_measured(WAYS, seed=seed, spread=0.1), NOISES)
        draw = np.random.default_rng(1000 + seed)
        predicted = law.predict(asked, noise)
        held += predicted.low <= truth * math.exp(0.1 * draw.normal()) <= predicted.high
    assert held >= 10


def test_nothing_is_said_outside_of_what_was_measured():
    law = fit_checkpoint(_measured(WAYS), NOISES)
    with pytest.raises(OutOfRangeError, match="not calibrated"):
        law.predict(Way("rtn", 8, 32), 1e-6)
    with pytest.raises(OutOfRangeError, match="not calibrated"):
        law.predict(Way("awq", 4, 32), 0.01)


def test_large_rises_are_left_out_and_counted():
    ways = [*WAYS, Way("rtn", 2, None)]
    noises = NOISES | {ways[-1]: _noise(ways[-1])}
    assert _true(ways[-1]) > LARGEST_RISE
    law = fit_checkpoint(_measured(ways), noises)
    assert law.num_left_out == 1
    assert max(law.noise) < noises[ways[-1]]


def test_too_few_clear_rises_are_told():
    with pytest.raises(DataError, match=r"only \d of 10 ways .*at least 4 are needed"):
        fit_checkpoint(_measured(WAYS, error=0.2), NOISES)
