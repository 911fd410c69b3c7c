"""Exact rules against the dense mean of products, and inexact ones shown to be inexact."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError, ShapeError, UpdateError
from mutirao.federated.aggregation.low_rank import (
    Factors,
    concatenate,
    fedex,
    ffa,
    mean_product,
    product_norm,
    recompress,
    relative_error,
    separate_means,
    stacked,
)

MOST_ERROR = 1e-5
"""What is promised for results in float32; measured are some 1e-7."""


def dense(factors):
    """The oracle: makes the product, one entry at a time summed by NumPy."""
    b, a = factors.b.astype(np.float64), factors.a.astype(np.float64)
    return factors.scale * np.einsum("or,ri->oi", b, a)


def dense_mean(factors, weights):
    total = math.fsum(weights)
    return sum(w / total * dense(each) for w, each in zip(weights, factors, strict=True))


def gap(result, expected):
    """Relative Frobenius distance of dense matrices, safe for values of any size."""
    largest = np.abs(expected).max(initial=0.0) or 1.0
    norm = np.linalg.norm(expected / largest) or 1.0
    return np.linalg.norm((result - expected) / largest) / norm


def sample(rng, outputs, inputs, rank, *, scale=2.0, size=1.0):
    return Factors(
        (size * rng.normal(size=(outputs, rank))).astype(np.float32),
        rng.normal(size=(rank, inputs)).astype(np.float32),
        scale,
    )


@st.composite
def cohorts(draw, equal_ranks=False):
    """Factors of some sites, among them zeros, deficient ranks and extreme magnitudes."""
    outputs, inputs = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    num_sites = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    one_rank = draw(st.integers(1, 6))
    magnitude = draw(st.sampled_from([1e-15, 1.0, 1e15]))
    factors, weights = [], []
    for _ in range(num_sites):
        rank = one_rank if equal_ranks else draw(st.integers(1, 6))
        scale = 2.0 if equal_ranks else 8.0 / rank
        each = sample(rng, outputs, inputs, rank, scale=scale, size=magnitude)
        kind = draw(st.sampled_from(["full", "deficient", "zero", "lopsided"]))
        if kind == "deficient":
            each.b[:, -1] = each.b[:, 0]
        elif kind == "zero":
            each.b[:] = 0
        elif kind == "lopsided":
            each.b[:, 0] *= np.float32(1e6)
        factors.append(each)
        weights.append(draw(st.floats(1e-3, 1e6)))
    return factors, weights


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_stacked_is_the_mean_of_products(cohort):
    factors, weights = cohort
    result, expected = stacked(factors, weights), dense_mean(factors, weights)
    assert result.rank == sum(each.rank for each in factors)
    assert gap(dense(result), expected) < 1e-12


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_mean_product_survives_float32_and_is_no_wider_than_the_layer(cohort):
    factors, weights = cohort
    result = mean_product(zip(factors, weights, strict=True))
    assert result.rank <= min(*factors[0].weight_shape, sum(each.rank for each in factors))
    assert gap(dense(result.factors.to_float32()), dense_mean(factors, weights)) < 5e-7


@settings(deadline=None, max_examples=60)
@given(cohorts(equal_ranks=True))
def test_fedex_means_and_residual_together_are_exact(cohort):
    factors, weights = cohort
    means, residual = fedex(factors, weights)
    assert means.b.dtype == means.a.dtype == np.float32
    result = dense(means) + dense(residual.to_float32())
    rounding = (
        1e-7 * np.linalg.norm(dense(means)) / (np.linalg.norm(dense_mean(factors, weights)) or 1.0)
    )
    assert gap(result, dense_mean(factors, weights)) < 5e-7 + rounding


@settings(deadline=None, max_examples=60)
@given(cohorts(), st.randoms(use_true_random=False))
def test_order_of_sites_matters_in_rounding_only(cohort, random):
    factors, weights = cohort
    order = list(range(len(factors)))
    random.shuffle(order)
    one = mean_product(zip(factors, weights, strict=True))
    other = mean_product([(factors[i], weights[i]) for i in order])
    again = mean_product(zip(factors, weights, strict=True))
    assert gap(dense(other.factors), dense(one.factors)) < 5e-7
    assert again.factors.b.tobytes() == one.factors.b.tobytes()
    assert again.factors.a.tobytes() == one.factors.a.tobytes()


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_relative_error_agrees_with_the_dense_one(cohort):
    factors, weights = cohort
    expected = dense_mean(factors, weights)
    result = separate_means(factors, weights)
    measured = relative_error(result, factors, weights)
    if not expected.any():
        assert measured == (math.inf if dense(result).any() else 0.0)
    else:
        assert measured == pytest.approx(gap(dense(result), expected), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_recompression_keeps_the_product_and_tells_its_rank(cohort):
    factors, weights = cohort
    wide = stacked(factors, weights)
    exact, rounded = recompress(wide, tolerance=0.0), recompress(wide)
    assert gap(dense(exact.factors), dense(wide)) < 1e-12
    assert gap(dense(rounded.factors), dense(wide)) <= rounded.error + 1e-12
    assert rounded.error <= 2.0**-23
    assert rounded.rank <= np.linalg.matrix_rank(dense(wide) / (np.abs(dense(wide)).max() or 1))


def test_where_sites_cancel_stacked_float32_is_lost_and_recompressed_is_not():
    rng = np.random.default_rng(0)
    one = sample(rng, 40, 30, 4)
    twin = Factors(
        (1e-5 * rng.normal(size=one.b.shape) - one.b * 3 / 7).astype(np.float32), one.a, 2.0
    )
    pair, weights = [one, twin], [0.3, 0.7]
    raw = stacked(pair, weights).to_float32()
    assert relative_error(raw, pair, weights) > 1e-4
    kept = mean_product(zip(pair, weights, strict=True))
    assert kept.rank == 4
    assert relative_error(kept.factors.to_float32(), pair, weights) < 5e-7


@pytest.mark.parametrize("num_sites", [2, 4, 16])
def test_exact_rules_hold_their_promise_and_separate_means_are_far_off(num_sites):
    rng = np.random.default_rng(num_sites)
    factors = [sample(rng, 96, 64, 8) for _ in range(num_sites)]
    weights = list(rng.uniform(100, 2000, num_sites))
    means, residual = fedex(factors, weights)
    exact = mean_product(zip(factors, weights, strict=True)).factors
    assert relative_error(exact.to_float32(), factors, weights) < MOST_ERROR / 10
    parts = [means, residual.to_float32()]
    assert relative_error(parts, factors, weights) < MOST_ERROR / 10
    assert relative_error(means, factors, weights) > 0.2
    assert residual.rank <= min(64, (num_sites - 1) * 8)


def test_means_of_b_are_exact_where_a_is_shared_and_refused_where_not():
    rng = np.random.default_rng(1)
    first, second = sample(rng, 20, 10, 3), sample(rng, 20, 10, 3)
    shared = Factors(second.b, first.a, 2.0)
    assert relative_error(ffa([first, shared], [1, 3]), [first, shared], [1, 3]) < 1e-14
    assert relative_error(
        separate_means([first, shared], [1, 3]), [first, shared], [1, 3]
    ) == pytest.approx(0, abs=1e-14)
    with pytest.raises(InputError, match="freeze_a"):
        ffa([first, second], [1, 3])


def test_residual_makes_up_for_what_the_codec_did_to_the_means():
    rng = np.random.default_rng(2)
    factors = [sample(rng, 30, 20, 4) for _ in range(3)]
    coarse = fedex(factors, [1, 1, 1], carry=lambda _, v: np.round(v * 4) / 4)
    assert relative_error(coarse[0], factors, [1, 1, 1]) > 0.1
    parts = [coarse[0], coarse[1].to_float32()]
    assert relative_error(parts, factors, [1, 1, 1]) < MOST_ERROR / 10


def test_bounded_rank_is_the_best_one_and_tells_what_it_costs():
    rng = np.random.default_rng(3)
    wide = sample(rng, 25, 15, 10, scale=1.0)
    bounded = recompress(wide, max_rank=4)
    values = np.linalg.svd(dense(wide), compute_uv=False)
    assert bounded.rank == 4
    assert bounded.error == pytest.approx(np.linalg.norm(values[4:]) / np.linalg.norm(values))
    assert gap(dense(bounded.factors), dense(wide)) == pytest.approx(bounded.error)


def test_many_sites_take_no_more_room_than_the_layer():
    """Ranks add up to 10 times the layer's; the stack in between must stay bounded."""
    rng = np.random.default_rng(4)
    factors = [sample(rng, 9, 7, 5) for _ in range(14)]
    widest = []

    def watch():
        for each in factors:
            yield each, 1.0

    real = np.linalg.qr

    def spy(matrix, *args, **kwargs):
        widest.append(matrix.shape[1])
        return real(matrix, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "qr", spy)
        result = mean_product(watch())
    assert max(widest) <= 2 * 7 + 5
    assert gap(dense(result.factors), dense_mean(factors, [1.0] * 14)) < 5e-7


