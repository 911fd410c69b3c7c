"""Comparing forms on synthetic held-out runs: the true one wins, chance does not."""

import pytest
from synthetic_runs import synthetic_rows

from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.comparison import compare_forms
from mutirao.precision.fit import fit_form
from mutirao.precision.regression import FitConfig

FAST = FitConfig(num_resamples=40)


@pytest.fixture(scope="module")
def fits():
    rows = synthetic_rows(0)
    return [fit_form(name, rows, config=FAST) for name in ("kumar", "ouyang", "largest")]


@pytest.fixture(scope="module")
def held_out():
    return synthetic_rows(50, (4e6,), (2e8,), num_seeds=12)


def test_the_true_form_wins_on_larger_runs(fits, held_out):
    found = compare_forms(fits, held_out, extrapolate_factor=4, num_resamples=300)
    assert [score.name for score in found.scores] == ["kumar", "ouyang", "largest"]
    best = found.scores[0]
    assert best.median_error < 0.15
    assert best.coverage >= 0.85
    assert (found.num_rows, found.num_runs, found.num_dropped) == (48, 12, 0)
    pairs = {(each.first, each.second): each for each in found.differences}
    assert len(pairs) == 3
    against = pairs["kumar", "largest"]
    assert against.low < against.difference < against.high < 0
    assert against.first_is_better > 0.97


def test_equal_forms_are_not_told_apart(held_out):
    rows = synthetic_rows(0)
    twins = [fit_form(name, rows, config=FAST) for name in ("kumar", "per_cell")]
    found = compare_forms(twins, held_out, extrapolate_factor=4, num_resamples=300)
    (pair,) = found.differences
    assert pair.low <= 0 <= pair.high or abs(pair.difference) < 0.03


def test_the_same_seed_gives_the_same_comparison(fits, held_out):
    first, second = (
        compare_forms(fits, held_out, extrapolate_factor=4, num_resamples=50) for _ in range(2)
    )
    assert first == second


def test_what_cannot_be_compared_is_refused(fits, held_out):
    with pytest.raises(OutOfRangeError, match="num_"):
        compare_forms(fits, held_out)
    with pytest.raises(InputError, match="not all different"):
        compare_forms([fits[0], fits[0]], held_out)
    with pytest.raises(InputError, match="none of 48 held-out rows"):
        compare_forms(fits, held_out, min_significance=1e6)
