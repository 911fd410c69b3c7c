"""Products with matrices of every format, against the oracle's rounding and against each other.

The tolerance is a bound of float32's rounding, see ``kernel_calls.expected_product``, and two
millionths of the largest element; between instruction sets, arrangements of planes and numbers
of tokens there is none.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_calls import INSTRUCTION_SETS, Matrix, expected_product, is_supported, product
from tiny_gguf import FLOATS, HALVES, QUANTIZED, SPLITS, block_bytes

from mutirao.inference.store.plane_formats import FORMATS
from mutirao.inference.store.planes import floats_of

ROWS = (1, 15, 16, 17, 33)
MOST_TOKENS = 17
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
BLOCKS_32 = tuple(name for name in QUANTIZED if name not in K_QUANTS)


def columns_of(name):
    if name in FLOATS:
        return (1, 3, 50)
    if name in SPLITS:
        return (32, 96)
    return (256, 768) if name in K_QUANTS else (32, 96, 320)


def inputs(num_tokens, num_columns, seed=0):
    """Random numbers whose blocks differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tokens, num_columns))
    return (x * rng.choice([0.01, 1.0, 30.0], (num_tokens, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def isas(library):
    return [name for name in INSTRUCTION_SETS if is_supported(name)]


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *SPLITS])
def test_products(name, isas):
    num_planes = len(FORMATS[name].plane_widths)
    for rows, columns in itertools.product(ROWS, columns_of(name)):
        matrix = Matrix.random(name, rows, columns, seed=rows)
        x = inputs(MOST_TOKENS, columns, seed=columns)
        for planes in range(1, num_planes + 1):
            base = product(matrix, x, "scalar", num_planes=planes)
            expected, tolerance = expected_product(matrix, x, planes)
            assert (np.abs(base - expected) <= tolerance).all(), (rows, columns, planes)
            assert np.abs(base - expected).max() < 2e-6 * np.abs(expected).max()
            for isa, merged in itertools.product(isas, (False, True)):
                got = product(matrix, x, isa, num_planes=planes, merged=merged)
                np.testing.assert_array_equal(got, base, f"{rows} {columns} {planes} {isa}")


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, *SPLITS])
def test_a_tokens_product_does_not_depend_on_the_others(name, isas):
    columns = columns_of(name)[1]
    matrix = Matrix.random(name, 33, columns)
    x = inputs(MOST_TOKENS, columns)
    for isa, merged in itertools.product(isas, (False, True)):
        base = product(matrix, x, isa, merged=merged)
        for count in range(1, MOST_TOKENS):
            for begin in (0, MOST_TOKENS - count):
                got = product(matrix, x[begin : begin + count], isa, merged=merged)
                np.testing.assert_array_equal(got, base[begin : begin + count])


def test_fewer_planes_are_other_weights(isas):
    """The comparisons above would notice a plane that is left out."""
    for name in (*QUANTIZED, *SPLITS):
        matrix, x = Matrix.random(name, 16, 256), inputs(1, 256)
        for planes in range(2, len(FORMATS[name].plane_widths) + 1):
            fewer = product(matrix, x, isas[0], num_planes=planes - 1)
            expected, tolerance = expected_product(matrix, x, planes)
            assert (np.abs(fewer - expected) > 10 * tolerance).any()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "F16"])
def test_bias_and_addition(name, isa):
    matrix, x = Matrix.random(name, 33, 256), inputs(5, 256)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=33).astype(np.float32)
    before = rng.normal(size=(5, 33)).astype(np.float32)
    plain = product(matrix, x, isa)
    np.testing.assert_array_equal(product(matrix, x, isa, bias=bias), plain + bias)
    np.testing.assert_array_equal(product(matrix, x, isa, add_to=before), before + plain)
    both = product(matrix, x, isa, bias=bias, add_to=before)
    np.testing.assert_array_equal(both, before + (plain + bias))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "F32"])
def test_nothing_to_multiply(name, isa):
    columns = 256
    for rows, tokens in ((0, 3), (17, 0), (0, 0)):
        matrix = Matrix.random(name, rows, columns)
        assert product(matrix, inputs(tokens, columns), isa).shape == (tokens, rows)
    matrix, bias = Matrix.random(name, 17, 0), np.arange(17, dtype=np.float32)
    got = product(matrix, inputs(2, 0), isa, bias=bias)
    np.testing.assert_array_equal(got, [bias, bias])


