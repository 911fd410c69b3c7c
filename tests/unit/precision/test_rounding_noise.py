"""Computed noise against noise of drawn weights, rounded by code that shares nothing with it."""

import math

import numpy as np
import pytest

from mutirao.precision.number_formats import parse_format

SMALL_FLOATS = {"e4m3": (4, 3, 448), "e5m2": (5, 2, 57344), "e3m2": (3, 2, 28), "e2m3": (2, 3, 7.5)}
SMALL_FLOATS["e2m1"] = (2, 1, 6)


def round_float(x, kind):
    """To the nearest number of a float, by its exponent; saturates."""
    exponent_bits, mantissa_bits, top = SMALL_FLOATS[kind]
    x = np.clip(x, -top, top)
    lowest = 2 - 2 ** (exponent_bits - 1)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(np.abs(x))), lowest)
    unit = np.exp2(exponent - mantissa_bits)
    return np.rint(x / unit) * unit


def round_symmetric(blocks, bits):
    top = 2 ** (bits - 1) - 1
    scale = np.abs(blocks).max(axis=1, keepdims=True) / top
    return np.rint(blocks / scale) * scale


def round_asymmetric(blocks, bits):
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
    high = np.maximum(blocks.max(axis=1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(blocks / scale) + zero, 0, 2**bits - 1) - zero) * scale


def round_absmax_float(blocks, kind):
    scale = np.abs(blocks).max(axis=1, keepdims=True) / SMALL_FLOATS[kind][2]
    return round_float(blocks / scale, kind) * scale


def round_microscaling(blocks, kind):
    peak_exponent = np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True)))
    scale = np.exp2(peak_exponent - math.floor(math.log2(SMALL_FLOATS[kind][2])))
    return round_float(blocks / scale, kind) * scale


def round_nvfp4(blocks, _):
    tensor_scale = np.abs(blocks).max() / (448 * 6)
    scale = round_float(np.abs(blocks).max(axis=1, keepdims=True) / 6 / tensor_scale, "e4m3")
    return round_float(blocks / (scale * tensor_scale), "e2m1") * scale * tensor_scale


def round_nf4(blocks, _):
    """Points as published (arXiv:2305.14314, appendix E), to four digits."""
    below = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
    above = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
    points = np.array([*below, 0, *above])
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - points).argmin(axis=-1)
    return points[nearest] * scale


@pytest.mark.parametrize(
    ("name", "rounding", "argument", "block"),
    [
        ("int2-sym-g32", round_symmetric, 2, 32),
        ("int4-sym-g128", round_symmetric, 4, 128),
        ("int8-sym-g32", round_symmetric, 8, 32),
        ("int2-g32", round_asymmetric, 2, 32),
        ("int3-g128", round_asymmetric, 3, 128),
        ("int4-g8", round_asymmetric, 4, 8),
        ("int4-g32", round_asymmetric, 4, 32),
        ("int8-g32", round_asymmetric, 8, 32),
        ("fp8-e4m3-g128", round_absmax_float, "e4m3", 128),
        ("fp8-e5m2-g32", round_absmax_float, "e5m2", 32),
        ("fp6-e3m2-g32", round_absmax_float, "e3m2", 32),
        ("mxfp8", round_microscaling, "e4m3", 32),
        ("mxfp6-e2m3", round_microscaling, "e2m3", 32),
        ("mxfp4", round_microscaling, "e2m1", 32),
        ("nvfp4", round_nvfp4, None, 16),
        ("nf4", round_nf4, None, 64),
    ],
)
def test_noise_is_that_of_drawn_weights(name, rounding, argument, block):
    rng = np.random.default_rng(0)
    ratios = []
    for phase in np.linspace(0, 1, 8, endpoint=False):  # places between two powers of two
        blocks = rng.normal(size=(80_000 // block, block)) * 2**phase
        error = np.square(rounding(blocks, argument) - blocks).sum()
        ratios.append(error / np.square(blocks).sum())
    assert parse_format(name).relative_noise() == pytest.approx(np.mean(ratios), rel=0.02)


@pytest.mark.parametrize(("name", "mantissa_bits"), [("bf16", 7), ("fp16", 10)])
def test_a_cast_loses_what_its_mantissa_cannot_hold(name, mantissa_bits):
    x = np.random.default_rng(0).normal(size=400_000)
    mantissa, exponent = np.frexp(x)
    rounded = np.ldexp(np.rint(mantissa * 2 ** (mantissa_bits + 1)), exponent - mantissa_bits - 1)
    noise = np.square(rounded - x).mean() / np.square(x).mean()
    assert parse_format(name).relative_noise() == pytest.approx(noise, rel=0.02)


def test_many_levels_end_at_a_twelfth_of_the_squared_step():
    """Uniform error within a step, E[peak²] / 127² / 12, for all but the peak, which is exact."""
    peaks = np.abs(np.random.default_rng(1).normal(size=(20_000, 64))).max(axis=1)
    expected = np.square(peaks).mean() / 127**2 / 12 * 63 / 64
    assert parse_format("int8-sym-g64").relative_noise() == pytest.approx(expected, rel=0.01)
