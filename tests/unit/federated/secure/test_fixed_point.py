"""Floats as codes: their error, their clip, and room for the sum."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutirao.errors import InputError, UpdateError
from mutirao.federated.secure.fixed_point import FixedPoint

GRID = FixedPoint(clip=2.0, scale=2.0**16)
SMALL = st.floats(-2.0, 2.0)


@given(st.lists(SMALL, min_size=1, max_size=40))
def test_error_is_at_most_half_a_step(values):
    encoded = GRID.encode(np.array(values))
    decoded = GRID.decode(encoded.codes)
    assert encoded.num_clipped == 0
    assert np.abs(decoded - np.array(values)).max() <= 0.5 / GRID.scale


def test_clipped_values_are_counted():
    encoded = GRID.encode(np.array([2.0, 2.5, -7.0, 0.0], np.float32))
    assert encoded.num_clipped == 2
    assert encoded.codes.tolist() == [131072, 131072, -131072, 0]
    assert GRID.largest_code == 131072


@given(
    st.integers(2, 1000),
    st.floats(1e-3, 1e3),
    st.floats(1e3, 1e9),
)
def test_bits_are_the_fewest_that_hold_the_sum(num_sites, clip, scale):
    grid = FixedPoint(clip=clip, scale=scale)
    bits, most = grid.bits_needed(num_sites), num_sites * grid.largest_code
    assert most <= 2 ** (bits - 1) - 1
    assert most > 2 ** (bits - 2) - 1
    assert grid.largest_code >= Fraction(clip) * Fraction(scale) - 1


def test_too_little_room_is_refused_with_the_bits_that_are_needed():
    GRID.check_headroom(60, 24)
    with pytest.raises(InputError, match=r"modulus_bits=23 could overflow: 60 sites .* 24 bits"):
        GRID.check_headroom(60, 23)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_settings_are_refused(bad):
    with pytest.raises(InputError, match=r"fixed_point\.clip"):
        FixedPoint(clip=bad, scale=1.0)
    with pytest.raises(InputError, match=r"fixed_point\.scale"):
        FixedPoint(clip=1.0, scale=bad)


@pytest.mark.parametrize(("clip", "scale"), [(0.1, 1.0), (1e300, 1e300), (2.0, 2.0**53)])
def test_grids_without_codes_or_with_too_many_are_refused(clip, scale):
    with pytest.raises(InputError, match=r"expected 1 to 2\*\*53"):
        FixedPoint(clip=clip, scale=scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_update_does_not_leave(bad):
    with pytest.raises(UpdateError, match="not finite"):
        GRID.encode(np.array([0.0, bad]))
