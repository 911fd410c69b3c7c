"""What was settled before the held-out runs: the split of rows, and the budgets' arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import precision_law
from precision.family import SIZES
from precision.losses import fit_losses
from precision.settled import (
    FITTED_SIZES,
    FITTED_TOKENS,
    HELD_OUT_SIZES,
    HELD_OUT_TOKENS,
    ROUNDS,
    measurements,
    share_of_bytes,
)

from mutirao.precision.rows import Measurement, Query


def _row(size="64", tokens=2_097_152, **changes):
    return {
        "run": f"d{size}-s0",
        "size": size,
        "seed": 0,
        "train_bits": None,
        "num_parameters": SIZES[size].num_parameters,
        "num_tokens": tokens,
        "is_decayed": True,
        "method": "rtn",
        "group": "g32",
        "bits": 3,
        "delta": 0.1,
        "standard_error": 0.001,
    } | changes


def test_held_out_runs_are_at_least_twice_as_large_and_as_long():
    largest = max(SIZES[name].num_parameters for name in FITTED_SIZES)
    assert all(SIZES[name].num_parameters >= 2 * largest for name in HELD_OUT_SIZES)
    assert min(HELD_OUT_TOKENS) >= 2 * max(FITTED_TOKENS)


def test_no_row_is_on_both_sides():
    rows = [
        _row(size, tokens)
        for size in ("64", "96", "128", "192")
        for tokens in (1_048_576, 2_097_152, 4_194_304, 8_388_608)
    ]
    rows += [_row(is_decayed=False), _row(train_bits=3), _row(bits=8)]
    fitted = measurements(rows, FITTED_SIZES, FITTED_TOKENS)
    held_out = measurements(rows, HELD_OUT_SIZES, HELD_OUT_TOKENS)
    assert len(fitted) == 6
    assert [(each.query.num_params, each.query.num_tokens) for each in held_out] == [
        (SIZES["192"].num_parameters, 8_388_608)
    ]


def test_no_row_of_the_second_round_is_on_two_sides():
    second = ROUNDS[2]
    rows = [
        _row(size, tokens, seed=seed, run=f"d{size}-s{seed}")
        for size in SIZES
        for tokens in (2_097_152, 4_194_304, 8_388_608)
        for seed in (0, 1, 2, 3)
    ]
    fitted, development, held_out = (
        {(row.run, row.query.num_tokens) for row in part}
        for part in (second.fitted(rows), second.development(rows), second.held_out(rows))
    )
    assert (len(fitted), len(development), len(held_out)) == (18, 4, 4)
    assert not fitted & development
    assert not held_out & (fitted | development)
    assert len(ROUNDS[1].fitted(rows)) == 12


def test_losses_are_foretold_from_a_known_curve():
    def loss(num_params, num_tokens):
        return 0.8 + 0.2 * (num_params / 442_368) ** -0.35 + 0.4 * (num_tokens / 2**21.5) ** -0.5

    rows = [
        _row(size, tokens, loss=loss(SIZES[size].num_parameters, tokens))
        for size in FITTED_SIZES
        for tokens in FITTED_TOKENS
    ]
    foretell = fit_losses(measurements(rows, FITTED_SIZES, FITTED_TOKENS))
    asked = Query(SIZES["256"].num_parameters, 8_388_608, 3, "rtn")
    assert foretell(asked) == pytest.approx(loss(asked.num_params, asked.num_tokens), abs=0.005)


def test_bytes_by_hand():
    (row,) = measurements([_row("192", 8_388_608)], HELD_OUT_SIZES, HELD_OUT_TOKENS)
    num_weights, num_embedded = SIZES["192"].num_parameters, 256 * 192
    groups = num_weights / 32
    rounded = 3 * num_weights + (16 + 3) * groups  # codes; a scale and a zero point a group
    share = (rounded + 16 * num_embedded) / (16 * (num_weights + num_embedded))
    assert share_of_bytes(row.query, "192") == pytest.approx(share)


def test_a_budget_is_right_where_the_bits_are():
    class Foretold:
        def predict(self, asked, *, extrapolate_factor):
            class Answer:
                mean = {2: 0.3, 3: 0.2, 4: 0.1, 5: 0.15}[int(asked.bits)]

            return Answer()

    size = SIZES["192"].num_parameters
    rows = [
        Measurement(
            Query(size, 8_388_608, bits, "rtn", group_size=32, row_size=192, noise=0.01),
            delta,
            0.001,
            "d192-s0",
        )
        for bits, delta in ((2, 0.5), (3, 0.1), (4, 0.05), (5, 0.01))
    ]
    found = precision_law._budgets(ROUNDS[1], Foretold(), rows)
    # 2.6, 3.6, 4.6 and 5.7 bits; budgets of 4, 4.8, 6.4, 8 and 9.6: from 6.4 on, 5 bits are best
    # and 4 were said.
    assert (found["right"], found["cases"]) == (2, 5)
