"""The fold: the same bits in any order, no overflow at the bounds, memory of one reply."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError, UpdateError
from mutirao.federated.accumulator import (
    FixedPointAccumulator,
    FixedPointSum,
    OrderedAccumulator,
)
from mutirao.federated.strategy import WeightedUpdate, mean_update

SHAPES = {"a": (5, 7), "b": (11,)}
SITES = ("north", "south", "east", "west", "centre")
TOKENS = dict(zip(SITES, (10_050, 7_001, 123, 50_000, 1), strict=True))


def _replies(seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    return {
        site: {n: rng.normal(scale=scale, size=s).astype(np.float32) for n, s in SHAPES.items()}
        for site in SITES
    }


def _fold(order, *, weights=None, clip=1.0):
    most = max(weights.values()) if weights else 1
    fold = FixedPointAccumulator(SHAPES, SITES, clip=clip, max_weight=most)
    for site in order:
        fold.add(site, _replies()[site], weights[site] if weights else 1)
    return fold


@settings(deadline=None, max_examples=30)
@given(st.permutations(SITES), st.sampled_from([None, TOKENS]))
def test_any_order_gives_the_same_hash_and_mean(order, weights):
    one, other = _fold(SITES, weights=weights), _fold(order, weights=weights)
    assert one.sha256 == other.sha256
    for name in SHAPES:
        assert one.mean()[name].tobytes() == other.mean()[name].tobytes()


def test_the_hash_tells_other_values_weights_and_sites():
    hashes = {_fold(SITES).sha256, _fold(SITES[1:]).sha256, _fold(SITES, weights=TOKENS).sha256}
    assert len(hashes) == 3


@pytest.mark.parametrize("change", [{"site": "south"}, {"weight": 2}, {"clip": 4.0}])
def test_the_hash_tells_equal_sums_of_others_apart(change):
    def hash_of(site="north", weight=1, clip=1.0):
        fold = FixedPointAccumulator(SHAPES, SITES, clip=clip, max_weight=3)
        fold.add(
            site, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, weight
        )
        return fold.sha256

    assert hash_of() != hash_of(**change)


@pytest.mark.parametrize("weights", [None, TOKENS])
def test_the_mean_is_the_exact_one_to_half_a_step(weights):
    fold = _fold(SITES, weights=weights)
    replies = _replies()
    used = weights or dict.fromkeys(SITES, 1)
    for name in SHAPES:
        found = fold.mean()[name].reshape(-1)
        for place, value in enumerate(found):
            exact = sum(
                Fraction(float(replies[s][name].reshape(-1)[place])) * used[s] for s in SITES
            ) / sum(used.values())
            half_step = Fraction(1, 2 ** (fold.fixed_point.fraction_bits + 1))
            rounding = abs(exact) / 2**24
            assert abs(Fraction(float(value)) - exact) <= half_step + rounding


@settings(deadline=None, max_examples=200)
@given(
    st.floats(1e-30, 1e30),
    st.integers(1, 5000),
    st.integers(1, 2**26),
)
def test_no_sum_can_overflow(clip, num_sites, max_weight):
    fixed = FixedPointSum(clip, num_sites, max_weight)
    at_clip = np.float32(clip)
    if at_clip > clip:
        at_clip = np.nextafter(at_clip, np.float32(0))
    largest = int(fixed.to_integers(np.array([at_clip]))[0])
    assert largest >= 2**22
    assert largest * num_sites * max_weight < 2**63


def test_sites_at_the_clip_with_the_largest_weight_add_up():
    sites = [f"s{number}" for number in range(7)]
    fold = FixedPointAccumulator({"t": (3,)}, sites, clip=0.3, max_weight=2**36)
    values = np.nextafter(np.float32(0.3), np.float32(0)) * np.array([1, -1, 1], np.float32)
    for site in sites:
        fold.add(site, {"t": values}, 2**36)
    assert (fold.mean()["t"] == values).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"clip": 0.0},
        {"clip": float("nan")},
        {"clip": float("inf")},
        {"num_sites": 0},
        {"max_weight": 0},
        {"num_sites": 2**20, "max_weight": 2**20},
    ],
)
def test_unsafe_bounds_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        FixedPointSum(**{"clip": 1.0, "num_sites": 3, "max_weight": 10, **bad})


def _altered(**tensors):
    return {**_replies()["north"], **tensors}


BAD_REPLIES = [
    ("north", _altered(a=np.zeros((7, 5), np.float32)), 1, "tensor 'a' as float32 of shape"),
    ("north", _altered(a=np.zeros((5, 7))), 1, "tensor 'a' as float64"),
    ("north", _altered(b=np.full(11, np.nan, np.float32)), 1, "'b' with values that are not fin"),
    ("north", _altered(b=np.full(11, -np.inf, np.float32)), 1, "'b' with values that are not fin"),
    ("north", _altered(c=np.zeros(1, np.float32)), 1, "tensor 'c' that was not agreed"),
    ("north", {"a": _replies()["north"]["a"]}, 1, "no tensor 'b'"),
    ("north", _replies()["north"], 0, "the weight 0"),
    ("stranger", _replies()["north"], 1, "in the name of 'stranger'"),
]


@pytest.mark.parametrize(("site", "tensors", "weight", "words"), BAD_REPLIES)
def test_a_bad_reply_counts_not_at_all(site, tensors, weight, words):
    for fold in (
        FixedPointAccumulator(SHAPES, SITES, clip=1.0, max_weight=5),
        OrderedAccumulator(SHAPES, ("north",)),
    ):
        before = fold.sha256
        with pytest.raises(UpdateError, match=words):
            fold.add(site, tensors, weight)
        assert fold.sha256 == before
        fold.add("north", _replies()["north"], 2)


def test_values_beyond_the_clip_are_refused_by_name():
    fold = FixedPointAccumulator(SHAPES, SITES, clip=1.0)
    for value in (1.5, -1.5):
        with pytest.raises(UpdateError, match=r"site north .* 'b' .* magnitude 1.5"):
            fold.add("north", _altered(b=np.full(11, value, np.float32)))
    with pytest.raises(UpdateError, match="weight 2"):
        fold.add("north", _replies()["north"], 2)


def test_nobody_counts_twice_and_nothing_has_no_mean():
    fold = FixedPointAccumulator(SHAPES, SITES, clip=1.0)
    with pytest.raises(UpdateError, match="no site"):
        fold.mean()
    fold.add("north", _replies()["north"])
    with pytest.raises(UpdateError, match="'north', which is not awaited"):
        fold.add("north", _replies()["north"])
    assert fold.weights == {"north": 1}


def test_in_order_it_is_the_mean_of_the_strategy_bit_for_bit():
    replies = _replies()
    fold = OrderedAccumulator(SHAPES, SITES)
    while (site := fold.next_site) is not None:
        fold.add(site, replies[site], TOKENS[site])
    for name in SHAPES:
        updates = {
            site: WeightedUpdate(replies[site][name].reshape(-1), float(TOKENS[site]))
            for site in SITES
        }
        assert fold.mean()[name].tobytes() == mean_update(updates).tobytes()
    assert fold.weights == TOKENS


def test_ordered_sites_wait_for_their_turn_and_lost_ones_are_skipped():
    fold = OrderedAccumulator(SHAPES, SITES, dtype="float32")
    assert fold.next_site == "centre"
    with pytest.raises(UpdateError, match="the next is centre"):
        fold.add("north", _replies()["north"])
    with pytest.raises(UpdateError, match="the next is centre"):
        fold.skip("north")
    fold.skip("centre")
    for site in ("east", "north", "south", "west"):
        fold.add(site, _replies()[site])
    assert fold.next_site is None
    with pytest.raises(UpdateError, match="all were added"):
        fold.add("west", _replies()["west"])
    expected = np.mean([_replies()[site]["a"] for site in SITES[:4]], axis=0)
    assert fold.mean()["a"] == pytest.approx(expected, abs=1e-8)


def test_a_sum_out_of_float32_is_named():
    fold = OrderedAccumulator({"t": (2,)}, ("a", "b"), dtype="float32")
    for site in ("a", "b"):
        fold.add(site, {"t": np.full(2, 3e38, np.float32)})
    with pytest.raises(UpdateError, match="'t' is too large"):
        fold.mean()


def _peak_bytes(num_sites, make):
    size = 200_000
    tracemalloc.start()
    try:
        fold = make({"t": (size,)}, [f"s{number:03d}" for number in range(num_sites)])
        for number in range(num_sites):
            fold.add(f"s{number:03d}", {"t": np.full(size, 0.1 * number, np.float32)})
        mean = fold.mean()["t"]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.allclose(mean, 0.05 * (num_sites - 1), rtol=1e-5)
    return peak_bytes


@pytest.mark.parametrize(
    "make",
    [lambda shapes, sites: FixedPointAccumulator(shapes, sites, clip=100.0), OrderedAccumulator],
)
def test_memory_does_not_grow_with_the_number_of_sites(make):
    few, many = _peak_bytes(2, make), _peak_bytes(40, make)
    assert many < few + 100_000
    assert many < 200_000 * 22 + 4_000_000
