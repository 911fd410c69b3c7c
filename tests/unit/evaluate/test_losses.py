from __future__ import annotations

import math

import numpy as np
import pytest

from mutirao.data.tokenization import Example
from mutirao.errors import DataError
from mutirao.evaluate.losses import TextResult, evaluate_text, paired_difference


def test_loss_is_the_mean_over_learned_tokens(table_model, make_record):
    result = evaluate_text(
        table_model, [make_record(1, "abc"), make_record(2, "xy", completion="z")]
    )
    table = table_model.logprobs
    a, b, c, x, y, z = (ord(letter) for letter in "abcxyz")
    del x
    first = -(table[a, b] + table[b, c] + table[c, 0])
    second = -(table[y, z] + table[z, 0])
    assert result.record_tokens == (3, 2)
    assert result.record_losses == pytest.approx((first, second))
    assert result.loss == pytest.approx((first + second) / 5)
    assert result.num_tokens == 5


def test_windows_do_not_change_which_tokens_count(table_model, make_record):
    # The table looks one token back, so that windows lose nothing.
    records = [make_record(1, "a long text that needs several windows")]
    whole = evaluate_text(table_model, records, max_tokens=200)
    cut = evaluate_text(table_model, records, max_tokens=8)
    assert cut.record_tokens == whole.record_tokens
    assert cut.loss == pytest.approx(whole.loss)


def test_records_without_text_are_left_out(table_model, make_record):
    assert (
        len(evaluate_text(table_model, [make_record(1, ""), make_record(2, "ab")]).record_losses)
        == 1
    )
    with pytest.raises(DataError, match="no record has a token"):
        evaluate_text(table_model, [make_record(1, "")])


def test_examples_are_scored_as_they_are(table_model):
    result = evaluate_text(table_model, [Example((97, 98, 99), 2), Example((97, 98), 1)])
    table = table_model.logprobs
    assert result.record_losses == pytest.approx((-table[98, 99], -table[97, 98]))


def _result(losses, tokens):
    return TextResult(
        loss=sum(losses) / sum(tokens),
        num_tokens=sum(tokens),
        record_losses=losses,
        record_tokens=tokens,
    )


def test_paired_difference_agrees_with_a_bootstrap_over_records():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 60)
    hardness = rng.normal(3, 0.8, 60)
    first = tokens * (hardness + rng.normal(-0.05, 0.1, 60))
    second = tokens * hardness
    difference = paired_difference(
        _result(first.tolist(), tokens.tolist()), _result(second.tolist(), tokens.tolist())
    )
    draws = rng.integers(0, 60, (20_000, 60))
    means = (first - second)[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    assert difference.mean == pytest.approx((first - second).sum() / tokens.sum())
    assert difference.standard_error == pytest.approx(means.std(), rel=0.05)


def test_a_model_does_not_differ_from_itself():
    same = _result([1.0, 2.0], [3, 4])
    assert paired_difference(same, same).mean == 0
    assert paired_difference(same, same).standard_error == 0


def test_one_record_has_no_standard_error():
    difference = paired_difference(_result([2.0], [4]), _result([1.0], [4]))
    assert difference.mean == 0.25
    assert math.isinf(difference.standard_error)


def test_results_of_other_records_are_not_paired():
    with pytest.raises(DataError, match="cannot be paired"):
        paired_difference(_result([1.0], [2]), _result([1.0], [3]))
