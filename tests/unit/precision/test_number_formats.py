"""Bits are those of the layouts, names are read back, noise falls with bits and smaller groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError
from mutirao.precision.code_points import float_levels, nf4_levels
from mutirao.precision.number_formats import FORMATS, integer_format, parse_format


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-sym-g128", 4.125),
        ("int4-g32", 4 + (16 + 4) / 32),
        ("int8", 8 + (16 + 8) / 4096),
        ("mxfp8", 8.25),
        ("mxfp6", 6.25),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("nf4", 4.5),
        # Double quantization takes 0.127 bits in place of 0.5 (arXiv:2305.14314, section 3).
        ("nf4-dq", 4.127),
        ("fp8-e4m3-g128", 8.125),
        ("bf16", 16),
    ],
)
def test_bits_with_scales(name, bits):
    assert parse_format(name).bits_per_weight() == pytest.approx(bits, abs=5e-5)


def test_a_row_of_its_own_size_shares_the_scale():
    assert parse_format("int4-sym").bits_per_weight(row_size=64) == 4.25
    assert parse_format("int4-sym-g32").bits_per_weight(row_size=64) == 4.5
    assert parse_format("int4-sym").relative_noise(64) < parse_format("int4-sym").relative_noise()


@pytest.mark.parametrize(
    ("kind", "smallest", "top", "count"),
    [
        ((4, 3), 2.0**-9, 448, 253),
        ((5, 2), 2.0**-16, 57344, 247),
        ((3, 2), 2.0**-4, 28, 63),
        ((2, 3), 2.0**-3, 7.5, 63),
        ((2, 1), 0.5, 6, 15),
    ],
)
def test_small_floats_are_those_of_the_specifications(kind, smallest, top, count):
    levels = float_levels(*kind)
    assert len(levels) == count
    assert min(level for level in levels if level > 0) == smallest
    assert (min(levels), max(levels)) == (-top, top)
    assert list(levels) == sorted(set(levels))
    assert float_levels(2, 1)[8:] == (0.5, 1, 1.5, 2, 3, 4, 6)


def test_nf4_is_the_published_table():
    """arXiv:2305.14314, appendix E, to six digits."""
    published = [-0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050]
    published += [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957]
    inner = [level for level in nf4_levels() if level not in (-1, 0, 1)]
    assert len(nf4_levels()) == 16
    np.testing.assert_allclose(inner, published, atol=2e-6)


@given(bits=st.integers(2, 6), group=st.integers(8, 512), symmetric=st.booleans())
@settings(max_examples=25, deadline=None)
def test_more_bits_lose_less(bits, group, symmetric):
    coarse = integer_format(bits, group, symmetric=symmetric)
    fine = integer_format(bits + 1, group, symmetric=symmetric)
    assert 0 < fine.relative_noise() < coarse.relative_noise() < 1
    assert fine.equivalent_bits() > coarse.equivalent_bits()
    assert fine.bits_per_weight() > coarse.bits_per_weight()


@given(bits=st.integers(2, 6), group=st.integers(8, 512), symmetric=st.booleans())
@settings(max_examples=25, deadline=None)
def test_smaller_groups_lose_less_and_cost_more(bits, group, symmetric):
    small = integer_format(bits, group, symmetric=symmetric)
    large = integer_format(bits, 2 * group, symmetric=symmetric)
    assert small.relative_noise() < large.relative_noise()
    assert small.bits_per_weight() > large.bits_per_weight()


@pytest.mark.parametrize("row_size", [64, 4096])
@pytest.mark.parametrize("bits", range(2, 11))
def test_symmetric_integers_are_their_own_equivalent(bits, row_size):
    number_format = integer_format(bits, symmetric=True)
    assert number_format.equivalent_bits(row_size) == pytest.approx(bits, abs=1e-9)


def test_equivalent_bits_order_formats_by_noise():
    formats = sorted(FORMATS.values(), key=lambda each: -each.relative_noise())
    bits = [each.equivalent_bits() for each in formats]
    assert bits == sorted(bits)
    assert 6 < parse_format("mxfp8").equivalent_bits() < 7
    assert 9 < parse_format("bf16").equivalent_bits() < 12
    assert 1 < integer_format(1).equivalent_bits() < 2


@pytest.mark.parametrize("name", [*FORMATS, "int4-sym", "int3-sym-g64", "int2-g32", "fp6-e3m2-g64"])
def test_names_are_read_back(name):
    assert parse_format(name).name == name
    assert parse_format(f" {name.upper()} ") == parse_format(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4g32", "int4-g32"),
        ("", "expected int4-g32"),
        ("fp8-e2m1-g32", "not known"),
        ("fp8-e6m1-g32", "e6m1"),
        ("int11", "bits=11 is not accepted"),
        ("int1-sym", "expected 2 to 10"),
        ("int4-g4", "group_size=4 is not accepted"),
        ("int4-g99999", "group_size=99999"),
    ],
)
def test_what_is_no_format_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        parse_format(name)


def test_a_row_of_nothing_is_refused():
    with pytest.raises(InputError, match="row_size=2"):
        parse_format("int4").relative_noise(row_size=2)
