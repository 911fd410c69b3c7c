from __future__ import annotations

import numpy as np
import pytest

from mutirao.errors import DataError
from mutirao.evaluate.choices import evaluate_questions, score_choices, wilson_interval


def test_choices_are_scored_by_the_first_token_that_differs(table_model, make_record):
    # All begin with a space: it joins the context, and the letter after it decides.
    record = make_record(1, "Q?", (" A", " B", " C"), 1, "question")
    (scores,) = score_choices(table_model, [record])
    expected = [table_model.logprobs[ord(" "), ord(letter)] for letter in "ABC"]
    np.testing.assert_allclose(scores, expected)


def test_choices_that_share_some_tokens_are_scored_whole(table_model, make_record):
    record = make_record(1, "Q?", ("ab", "ac", "d"), 0, "question")
    other = make_record(2, "Q?", ("x", "y"), 0, "question")
    scores, _ = score_choices(table_model, [record, other])
    table = table_model.logprobs
    q, a, b, c, d = (ord(letter) for letter in "?abcd")
    np.testing.assert_allclose(
        scores, [table[q, a] + table[a, b], table[q, a] + table[a, c], table[q, d]]
    )


def test_a_choice_that_begins_another_is_scored(table_model, make_record):
    record = make_record(1, "Q?", ("a", "ab"), 0, "question")
    (scores,) = score_choices(table_model, [record])
    np.testing.assert_allclose(scores, [0.0, table_model.logprobs[ord("a"), ord("b")]])


def test_a_long_context_loses_its_beginning(table_model, make_record):
    record = make_record(1, "z" * 50 + "k", ("a", "b"), 0, "question")
    seen = []
    ask = table_model.next_token_logprobs
    table_model.next_token_logprobs = lambda contexts, options: (
        seen.extend(contexts),
        ask(contexts, options),
    )[1]
    score_choices(table_model, [record], max_tokens=8)
    assert seen == [[ord("z")] * 7 + [ord("k")]]


def test_questions_agree_with_a_softmax_by_hand(table_model, make_record):
    records = [
        make_record(index, f"{letter}", ("a", "b", "c"), index % 3, "question")
        for index, letter in enumerate("klmnop")
    ]
    result = evaluate_questions(table_model, records)
    right = []
    for record in records:
        odds = np.exp([table_model.logprobs[ord(record.context), ord(c)] for c in "abc"])
        right.append((np.log(odds / odds.sum())[record.answer], odds.argmax() == record.answer))
    logprobs = np.array([logprob for logprob, _ in right])
    assert result.num == 6
    assert result.logprob == pytest.approx(logprobs.mean())
    assert result.logprob_se == pytest.approx(logprobs.std(ddof=1) / np.sqrt(6))
    assert result.accuracy == pytest.approx(np.mean([hit for _, hit in right]))
    assert result.chance == pytest.approx(1 / 3)
    assert result.accuracy_low <= result.accuracy <= result.accuracy_high


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),
    # The ends solve (p - share)^2 = z^2 p (1 - p) / num; checked below, not copied.
    [(0, 10, 0.0, None), (10, 10, None, 1.0), (7, 30, None, None)],
)
def test_wilson_ends_are_one_z_away_from_the_share(num_right, num, low, high):
    found = wilson_interval(num_right, num)
    share = num_right / num
    for end, known in zip(found, (low, high), strict=True):
        if known is not None:
            assert end == pytest.approx(known, abs=1e-12)
        else:
            assert (end - share) ** 2 == pytest.approx(
                1.959964**2 * end * (1 - end) / num, rel=1e-5
            )


def test_a_record_without_choices_is_no_question(table_model, make_record):
    with pytest.raises(DataError, match="record 1 is no question"):
        score_choices(table_model, [make_record(1, "plain text")])


def test_no_questions_are_refused(table_model):
    with pytest.raises(DataError, match="no question"):
        evaluate_questions(table_model, [])