def test_nothing_learned_has_rank_zero():
    zero = Factors(np.zeros((4, 2), np.float32), np.ones((2, 3), np.float32))
    assert mean_product([(zero, 1.0), (zero, 2.0)]).rank == 0
    assert product_norm(recompress(zero).factors) == 0
    assert relative_error(zero, [zero], [1.0]) == 0
    one = Factors(np.ones((4, 2)), np.ones((2, 3)))
    assert relative_error(one, [zero], [1.0]) == math.inf


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_positive(weight):
    one = Factors(np.ones((4, 2)), np.ones((2, 3)))
    with pytest.raises(UpdateError, match="weight"):
        stacked([one, one], [1.0, weight])
    with pytest.raises(UpdateError, match="weight"):
        mean_product([(one, 1.0), (one, weight)])


def test_what_does_not_fit_is_refused():
    one, other = (
        Factors(np.ones((4, 2)), np.ones((2, 3))),
        Factors(np.ones((5, 2)), np.ones((2, 3))),
    )
    with pytest.raises(ShapeError, match="no product"):
        Factors(np.ones((4, 2)), np.ones((3, 3)))
    for rule in (separate_means, stacked, ffa):
        with pytest.raises(ShapeError, match=r"\(5, 3\)"):
            rule([one, other], [1, 1])
        with pytest.raises(UpdateError, match="no site"):
            rule([], [])
    with pytest.raises(ShapeError):
        mean_product([(one, 1.0), (other, 1.0)])
    with pytest.raises(ShapeError):
        concatenate([one, other])
    with pytest.raises(InputError, match="2 sites have 1 weights"):
        stacked([one, one], [1])
    narrow = Factors(np.ones((4, 1)), np.ones((1, 3)))
    with pytest.raises(InputError, match="ranks 2, 1"):
        fedex([one, narrow], [1, 1])
    with pytest.raises(UpdateError, match="too large for float32"):
        Factors(np.full((1, 1), 1e30), np.full((1, 1), 1.0), 1e30).to_float32()
