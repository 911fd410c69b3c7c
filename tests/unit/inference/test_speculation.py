"""What drafting learns, when it goes on, and what it finds in the text."""

from __future__ import annotations

import random

import pytest

from mutirao.inference.speculation import (
    MAX_NGRAM_SEARCH,
    NGRAM,
    Confidence,
    PassTimes,
    PromptLookup,
)


def test_confidence_begins_with_the_drafts_own_and_learns():
    confidence = Confidence()
    for probability in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert confidence.rate(probability) == pytest.approx(probability, abs=0.05)
    rng = random.Random(0)
    for _ in range(2000):
        confidence.learn(0.9, rng.random() < 0.3)
        confidence.learn(0.2, True)
    assert confidence.rate(0.9) == pytest.approx(0.3, abs=0.04)
    assert confidence.rate(0.2) > 0.98
    assert confidence.rate(0.5) == pytest.approx(0.5, abs=0.05)
    assert Confidence().rate(0.2) < 0.3, "two of them must not share what they learnt"


def test_rates_stay_between_0_and_1():
    for was_kept in (True, False):
        confidence = Confidence()
        for _ in range(10_000):
            confidence.learn(1.0, was_kept)
            confidence.learn(0.0, was_kept)
        assert 0 < confidence.rate(1.0) < 1
        assert 0 < confidence.rate(0.0) < 1


def tokens_per_s(times, rate, num_drafted):
    """By definition: tokens of a pass over its time, if each is kept at one rate."""
    expected = sum(rate**index for index in range(num_drafted + 1))
    return expected / (times.check_s + num_drafted * (times.draft_s + times.per_row_s))


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft_s", [0.0, 0.01, 0.03, 0.2])
@pytest.mark.parametrize("per_row_s", [0.001, 0.01])
def test_drafting_stops_where_another_token_would_make_it_slower(rate, draft_s, per_row_s):
    times = PassTimes(draft_s, 0.1, per_row_s)
    num, kept, expected = 0, 1.0, 1.0
    while num < 200 and times.goes_on(num, expected, kept * rate):
        kept *= rate
        expected += kept
        num += 1
    best = max(range(200), key=lambda n: tokens_per_s(times, rate, n))
    assert num == best


def test_a_draft_that_costs_a_pass_is_not_made():
    assert not PassTimes(0.1, 0.1, 0.01).goes_on(0, 1.0, 0.99)
    assert PassTimes(0.01, 0.1, 0.01).goes_on(0, 1.0, 0.99)
    assert not PassTimes(0.01, 0.1, 0.01).goes_on(0, 1.0, 0.0)


def test_times_are_learnt():
    times = PassTimes(1.0, 1.0, 0.01)
    for _ in range(60):
        times.saw_draft(0.02)
        times.saw_check(6, 0.35)
    assert times.draft_s == pytest.approx(0.02, rel=0.01)
    assert times.check_s + 5 * times.per_row_s == pytest.approx(0.35, rel=0.01)
    for _ in range(60):
        times.saw_check(6, 0.0)
    assert times.check_s > 0


def found_by_search(tokens, most):
    """The same by looking through all of the text, from its end."""
    end = tuple(tokens[-NGRAM:])
    if len(tokens) < NGRAM:
        return []
    for begin in range(len(tokens) - 1, NGRAM - 1, -1):
        if tuple(tokens[begin - NGRAM : begin]) == end:
            return tokens[begin : begin + most] if len(tokens) - begin <= MAX_NGRAM_SEARCH else []
    return []


def test_lookup_finds_what_a_search_finds():
    rng = random.Random(0)
    num_found = 0
    for _ in range(50):
        lookup, tokens = PromptLookup(), [rng.randrange(4) for _ in range(rng.randrange(60))]
        for _ in range(30):
            most = rng.choice([0, 1, 3, 15])
            found = lookup.find(tokens, most)
            assert found == found_by_search(tokens, most)
            num_found += bool(found)
            tokens += [rng.randrange(4) for _ in range(rng.choice([1, 1, 2, 7]))]
    assert num_found > 300


def test_lookup_goes_back_so_far_and_no_further():
    for distance, is_found in ((MAX_NGRAM_SEARCH, True), (MAX_NGRAM_SEARCH + 1, False)):
        tokens = [1, 2, 3, *range(10, 10 + distance - NGRAM), 1, 2, 3]
        assert bool(PromptLookup().find(tokens, 5)) == is_found
