"""Choosing tokens: exact where it is exact, and the right distribution where it is drawn.

Distributions are tested with chi-square on fixed seeds; each such test is shown to fail for
the mistake it is there to find.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mutirao.errors import InputError
from mutirao.inference.sampling import (
    Sampling,
    draw,
    greedy,
    probabilities,
    verify_greedy,
    verify_sampled,
)

VOCAB = 6
NUM_DRAWS = 20_000
ACCEPTED = 1e-3
"""Least p-value of a right rule: fixed seeds make it a regression test, not a gamble."""
REFUSED = 1e-9
"""Greatest p-value of a wrong rule."""


def logits_of(seed, rows=None, scale=2.0):
    shape = VOCAB if rows is None else (rows, VOCAB)
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def test_greedy_takes_the_lowest_id_of_equals():
    assert greedy(np.array([0.0, 3.0, 3.0, -1.0], np.float32)) == 1
    assert greedy(np.array([-np.inf, -5.0, -np.inf], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_are_softmax(temperature):
    logits = logits_of(0)
    got = probabilities(logits, Sampling(temperature=temperature))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, softmax(logits / temperature), rtol=1e-6)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, logits_of(0))


def test_temperature_0_is_greedy():
    logits = logits_of(1)
    expected = np.eye(VOCAB)[logits.argmax()]
    np.testing.assert_array_equal(probabilities(logits, Sampling()), expected)
    assert Sampling().is_greedy
    assert not Sampling(temperature=0.1).is_greedy


@pytest.mark.parametrize("top_k", [0, 1, 3, 100, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_cuts_are_those_of_transformers(top_k, top_p):
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(scale=3, size=400).astype(np.float32)
        scores = torch.from_numpy(logits.astype(np.float64))[None] / 0.7
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        got = probabilities(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p))
        np.testing.assert_allclose(got, torch.softmax(scores[0], 0).numpy(), atol=1e-12)


def test_extreme_logits():
    logits = np.array([1e30, -1e30, -np.inf, 1e30], np.float32)
    got = probabilities(logits, Sampling(temperature=0.01))
    np.testing.assert_array_equal(got, [0.5, 0, 0, 0.5])


def p_value(tokens, expected):
    """Return how likely counts as far from expected as these are."""
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    if possible.sum() == 1:
        return 1.0
    return stats.chisquare(counts[possible], expected[possible] * counts.sum()).pvalue


def test_draws_have_their_probabilities():
    probs = softmax(logits_of(2))
    rng = random.Random(0)
    tokens = [draw(probs, rng) for _ in range(NUM_DRAWS)]
    assert p_value(tokens, probs) > ACCEPTED
    assert p_value(tokens, softmax(logits_of(2) / 1.3)) < REFUSED


def test_draws_of_weights_that_do_not_sum_to_1():
    rng = random.Random(0)
    tokens = [draw(np.array([0.0, 3.0, 1.0, 0.0]), rng) for _ in range(NUM_DRAWS)]
    assert p_value(tokens, np.array([0, 0.75, 0.25, 0])) > ACCEPTED


def test_rounding_draws_no_impossible_token():
    class Last:
        def random(self):
            return 1.0 - 2**-53

    assert draw(np.array([0.1] * 10 + [0.0] * 5), Last()) == 9

    class First:
        def random(self):
            return 0.0

    assert draw(np.array([0.0, 0.0, 0.5, 0.5]), First()) == 2


def test_the_seed_fixes_the_draws():
    probs = softmax(logits_of(3))

    def drawn(seed):
        rng = Sampling(temperature=1.0, seed=seed).randomness()
        return [draw(probs, rng) for _ in range(50)]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": 101}, "temperature=101"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)


def test_greedy_checking_keeps_what_the_model_says():
    logits = np.eye(VOCAB, dtype=np.float32)[[4, 2, 5, 1]]
    assert verify_greedy([4, 2, 5], logits) == [4, 2, 5, 1]
    assert verify_greedy([4, 2, 0], logits) == [4, 2, 5]
    assert verify_greedy([0, 2, 5], logits) == [4]
    assert verify_greedy([], logits[:1]) == [4]


def test_rows_are_taken_only_as_far_as_needed():
    taken = []

    def rows():
        for row in np.eye(VOCAB, dtype=np.float32)[[4, 2, 5, 1]]:
            taken.append(row)
            yield row

    assert verify_greedy([4, 0, 5], rows()) == [4, 2]
    assert len(taken) == 2


@pytest.mark.parametrize("seed", range(4))
def test_greedy_checking_is_greedy_decoding_whatever_the_draft(seed):
    """A toy model: the next logits follow from the last two tokens."""
    rng = random.Random(seed)
    table = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB))

    def next_logits(tokens):
        return table[tokens[-2], tokens[-1]]

    plain = [0, 1]
    while len(plain) < 60:
        plain.append(greedy(next_logits(plain)))
    tokens = [0, 1]
    while len(tokens) < 60:
        draft = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
        if rng.random() < 0.5:
            draft = plain[len(tokens) : len(tokens) + len(draft)]
        tokens += verify_greedy(
            draft, [next_logits([*tokens, *draft[:n]]) for n in range(len(draft) + 1)]
        )
    assert tokens[:60] == plain[:60]


DRAFTS = {
    "near": lambda full: softmax(np.log(full + 1e-9) + logits_of(11, scale=0.3)),
    "far": lambda full: softmax(logits_of(12)),
    "equal": lambda full: full,
    "flat": lambda full: np.full(VOCAB, 1 / VOCAB),
    "opposite": lambda full: softmax(-np.log(full + 1e-9)),
    "certain and right": lambda full: np.eye(VOCAB)[full.argmax()],
    "certain and wrong": lambda full: np.eye(VOCAB)[full.argmin()],
    "looked up": lambda full: None,
}


def drafted(draft, rng, lookup):
    return lookup if draft is None else draw(draft, rng)


def checked_once(rule, draft, full, seed):
    """First tokens of many checks of one drafted token."""
    rng = random.Random(seed)
    bonus = softmax(logits_of(13))
    tokens = []
    for _ in range(NUM_DRAWS):
        token = drafted(draft, rng, lookup=2)
        tokens.append(rule([token], [draft], [full, bonus], rng)[0])
    return tokens


@pytest.mark.parametrize("full", ["any", "cut"])
@pytest.mark.parametrize("name", DRAFTS)
def test_checked_tokens_have_the_distribution_of_the_full_model(name, full):
    logits = logits_of(10)
    settings = {"top_k": 3} if full == "cut" else {}
    full_probs = probabilities(logits, Sampling(temperature=1.0, **settings))
    draft = DRAFTS[name](full_probs)
    assert p_value(checked_once(verify_sampled, draft, full_probs, 5), full_probs) > ACCEPTED


def keeps_all(tokens, drafts, fulls, rng):
    """A wrong rule: whatever was drafted is kept."""
    return list(tokens)


def replaces_by_any_other(tokens, drafts, fulls, rng):
    """A wrong rule: the replacement is drawn from p without the token that was refused."""
    if rng.random() * drafts[0][tokens[0]] < fulls[0][tokens[0]]:
        return list(tokens)
    others = fulls[0].copy()
    others[tokens[0]] = 0
    return [draw(others, rng)]


def replaces_from_the_full_model(tokens, drafts, fulls, rng):
    """A wrong rule: the replacement is drawn from p instead of from max(0, p - q)."""
    if rng.random() * drafts[0][tokens[0]] < fulls[0][tokens[0]]:
        return list(tokens)
    return [draw(fulls[0], rng)]


@pytest.mark.parametrize("rule", [keeps_all, replaces_by_any_other, replaces_from_the_full_model])
def test_a_wrong_rule_would_be_found(rule):
    full = probabilities(logits_of(10), Sampling(temperature=1.0))
    draft = DRAFTS["far"](full)
    assert p_value(checked_once(rule, draft, full, 5), full) < REFUSED


@pytest.mark.parametrize("name", ["near", "far", "flat", "looked up"])
def test_runs_of_drafted_tokens_have_the_joint_distribution(name):
    """Three tokens of a toy model that looks back one, drafted two at a time."""
    rows = [probabilities(row, Sampling(temperature=1.0)) for row in logits_of(20, rows=VOCAB)]
    drafts = [DRAFTS[name](row) for row in rows]
    rng = random.Random(9)
    counted = Counter()
    for _ in range(NUM_DRAWS):
        tokens = [0]
        while len(tokens) < 4:
            draft, draft_rows = [], []
            for _ in range(2):
                last = [*tokens, *draft][-1]
                draft_rows.append(drafts[last])
                draft.append(drafted(drafts[last], rng, lookup=(last + 1) % VOCAB))
            fulls = [rows[token] for token in [tokens[-1], *draft]]
            tokens += verify_sampled(draft, draft_rows, fulls, rng)
        counted[tuple(tokens[1:4])] += 1
    expected = np.zeros((VOCAB,) * 3)
    for a, b, c in np.ndindex(*expected.shape):
        expected[a, b, c] = rows[0][a] * rows[a][b] * rows[b][c]
    counts = np.array([counted[index] for index in np.ndindex(*expected.shape)], float)
    likely = expected.ravel() * NUM_DRAWS >= 5  # chi-square needs some of each; the rest together
    got = [*counts[likely], counts[~likely].sum()]
    due = [*(expected.ravel()[likely] * NUM_DRAWS), expected.ravel()[~likely].sum() * NUM_DRAWS]
    assert stats.chisquare(got, due).pvalue > ACCEPTED


def test_all_kept_where_draft_and_model_agree():
    full = softmax(logits_of(30))
    rng = random.Random(0)
    for _ in range(200):
        draft = [draw(full, rng) for _ in range(4)]
        result = verify_sampled(draft, [full] * 4, [full] * 5, rng)
        assert result[:4] == draft
        assert len(result) == 5


def test_acceptance_is_as_the_paper_says():
    """Section 3.3: a drafted token is kept with probability sum min(p, q)."""
    full, draft = softmax(logits_of(31)), softmax(logits_of(32))
    rng = random.Random(1)
    lengths = [
        len(verify_sampled([draw(draft, rng)], [draft], [full, full], rng))
        for _ in range(NUM_DRAWS)
    ]
    kept = sum(length == 2 for length in lengths)
    assert stats.binomtest(kept, NUM_DRAWS, np.minimum(full, draft).sum()).pvalue > ACCEPTED


def test_an_impossible_looked_up_token_is_replaced():
    full = np.array([0.5, 0.0, 0.5])
    for seed in range(50):
        (token,) = verify_sampled([1], [None], [full, full], random.Random(seed))
        assert token in (0, 2)


def test_greedy_is_a_limit_of_drawing():
    full = np.eye(VOCAB)[[4, 2, 5]]
    assert verify_sampled([4, 2], [None, None], full, random.Random(0)) == [4, 2, 5]
    assert verify_sampled([4, 1], [None, None], full, random.Random(0)) == [4, 2]
