"""Floats as integer codes whose sum over all sites cannot overflow.

A value is clipped to ± ``clip`` and rounded to the nearest multiple of 1 / ``scale``, so
that it is off by at most half a step if it was not clipped. The codes are signed; how
many bits their sum needs follows from the number of sites. Weights are not here: a site
multiplies its update before, and may send the weight as one more value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, UpdateError

MAX_MODULUS_BITS = 64
LARGEST_CODE = 2**53
"""Beyond it float64 cannot tell neighbouring integers apart."""


@dataclass(frozen=True)
class EncodedValues:
    """A vector as integer codes, and how much of it was clipped."""

    codes: NDArray[np.int64]
    """(N,) codes, each at most ``FixedPoint.largest_code`` in magnitude."""
    num_clipped: int
    """Values beyond the clip, for the log: they are not what the site computed."""


@dataclass(frozen=True)
class FixedPoint:
    """The grid on which all sites round.

    Raises:
        InputError: a setting is not finite and positive, or leaves no code or too many.
    """

    clip: float
    """Largest magnitude that is kept, in the unit of the values."""
    scale: float
    """Codes per unit; one step is 1 / scale."""

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("scale", self.scale)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"fixed_point.{name}={value} (expected a finite number above 0)")
        if not 0.5 < self.clip * self.scale <= LARGEST_CODE:
            raise InputError(
                f"fixed_point.clip={self.clip} times scale={self.scale} gives a largest code of "
                f"{self.clip * self.scale:.3g} (expected 1 to 2**53)"
            )

    @property
    def largest_code(self) -> int:
        """Magnitude of the code of a clipped value."""
        return round(self.clip * self.scale)

    def bits_needed(self, num_sites: int) -> int:
        """Return the fewest bits in which the signed sum of all sites' codes always fits."""
        return (num_sites * self.largest_code).bit_length() + 1

    def check_headroom(self, num_sites: int, modulus_bits: int) -> None:
        """Refuse a modulus in which the sum could wrap.

        Raises:
            InputError: the sum of ``num_sites`` codes needs more than ``modulus_bits``.
        """
        needed = self.bits_needed(num_sites)
        if needed > modulus_bits:
            raise InputError(
                f"modulus_bits={modulus_bits} could overflow: {num_sites} sites with clip "
                f"{self.clip} and scale {self.scale} need {needed} bits; lower the scale or the "
                f"clip, or raise modulus_bits (up to {MAX_MODULUS_BITS})"
            )

    def encode(self, values: NDArray[np.floating[Any]]) -> EncodedValues:
        """Clip and round to codes, half to even.

        Args:
            values: (N,) floats.

        Raises:
            UpdateError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise UpdateError("this site's update has values that are not finite; it was not sent")
        exact = values.astype(np.float64)
        num_clipped = int(np.count_nonzero(np.abs(exact) > self.clip))
        codes = np.rint(np.clip(exact, -self.clip, self.clip) * self.scale)
        return EncodedValues(codes.astype(np.int64), num_clipped)

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values of codes, or of a sum of codes, in the unit of the values.

        Args:
            codes: (N,) signed integers; exact up to 2**53.
        """
        return codes.astype(np.float64) / self.scale
