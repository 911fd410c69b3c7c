"""Lower bounds on ε against mechanisms whose ε is known, and against DP-SGD itself."""

import math

import numpy as np
import pytest
from scipy import stats
from secret_keepers import as_language_model, random_records, small_decoder, train_with_noise

from mutirao.errors import DataError, InputError
from mutirao.evaluate.losses import evaluate_examples
from mutirao.evaluate.privacy.audit import (
    audit_one_run,
    audit_runs,
    epsilon_from_counts,
    one_run_epsilon,
    one_run_p_value,
)
from mutirao.evaluate.privacy.membership import calibrated_scores
from mutirao.train.accountant import Phase, epsilon_spent

DELTA = 1e-5


def gaussian_epsilon(sigma, delta):
    """The least ε of one Gaussian step, by the accountant."""
    phase = Phase(sampling_probability=1.0, noise_multiplier=sigma, num_steps=1)
    return epsilon_spent([phase], delta)


def share_above(bounds, epsilon):
    return float(np.mean([bound.epsilon > epsilon for bound in bounds]))


def test_many_runs_of_the_gaussian_mechanism():
    sigma, rng = 1.0, np.random.default_rng(0)
    true = gaussian_epsilon(sigma, DELTA)
    bounds = [
        audit_runs(1 + sigma * rng.normal(size=1000), sigma * rng.normal(size=1000), delta=DELTA)
        for _ in range(40)
    ]
    assert share_above(bounds, true) <= 0.05
    assert 0.8 < np.median([bound.epsilon for bound in bounds]) < true


def test_many_runs_of_randomized_response_cover_as_promised():
    """The tightest case: the test's power is all that ε allows."""
    epsilon, rng = 1.0, np.random.default_rng(1)
    share = 1 / (1 + math.exp(-epsilon))
    bounds = [audit_runs(rng.random(600) < share, rng.random(600) < 1 - share) for _ in range(200)]
    assert share_above(bounds, epsilon) <= 0.05
    assert np.median([bound.epsilon for bound in bounds]) > 0.7 * epsilon


def test_many_runs_without_noise_give_all_that_so_many_runs_can():
    found = audit_runs(np.ones(1000), np.zeros(1000))
    assert found.num_right == found.num_guesses == 1000
    # No error in 500 runs of each kind: -ln of 0.73 %, the exact interval's end.
    assert found.epsilon == pytest.approx(-math.log(1 - 0.025 ** (1 / 500)), abs=0.02)


def test_many_runs_that_nothing_tells_apart():
    rng = np.random.default_rng(2)
    bounds = [audit_runs(rng.normal(size=300), rng.normal(size=300)) for _ in range(100)]
    assert share_above(bounds, 0.0) <= 0.05


def test_counts_look_in_both_directions():
    """A unit that is missed never, but a stranger accused half the time, and the reverse."""
    one = epsilon_from_counts(500, 1000, 0, 1000, 0.0)
    other = epsilon_from_counts(1000, 1000, 500, 1000, 0.0)
    assert one == pytest.approx(other)
    assert one > 4
    assert epsilon_from_counts(0, 1000, 1000, 1000, 0.0) == 0.0


def published_p_value(num_canaries, num_guesses, num_right, epsilon, delta):
    """The sum of Steinke et al. 2023, theorem 5.2, written out with scipy."""
    share = 1 / (1 + math.exp(-epsilon))
    worst = max(
        (
            stats.binom.cdf(num_right - 1, num_guesses, share)
            - stats.binom.cdf(num_right - i - 1, num_guesses, share)
        )
        / i
        for i in range(1, num_right + 1)
    )
    tail = stats.binom.sf(num_right - 1, num_guesses, share)
    return min(1.0, tail + 2 * num_canaries * delta * worst)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_p_value_as_published(epsilon, delta):
    for num_right in (1, 55, 90, 100):
        found = one_run_p_value(1000, 100, num_right, epsilon, delta)
        expected = published_p_value(1000, 100, num_right, epsilon, delta)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_perfect_guesses_without_delta():
    """All r guesses right has probability q^r, so the bound is known in closed form."""
    share = 0.05 ** (1 / 100)
    assert one_run_epsilon(100, 100, 100, 0.0, 0.05) == pytest.approx(
        math.log(share / (1 - share)), abs=1e-6
    )


