"""Published laws against the figures that their papers and the formulas' derivatives give."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from mutirao.errors import InputError
from mutirao.precision.law import (
    APPLE_QAT,
    CHEN_W4A4,
    CHEN_W4A16,
    KUMAR,
    OUYANG,
    BaseLaw,
    TrainingPrecision,
)
from mutirao.precision.number_formats import parse_format

LLAMA_3_8B = (8.03e9, 15e12)
LLAMA_2_7B = (6.74e9, 2e12)
sizes = st.floats(1e6, 1e11)
tokens = st.floats(1e8, 1e14)
bits = st.floats(2, 10)


def test_best_training_precision_is_seven_bits_with_offsets_and_half_without():
    """The paper says 7 to 8 bits; the printed formula, without offsets, does not."""
    assert KUMAR.optimal_training_bits() == pytest.approx(7.0, abs=0.05)
    assert KUMAR.without_offsets().optimal_training_bits() == pytest.approx(3.5, abs=0.05)


def test_training_diverges_at_three_bit_activations():
    three = TrainingPrecision(activations=3)
    assert KUMAR.effective_params(1e8, three) == 0
    assert KUMAR.loss(1e8, 1e10, training=three) == math.inf
    assert KUMAR.degradation(1e8, 1e10, 4, training=three) == math.inf
    assert 0 < KUMAR.without_offsets().effective_share(three) < 1


def test_unrounded_training_is_the_base_law():
    by_hand = 4.299e3 * 1e8**-0.4965 + 1.806e4 * 1e10**-0.4965 + 2.7648
    assert KUMAR.loss(1e8, 1e10) == pytest.approx(by_hand, rel=1e-12)
    share = 1 - math.exp(-4 / 2.6745 + 0.3037)
    assert KUMAR.effective_share(TrainingPrecision(weights=4)) == pytest.approx(share)


def test_two_laws_agree_on_llama_3_8b_at_four_bits():
    """About 0.40 nats, from 15T tokens; quantizers of today measure a seventh of it."""
    assert KUMAR.degradation(*LLAMA_3_8B, 4) == pytest.approx(0.395, abs=0.005)
    assert OUYANG.degradation(*LLAMA_3_8B, 4) == pytest.approx(0.398, abs=0.005)
    for law in (KUMAR, OUYANG):
        ratio = law.degradation(*LLAMA_3_8B, 4) / law.degradation(*LLAMA_2_7B, 4)
        assert 2.6 <= ratio <= 2.8


def test_a_bit_less_multiplies_degradation_as_a_squared_step_would():
    """From 4 bits to 3: (7/3)² = 5.444 by the step, e^(1/0.5907) = 5.435 by the fit."""
    fitted = KUMAR.degradation(1e8, 1e10, 3) / KUMAR.degradation(1e8, 1e10, 4)
    assert fitted == pytest.approx(5.435, abs=5e-4)
    step_squared = (7 / 3) ** 2
    assert step_squared == pytest.approx(5.444, abs=5e-4)
    assert fitted == pytest.approx(step_squared, rel=0.002)


@pytest.mark.parametrize("law", [KUMAR, KUMAR.without_offsets()])
@pytest.mark.parametrize("num_params", [3e7, 1e9, 7e10])
@pytest.mark.parametrize("num_bits", [3, 4, 6])
def test_critical_tokens_are_where_the_loss_is_least(law, num_params, num_bits):
    def slope(log_tokens):
        step = 1e-4
        high = law.loss(num_params, math.exp(log_tokens + step), bits=num_bits)
        return high - law.loss(num_params, math.exp(log_tokens - step), bits=num_bits)

    numerical = math.exp(brentq(slope, math.log(1e6), math.log(1e22), xtol=1e-9))
    assert law.critical_tokens(num_params, num_bits) == pytest.approx(numerical, rel=1e-3)


def test_with_a_fixed_size_best_bits_grow_with_the_log_of_compute():
    best = [KUMAR.optimal_training_bits_at_size(1e9, 10.0**power) for power in range(19, 24)]
    steps = [high - low for low, high in pairwise(best)]
    assert all(step > 1 for step in steps)
    # In the end by the same step for each factor of ten.
    late = [KUMAR.optimal_training_bits_at_size(1e9, 10.0**power) for power in (22, 23, 24)]
    assert late[2] - late[1] == pytest.approx(late[1] - late[0], rel=0.1)


def test_best_bits_at_a_size_have_no_slope():
    def loss(num_bits):
        training = TrainingPrecision(num_bits, num_bits, num_bits)
        return KUMAR.loss(1e9, 1e21 * 16 / (6e9 * num_bits), training=training)

    best = KUMAR.optimal_training_bits_at_size(1e9, 1e21)
    assert loss(best) < min(loss(best - 0.05), loss(best + 0.05))


def test_training_in_few_bits_leaves_less_to_lose():
    robustness = (0.5, 0.5, 0.5)
    at = [
        KUMAR.degradation(1e8, 1e10, 4, training=TrainingPrecision(p), robustness=robustness)
        for p in (3, 4, 6, 12)
    ]
    assert at[0] == at[1] == 0
    assert 0 < at[2] < at[3]
    factor = 1 - math.exp(-0.5 * 2)
    plain = KUMAR.degradation(1e8, 1e10, 4, training=TrainingPrecision(6))
    assert at[2] == pytest.approx(plain * factor)
    assert KUMAR.degradation(1e8, 1e10, 4, robustness=robustness) == KUMAR.degradation(1e8, 1e10, 4)


def test_chen_scales_with_tokens_size_and_groups():
    for law, group_exponent in ((CHEN_W4A16, 0.3533), (CHEN_W4A4, 0.7779)):
        small = law.degradation(1e8, 1e10, 32)
        assert law.degradation(1e8, 1e10, 128) / small == pytest.approx(1.4**group_exponent)
        assert law.degradation(1e8, 1e11, 32) / small == pytest.approx(10**law.gamma_d)
        assert law.degradation(1e9, 1e10, 32) / small == pytest.approx(10**-law.gamma_n)
    by_hand = 0.2522 * 1e11**0.1610 * 7**0.3533 / 595e6**0.3589
    assert CHEN_W4A16.degradation(595e6, 1e11, 128) == pytest.approx(by_hand)
    assert CHEN_W4A4.degradation(595e6, 1e11, 128) > 2 * by_hand
    with pytest.raises(InputError, match="group_size=1"):
        CHEN_W4A16.degradation(1e8, 1e10, 1)


def test_share_of_quantization_aware_training():
    # S = 10¹¹ / (10⁹ · 4/8) = 200 tokens a byte.
    share = math.exp(math.log(200) - 6.7297 / math.log(200)) / 200
    assert APPLE_QAT.share(1e9, 1e11, 4) == pytest.approx(share)
    assert APPLE_QAT.share(1e9, 1e11, 4) == pytest.approx(0.281, abs=0.001)
    # At ln S = 6.7297 it is 1/e.
    assert APPLE_QAT.share(1e9, math.exp(6.7297) * 5e8, 4) == pytest.approx(math.exp(-1))
    with pytest.raises(InputError, match="tokens a byte are too few"):
        APPLE_QAT.share(1e9, 5e8, 4)


@given(num_params=sizes, factor=st.floats(1.5, 1e4), more=st.floats(1.01, 100))
def test_share_of_quantization_aware_training_grows_with_tokens(num_params, factor, more):
    few, many = (APPLE_QAT.share(num_params, num_params * f, 8) for f in (factor, factor * more))
    assert 0 < few < many < 1


@given(num_params=sizes, num_tokens=tokens, num_bits=bits)
def test_degradation_grows_with_tokens_and_falls_with_bits_and_size(
    num_params, num_tokens, num_bits
):
    for law in (KUMAR, OUYANG):
        here = law.degradation(num_params, num_tokens, num_bits)
        assert law.degradation(num_params, 2 * num_tokens, num_bits) > here > 0
        assert law.degradation(2 * num_params, num_tokens, num_bits) < here
        assert law.degradation(num_params, num_tokens, num_bits + 0.5) < here


@given(num_params=sizes, num_tokens=tokens, num_bits=st.floats(5, 12))
def test_loss_falls_with_size_tokens_and_training_bits(num_params, num_tokens, num_bits):
    def loss(params, trained, precision):
        training = TrainingPrecision(precision, precision, precision)
        return KUMAR.loss(params, trained, training=training)

    here = loss(num_params, num_tokens, num_bits)
    assert loss(2 * num_params, num_tokens, num_bits) < here
    assert loss(num_params, 2 * num_tokens, num_bits) < here
    assert loss(num_params, num_tokens, num_bits + 1) < here
    assert here > KUMAR.loss(num_params, num_tokens) > KUMAR.base.e


@given(num_params=sizes, num_bits=bits)
def test_critical_tokens_grow_with_bits_and_size(num_params, num_bits):
    here = KUMAR.critical_tokens(num_params, num_bits)
    assert KUMAR.critical_tokens(num_params, num_bits + 1) > here
    assert KUMAR.critical_tokens(2 * num_params, num_bits) > here


def test_formats_stand_for_their_equivalent_bits():
    mxfp4 = parse_format("mxfp4")
    by_bits = KUMAR.degradation(1e9, 1e11, mxfp4.equivalent_bits())
    assert KUMAR.degradation(1e9, 1e11, mxfp4) == by_bits
    assert OUYANG.degradation(1e9, 1e11, mxfp4) < OUYANG.degradation(1e9, 1e11, 4)


def test_bits_below_zero_are_refused():
    with pytest.raises(InputError, match="bits=0 is not accepted"):
        KUMAR.degradation(1e9, 1e11, 0)


def test_a_model_without_parameters_has_no_loss_to_speak_of():
    law = replace(KUMAR, base=BaseLaw(1, 0.5, 1, 0.5, 1))
    assert law.base.loss(0, 1e9) == math.inf
