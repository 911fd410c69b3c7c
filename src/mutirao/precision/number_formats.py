"""Number formats for weights: what a weight truly costs in them, and what rounding loses.

A format is a set of points and a rule for the scale of a block of weights: integers (symmetric,
or with a zero point), small floats of E exponent and M mantissa bits, the microscaling formats of
the Open Compute Project (blocks of 32, a power of two as scale), NVFP4 (blocks of 16, a scale in
E4M3) and NF4. ``parse_format`` reads names such as ``int4-g32``; ``FORMATS`` lists those without
parameters.

Two numbers matter for a law: the bits that a weight takes with its share of the scale, and the
relative noise power of rounding (see ``rounding_noise``). The second also gives *equivalent
integer bits*, by which formats of any kind are put on one axis. That a law measured on integers
holds for other formats of the same noise is an assumption, and is stated wherever it is made.

Left out: activations, formats with several scales of different widths in one block (GGUF's
k-quants), vector codebooks, and the packing into bytes, which is ``formats``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np

from mutirao.errors import InputError
from mutirao.precision.code_points import float_levels, nf4_levels
from mutirao.precision.rounding_noise import (
    Floats,
    absmax_noise,
    cast_noise,
    e4m3_scale,
    exact_scale,
    power_of_two_scale,
    range_noise,
)

ROW_SIZE = 4096
"""Weights in a row where a format has one scale for each row. Assumption; pass a model's own."""
MAX_INTEGER_BITS = 10


class Scale(Enum):
    """How a block's scale is chosen and kept."""

    ABSMAX = "absmax"
    """Largest magnitude; kept in 16 or 32 bits, whose own rounding is not counted."""
    POWER_OF_TWO = "e8m0"
    """The power of two below it, in 8 bits."""
    E4M3 = "e4m3"
    """Largest magnitude, rounded to a float of 8 bits."""
    RANGE = "range"
    """Lowest to highest weight, with a zero point."""
    NONE = "none"
    """No scale: a plain cast."""


_SCALE_RULES = {
    Scale.ABSMAX: exact_scale,
    Scale.POWER_OF_TWO: power_of_two_scale,
    Scale.E4M3: e4m3_scale,
}


@dataclass(frozen=True)
class NumberFormat:
    """One format. Its constructors below know the points; this class only counts."""

    name: str
    code_bits: int
    """Bits of a code, without scales."""
    levels: tuple[float, ...]
    """Points in ascending order, in units of the scale; empty for a plain cast."""
    scale: Scale
    group_size: int | None = None
    """Weights that share a scale; None for a whole row."""
    scale_bits: float = 16
    """Bits of a scale."""
    zero_bits: float = 0
    """Bits of a zero point."""
    mantissa_bits: int = 0
    """Bits after the leading one, of a plain cast."""

    def bits_per_weight(self, row_size: int = ROW_SIZE) -> float:
        """Return what a weight takes in memory, its share of scale and zero point included.

        Args:
            row_size: weights in a row, which share a scale where ``group_size`` is None.
        """
        if self.scale is Scale.NONE:
            return float(self.code_bits)
        return self.code_bits + (self.scale_bits + self.zero_bits) / self._block(row_size)

    def relative_noise(self, row_size: int = ROW_SIZE) -> float:
        """Return the rounding error's power over the weights' power, for Gaussian weights.

        Args:
            row_size: weights in a row; as above.
        """
        return _noise(self, self._block(row_size))

    def equivalent_bits(self, row_size: int = ROW_SIZE) -> float:
        """Return the bits of a symmetric integer, one scale a row, with the same noise.

        Between whole numbers of bits log noise is interpolated along the log of the number of
        steps, 2^(bits - 1) - 1; past the ends (2 and 10 bits) it goes on as it came.
        """
        log_steps, log_noises = _integer_noises(row_size)
        log_noise = math.log(self.relative_noise(row_size))
        end = int(np.clip(np.searchsorted(-log_noises, -log_noise), 1, len(log_noises) - 1))
        (x0, x1), (y0, y1) = log_steps[end - 1 : end + 1], log_noises[end - 1 : end + 1]
        return float(1 + np.log2(1 + np.exp(x0 + (log_noise - y0) * (x1 - x0) / (y1 - y0))))

    def _block(self, row_size: int) -> int:
        block = self.group_size or row_size
        if block < 3:
            raise InputError(f"row_size={row_size} is not accepted (expected at least 3)")
        return block


def integer_format(
    bits: int, group_size: int | None = None, *, symmetric: bool = False, scale_bits: float = 16
) -> NumberFormat:
    """Return an integer format.

    Args:
        bits: bits of a code, 1 (symmetric: 2) to 10.
        group_size: weights that share a scale, at least 8; None for a whole row.
        symmetric: codes from -(2^(bits - 1) - 1) up to the same, no zero point; otherwise from
            lowest to highest weight, with a zero point of as many bits as a code.
        scale_bits: bits of a scale.

    Raises:
        InputError: a value is out of range.
    """
    lowest = 2 if symmetric else 1
    if not lowest <= bits <= MAX_INTEGER_BITS:
        raise InputError(
            f"bits={bits} is not accepted (expected {lowest} to {MAX_INTEGER_BITS}); floats of 16 "
            "bits are bf16 and fp16"
        )
    name = f"int{bits}" + ("-sym" if symmetric else "") + _group_suffix(group_size)
    top = 2 ** (bits - 1) - 1
    levels = range(-top, top + 1) if symmetric else range(2**bits)
    return NumberFormat(
        name,
        code_bits=bits,
        levels=tuple(map(float, levels)),
        scale=Scale.ABSMAX if symmetric else Scale.RANGE,
        group_size=group_size,
        scale_bits=scale_bits,
        zero_bits=0 if symmetric else bits,
    )


