from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutirao.errors import DataError
from mutirao.evaluate.outcomes import auroc, auroc_interval, evaluate_outcomes


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=2, max_size=30).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_auroc_counts_pairs(rows):
    positive = [score for score, label in rows if label]
    negative = [score for score, label in rows if not label]
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    scores, labels = zip(*rows, strict=True)
    assert auroc(scores, labels) == pytest.approx(wins / (len(positive) * len(negative)))


def test_perfect_and_inverted_rankings():
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert auroc([1, 2, 3, 4], [1, 1, 0, 0]) == 0.0


@pytest.mark.parametrize("area", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_interval_holds_the_estimate_and_has_width(area):
    low, high = auroc_interval(area, 12, 20)
    assert 0 <= low <= area <= high <= 1
    assert high - low > 0.05
    mirrored = auroc_interval(1 - area, 12, 20)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_intervals_shrink_with_more_records():
    few, many = auroc_interval(0.7, 20, 20), auroc_interval(0.7, 200, 200)
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_interval_covers_the_truth_as_often_as_it_says(shift):
    # Normal scores, one group shifted: the true area is Phi(shift / sqrt(2)).
    truth = {0.0: 0.5, 1.0: 0.7602499389, 2.0: 0.9213503965}[shift]
    rng = np.random.default_rng(7)
    labels = np.repeat([1, 0], [25, 40])
    covered = 0
    for _ in range(600):
        scores = rng.normal(size=65) + shift * labels
        low, high = auroc_interval(auroc(scores, labels), 25, 40)
        covered += low <= truth <= high
    # 600 draws at 95 %: standard deviation 0.9 points.
    assert 0.92 <= covered / 600 <= 0.985


def test_outcomes_are_ranked_by_log_odds(table_model, make_record):
    records = [
        make_record(index, letter, (" no", " yes"), index % 2, "outcome")
        for index, letter in enumerate("abcdef")
    ]
    result = evaluate_outcomes(table_model, records)
    space = table_model.logprobs[ord(" ")]
    assert result.scores == pytest.approx([space[ord("y")] - space[ord("n")]] * 6)
    assert (result.num, result.num_positive, result.auroc) == (6, 3, 0.5)


def test_outcomes_of_one_kind_are_refused(table_model, make_record):
    records = [make_record(i, "p", (" no", " yes"), 1, "outcome") for i in range(3)]
    with pytest.raises(DataError, match="3 times 1"):
        evaluate_outcomes(table_model, records)


def test_outcomes_need_two_choices(table_model, make_record):
    with pytest.raises(DataError, match="3 choices"):
        evaluate_outcomes(table_model, [make_record(1, "p", ("a", "b", "c"), 0, "outcome")])
