"""Rounding: to nearest with ties to even, or stochastic from a seed; and bfloat16.

Stochastic rounding goes up with the probability of the remainder, so its mean is the value
itself (Gupta et al. 2015, arXiv:1502.02551). Its random bits are the raw output of Philox (Salmon
et al. 2011), whose stream numpy keeps the same from version to version and machine to machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_LARGEST_BFLOAT16 = np.uint32(0x7F7F)
_MAGNITUDE = np.uint32(0x7FFF)
_SIGN = np.uint32(0x8000)
_HALF = np.uint32(16)


class Dither:
    """A stream of random bits that depends on a seed and a tensor's name alone."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def draw(self, num_values: int, num_bits: int) -> NDArray[np.uint64]:
        """Return the next values, each uniform in [0, 2^num_bits)."""
        raw = np.asarray(self._generator.random_raw(num_values), np.uint64)
        return raw >> np.uint64(64 - num_bits)


def round_values(values: NDArray[np.float32], dither: Dither | None) -> NDArray[np.float32]:
    """Round to whole numbers: to nearest, ties to even, or with dither up or down at random.

    Args:
        values: of magnitude below 2^23.
        dither: random bits, or None for the nearest.

    Returns:
        Whole numbers, float32, in the same shape.
    """
    if dither is None:
        return np.rint(values)
    below = np.floor(values)
    draws = dither.draw(values.size, 24).astype(np.float32).reshape(values.shape)
    return below + (draws * np.float32(2.0**-24) < values - below)


def to_bfloat16(values_N: NDArray[np.float32], dither: Dither | None) -> NDArray[np.uint16]:
    """Round to bfloat16, the upper half of a float32.

    Args:
        values_N: (N,) finite. Beyond the largest bfloat16 (3.39e38) they become the largest.
        dither: random bits, or None for the nearest, ties to even.

    Returns:
        (N,) bit patterns.
    """
    words = values_N.view(np.uint32)
    if dither is None:
        carried = words + np.uint32(0x7FFF) + ((words >> _HALF) & np.uint32(1))
    else:
        carried = words + dither.draw(values_N.size, 16).astype(np.uint32)
    halves = carried >> _HALF
    magnitude = np.minimum(halves & _MAGNITUDE, _LARGEST_BFLOAT16)
    return np.asarray((halves & _SIGN) | magnitude, np.uint16)


def from_bfloat16(halves_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bit patterns, exactly."""
    return (halves_N.astype(np.uint32) << _HALF).view(np.float32)
