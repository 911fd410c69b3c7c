"""Exposure and extraction: of secrets known by heart, of secrets never seen, under DP-SGD."""

import math

import numpy as np
import pytest
from scipy import stats
from secret_keepers import (
    ParrotModel,
    as_language_model,
    overfit,
    random_records,
    small_decoder,
    train_with_noise,
)

from mutirao.errors import DataError, InputError
from mutirao.evaluate.privacy.canaries import (
    canary_example,
    extract_secrets,
    make_canaries,
    measure_exposure,
    skew_normal_tail,
    summarize_exposures,
)

TEMPLATE = "card {label}: {secret}"


def test_canaries_are_drawn_as_asked_and_repeatably():
    canaries = make_canaries(TEMPLATE, [0, 4], num_each=3, num_characters=5, seed=1)
    assert canaries == make_canaries(TEMPLATE, [0, 4], num_each=3, num_characters=5, seed=1)
    assert canaries != make_canaries(TEMPLATE, [0, 4], num_each=3, num_characters=5, seed=2)
    assert [canary.num_repetitions for canary in canaries] == [0, 0, 0, 4, 4, 4]
    assert len({canary.context for canary in canaries}) == 6
    assert all(len(c.secret) == 5 and c.secret.isdigit() for c in canaries)
    assert canaries[0].space_bits == pytest.approx(math.log2(10**5))


def test_a_secret_known_by_heart_is_exposed_and_extracted():
    (canary,) = make_canaries(TEMPLATE, [1], num_each=1, seed=0)
    model = ParrotModel([canary.context + canary.secret])
    (exposure,) = measure_exposure(model, [canary], num_alternatives=255, seed=0)
    assert exposure.rank == 1
    assert exposure.bits == 8.0
    # Beyond the sample the fit goes on, up to the whole space.
    assert 8.0 < exposure.extrapolated_bits <= canary.space_bits
    assert extract_secrets(model, [canary]) == [canary.secret]


def test_secrets_never_seen_have_the_exposure_of_chance():
    """-log2 of a uniform share is exponential: log2(e) = 1.44 bits on average."""
    canaries = make_canaries(TEMPLATE, [0], num_each=200, seed=0)
    exposures = measure_exposure(ParrotModel(), canaries, num_alternatives=63, seed=0)
    bits = [exposure.bits for exposure in exposures]
    error = np.std(bits) / math.sqrt(len(bits))
    assert abs(np.mean(bits) - math.log2(math.e)) < 4 * error
    (summary,) = summarize_exposures(exposures)
    assert summary.share_first < 0.06
    found = extract_secrets(ParrotModel(), canaries[:20])
    assert not any(text == canary.secret for text, canary in zip(found, canaries, strict=False))


def test_a_model_without_opinions_exposes_nothing():
    model = ParrotModel()
    model.logprobs[:] = -math.log(len(model.logprobs))
    canaries = make_canaries(TEMPLATE, [0], num_each=2, seed=0)
    exposures = measure_exposure(model, canaries, num_alternatives=15, seed=0)
    assert [exposure.bits for exposure in exposures] == [0.0, 0.0]


def test_a_small_space_is_ranked_whole():
    (canary,) = make_canaries(TEMPLATE, [1], num_each=1, num_characters=1, seed=0)
    (exposure,) = measure_exposure(ParrotModel(), [canary], num_alternatives=255, seed=0)
    assert exposure.num_alternatives == 9


@pytest.mark.parametrize("shape", [-3.0, 0.0, 2.0])
def test_skew_normal_tail_against_scipy(shape):
    sample = stats.skewnorm(shape, loc=-20, scale=3).rvs(200_000, random_state=0)
    for value in (-25.0, -18.0, -12.0):
        expected = stats.skewnorm(shape, loc=-20, scale=3).sf(value)
        # Far out, the moments' own error counts.
        assert skew_normal_tail(sample, value) == pytest.approx(expected, rel=0.25, abs=1e-4)


def test_skew_normal_tail_of_what_does_not_vary():
    assert skew_normal_tail(np.zeros(5), 0.0) == 1.0
    assert skew_normal_tail(np.zeros(5), 1.0) == 1e-300


def trained_exposures(train):
    """Controls and repeated canaries of a small decoder after ``train(model, units)``."""
    canaries = make_canaries("{label}#{secret}", [0, 8], num_each=4, num_characters=4, seed=3)
    model = small_decoder()
    scorer = as_language_model(model)
    units = [(record,) for record in random_records(12, 12, seed=1)]
    units += [(canary_example(scorer, c),) * c.num_repetitions for c in canaries[4:]]
    train(model, units)
    exposures = measure_exposure(scorer, canaries, num_alternatives=127, seed=0)
    control, repeated = summarize_exposures(exposures)
    found = extract_secrets(scorer, canaries)
    right = [text == canary.secret for text, canary in zip(found, canaries, strict=True)]
    return control, repeated, right


def test_a_trained_model_gives_canaries_away_and_noise_stops_it():
    control, repeated, right = trained_exposures(
        lambda model, units: overfit(
            model, [each for unit in units for each in unit], num_epochs=30
        )
    )
    assert repeated.mean_bits > 6.0  # of 7 that the sample can show
    assert control.mean_bits < 4.0
    assert sum(right[4:]) >= 3
    assert not any(right[:4])
    _, repeated, right = trained_exposures(
        lambda model, units: train_with_noise(
            model, units, noise_multiplier=2.0, num_steps=30, units_per_step=8
        )
    )
    assert repeated.mean_bits < 4.0
    assert not any(right)


def test_bad_input():
    with pytest.raises(InputError, match="template"):
        make_canaries("no {secret} at the end of {label}", [1], num_each=1, seed=0)
    with pytest.raises(InputError, match="alphabet"):
        make_canaries(TEMPLATE, [1], num_each=1, alphabet="aab", seed=0)
    with pytest.raises(InputError, match="num_each=0"):
        make_canaries(TEMPLATE, [1], num_each=0, seed=0)
    (canary,) = make_canaries(TEMPLATE, [1], num_each=1, seed=0)
    with pytest.raises(InputError, match="num_alternatives=1"):
        measure_exposure(ParrotModel(), [canary], num_alternatives=1, seed=0)
    model = ParrotModel()
    model.encode = lambda text: [ord(c) for c in text for _ in range(2)]
    with pytest.raises(DataError, match="not every character is a token"):
        extract_secrets(model, [canary])
    model.encode = lambda _: []
    with pytest.raises(DataError, match="no token"):
        measure_exposure(model, [canary], seed=0)