def test_one_run_of_randomized_response_covers_as_promised():
    epsilon, rng, num = 1.0, np.random.default_rng(3), 1000
    share = 1 / (1 + math.exp(-epsilon))
    bounds = []
    for _ in range(200):
        coins = rng.integers(0, 2, num).astype(bool)
        told = np.where(rng.random(num) < share, coins, ~coins)
        bounds.append(audit_one_run(told + 0.1 * rng.random(num), coins, num_guesses=num))
    assert share_above(bounds, epsilon) <= 0.05
    assert np.median([bound.epsilon for bound in bounds]) > 0.8 * epsilon


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_one_run_of_the_gaussian_mechanism(sigma):
    rng, num, true = np.random.default_rng(4), 1000, gaussian_epsilon(sigma, DELTA)
    bounds = []
    for _ in range(100):
        coins = rng.integers(0, 2, num).astype(bool)
        scores = coins + sigma * rng.normal(size=num)
        bounds.append(audit_one_run(scores, coins, num_guesses=[50, 200, 1000], delta=DELTA))
    assert share_above(bounds, true) <= 0.05
    if sigma <= 1:
        assert np.median([bound.epsilon for bound in bounds]) > 0.9


def test_one_run_without_noise_and_one_without_a_trace():
    rng = np.random.default_rng(5)
    coins = rng.integers(0, 2, 1000).astype(bool)
    # 10 % of the canaries of each kind are guessed, as they should be.
    assert audit_one_run(coins, coins, num_guesses=200).epsilon > 4
    blind = [
        audit_one_run(rng.normal(size=1000), coins, num_guesses=[100, 1000]) for _ in range(100)
    ]
    assert share_above(blind, 0.0) <= 0.05


def canary_audit(noise_multiplier, *, num_steps=30, num_canaries=60):
    """Train on half of some random records and audit by how much their losses fell."""
    canaries = random_records(num_canaries, 16, seed=6)
    coins = np.random.default_rng(7).integers(0, 2, num_canaries).astype(bool)
    model = small_decoder()
    before = evaluate_examples(as_language_model(model), [[each] for each in canaries])
    units = [(each,) for each, is_in in zip(canaries, coins, strict=True) if is_in]
    private = train_with_noise(
        model,
        units,
        noise_multiplier=noise_multiplier,
        num_steps=num_steps,
        units_per_step=15,
        num_units=30,
    )
    after = evaluate_examples(as_language_model(model), [[each] for each in canaries])
    bound = audit_one_run(
        calibrated_scores(after, before), coins, num_guesses=[20, num_canaries], delta=1e-4
    )
    if noise_multiplier == 0:
        return bound.epsilon, math.inf
    phase = Phase(
        sampling_probability=private.sampling_probability,
        noise_multiplier=noise_multiplier,
        num_steps=num_steps,
    )
    return bound.epsilon, epsilon_spent([phase], 1e-4)


def test_dp_sgd_is_not_found_to_be_worse_than_it_claims():
    without_noise, _ = canary_audit(0.0)
    with_noise, claimed = canary_audit(2.0)
    assert without_noise > 1.5
    assert with_noise <= claimed < 15
    assert with_noise < without_noise / 2


def test_bad_input():
    with pytest.raises(DataError, match="at least four"):
        audit_runs([1.0, 2.0], [0.0] * 10)
    with pytest.raises(DataError, match="finite"):
        audit_runs([math.nan] * 8, [0.0] * 8)
    with pytest.raises(DataError, match="3 scores came with 2 coins"):
        audit_one_run([1.0, 2.0, 3.0], [True, False], num_guesses=2)
    with pytest.raises(InputError, match="num_guesses"):
        audit_one_run([1.0, 2.0], [True, False], num_guesses=3)
    with pytest.raises(InputError, match="delta"):
        audit_one_run([1.0, 2.0], [True, False], num_guesses=2, delta=1.0)
    with pytest.raises(InputError, match="confidence"):
        audit_one_run([1.0, 2.0], [True, False], num_guesses=2, confidence=1.0)