@pytest.mark.parametrize("name", SPLITS)
def test_split_floats_are_multiplied_as_the_floats_they_are(name, isa):
    x = inputs(5, 96)
    split = Matrix.random(name, 33, 96)
    plain = Matrix.random(name.removesuffix("_SPLIT"), 33, 96)
    np.testing.assert_array_equal(product(split, x, isa), product(plain, x, isa))


def every_number(name):
    """A matrix of all finite numbers of a format, in no order, zeros and their signs included."""
    numbers = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16))
    if name == "F16_SPLIT":
        numbers[(numbers & 0x7C00) == 0x7C00] = 0x8000
    else:  # within 32 octaves
        numbers = (numbers & 0x8FFF) + 0x3000
        numbers[::7], numbers[3::7] = 0, 0x8000
    return numbers.reshape(512, 128)


@pytest.mark.parametrize("name", SPLITS)
def test_every_number_is_made_whole(name, isa):
    """Multiplied by the unit matrix: the sum of a number and zeros is itself."""
    numbers = every_number(name)
    split = Matrix.of(name, *numbers.shape, numbers.tobytes())
    expected = floats_of(numbers.tobytes(), name.removesuffix("_SPLIT")).reshape(numbers.shape)
    for merged in (False, True):
        got = product(split, np.eye(128, dtype=np.float32), isa, merged=merged)
        np.testing.assert_array_equal(got, expected.T)


def extreme_matrix(name, byte):
    """All codes at one end of their range, all scales 1."""
    size, num_bytes = block_bytes(name)
    rows, columns = 16, 512
    blocks = np.full((rows, columns // size, num_bytes), byte, np.uint8)
    for place in HALVES[name]:
        blocks[..., place : place + 2] = np.array([1.0], np.float16).view(np.uint8)
    return Matrix.of(name, rows, columns, blocks.tobytes())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_no_sum_of_the_largest_codes_overflows(name, byte, isas):
    matrix = extreme_matrix(name, byte)
    signs = np.ones((4, 512), np.float32)
    signs[1], signs[2, ::2], signs[3, ::3] = -1, -1, -1
    for planes in range(1, len(matrix.planes) + 1):
        expected, tolerance = expected_product(matrix, 127 * signs, planes)
        for isa, merged in itertools.product(isas, (False, True)):
            got = product(matrix, 127 * signs, isa, num_planes=planes, merged=merged)
            assert (np.abs(got - expected) <= tolerance).all(), (isa, merged, planes)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e-37, 9e-37, 1.1e-36, 1e-30, 1e30])
def test_very_small_and_large_activations(size, isas):
    for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K"):
        matrix = Matrix.random(name, 17, 256)
        x = (inputs(2, 256) * np.float32(size)).astype(np.float32)
        x[1, 32:64] = 1.0
        expected, tolerance = expected_product(matrix, x, len(matrix.planes))
        for isa in isas:
            got = product(matrix, x, isa)
            smallest = np.finfo(np.float32).tiny
            assert (np.abs(got - expected) <= tolerance + smallest).all(), (name, isa)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_with_its_token(name, value, isas):
    matrix, x = Matrix.random(name, 17, 256), inputs(5, 256)
    right = product(matrix, x, "scalar")
    x[2, 40] = value
    for isa in isas:
        got = product(matrix, x, isa)
        assert not np.isfinite(got[2]).any()
        others = [0, 1, 3, 4]
        np.testing.assert_array_equal(got[others], right[others])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_scale_that_is_no_number_stays_with_its_row(name, isas):
    size, num_bytes = block_bytes(name)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (17, 512 // size, num_bytes), np.uint8)
    for place in HALVES[name]:
        blocks[..., place : place + 2] = np.array([0.1], np.float16).view(np.uint8)
    x = inputs(3, 512)
    right = product(Matrix.of(name, 17, 512, blocks.tobytes()), x, "scalar")
    nan = np.array([np.nan], np.float16).view(np.uint8)
    blocks[5, 1, HALVES[name][0] : HALVES[name][0] + 2] = nan
    matrix = Matrix.of(name, 17, 512, blocks.tobytes())
    others = [row for row in range(17) if row != 5]
    for isa in isas:
        got = product(matrix, x, isa)
        assert np.isnan(got[:, 5]).all()
        np.testing.assert_array_equal(got[:, others], right[:, others])