def float_format(
    exponent_bits: int, mantissa_bits: int, group_size: int | None = None
) -> NumberFormat:
    """Return a small float, scaled so that a block's peak is its highest number.

    Args:
        exponent_bits: E, 2 to 5.
        mantissa_bits: M, 1 to 3.
        group_size: weights that share a scale, in 16 bits; None for a whole row.

    Raises:
        InputError: the pair is none of E4M3, E5M2, E3M2, E2M3, E2M1.
    """
    kind = f"e{exponent_bits}m{mantissa_bits}"
    bits = 1 + exponent_bits + mantissa_bits
    return NumberFormat(
        f"fp{bits}-{kind}" + _group_suffix(group_size),
        code_bits=bits,
        levels=float_levels(exponent_bits, mantissa_bits),
        scale=Scale.ABSMAX,
        group_size=group_size,
    )


def _group_suffix(group_size: int | None) -> str:
    if group_size is None:
        return ""
    if not 8 <= group_size <= 65536:
        raise InputError(f"group_size={group_size} is not accepted (expected 8 to 65536)")
    return f"-g{group_size}"


@lru_cache(maxsize=1024)
def _noise(number_format: NumberFormat, block: int) -> float:
    if number_format.scale is Scale.NONE:
        return cast_noise(number_format.mantissa_bits)
    if number_format.scale is Scale.RANGE:
        return range_noise(len(number_format.levels), block)
    return absmax_noise(number_format.levels, block, _SCALE_RULES[number_format.scale])


@lru_cache(maxsize=64)
def _integer_noises(row_size: int) -> tuple[Floats, Floats]:
    """Log number of steps and log noise of symmetric integers of 2 to 10 bits."""
    formats = [integer_format(bits, symmetric=True) for bits in range(2, MAX_INTEGER_BITS + 1)]
    log_steps = np.log([each.levels[-1] for each in formats])
    return log_steps, np.log([each.relative_noise(row_size) for each in formats])


def _microscaling(name: str, exponent_bits: int, mantissa_bits: int) -> NumberFormat:
    return NumberFormat(
        name,
        code_bits=1 + exponent_bits + mantissa_bits,
        levels=float_levels(exponent_bits, mantissa_bits),
        scale=Scale.POWER_OF_TWO,
        group_size=32,
        scale_bits=8,
    )


def _known_formats() -> dict[str, NumberFormat]:
    nf4, fp4 = nf4_levels(), float_levels(2, 1)
    known = [
        NumberFormat("bf16", 16, (), Scale.NONE, mantissa_bits=7),
        NumberFormat("fp16", 16, (), Scale.NONE, mantissa_bits=10),
        *(float_format(e, m) for e, m in ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1))),
        _microscaling("mxfp8-e4m3", 4, 3),
        _microscaling("mxfp8-e5m2", 5, 2),
        _microscaling("mxfp6-e2m3", 2, 3),
        _microscaling("mxfp6-e3m2", 3, 2),
        _microscaling("mxfp4", 2, 1),
        # The tensor's own scale, 32 bits, is not counted: it is shared by a whole layer.
        NumberFormat("nvfp4", 4, fp4, Scale.E4M3, group_size=16, scale_bits=8),
        NumberFormat("nf4", 4, nf4, Scale.ABSMAX, group_size=64, scale_bits=32),
        # Scales in 8 bits, in blocks of 256 with a scale of their own; their rounding is not
        # in the noise.
        NumberFormat("nf4-dq", 4, nf4, Scale.ABSMAX, group_size=64, scale_bits=8 + 32 / 256),
        *(integer_format(bits) for bits in range(2, 9)),
    ]
    return {each.name: each for each in known}


FORMATS = _known_formats()
"""Formats that have no parameter left, by name."""

_ALIASES = {"mxfp8": "mxfp8-e4m3", "mxfp6": "mxfp6-e2m3", "fp8": "fp8-e4m3", "fp4": "fp4-e2m1"}
_INTEGER = re.compile(r"int(\d{1,2})(-sym)?(?:-g(\d{1,5}))?")
_FLOAT = re.compile(r"fp(\d)-e(\d)m(\d)-g(\d{1,5})")


def parse_format(name: str) -> NumberFormat:
    """Return the format of a name.

    Args:
        name: one of ``FORMATS``; ``int4``, ``int4-g32``, ``int4-sym-g128`` and the like; or a
            float with a group, as in ``fp8-e4m3-g128``. Without a group, a row has one scale.

    Raises:
        InputError: the name is none of these, or a number in it is out of range.
    """
    text = name.strip().lower()
    text = _ALIASES.get(text, text)
    if text in FORMATS:
        return FORMATS[text]
    if found := _INTEGER.fullmatch(text):
        bits, symmetric, group = found.groups()
        return integer_format(int(bits), int(group) if group else None, symmetric=bool(symmetric))
    if found := _FLOAT.fullmatch(text):
        bits, exponent, mantissa, group = map(int, found.groups())
        if bits == 1 + exponent + mantissa:
            return float_format(exponent, mantissa, group)
    raise InputError(
        f"number format {name!r} is not known (expected int4-g32, int4-sym-g128 or the like, or "
        f"one of {', '.join(FORMATS)})"
    )
