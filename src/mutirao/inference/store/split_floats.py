"""Sixteen-bit floats as a coarse integer, which can draft, and an exact rest, which cannot.

A BF16 number takes 14.25 bits this way and an F16 number 16.25, without loss. In a block of 32
numbers of one row, let s be the power of two with 16 s <= the largest magnitude < 32 s; its
exponent is kept once for the block. Every number then lies in a cell: k s <= |w| < (k + 1) s,
k = 0..31, and the cell and the sign are a six-bit code, 32 + k or 31 - k, so that code - 31.5 is
the middle of the cell in units of s: the draft's reading.

Which number of its cell it is, the rest says. With M the values of a mantissa (128 in BF16, 1024
in F16), a cell of 2^f <= k < 2^(f + 1) holds M / 2^f numbers, and the rest has R values, 256 in
BF16 and 1024 in F16: the numbers of a cell leave most of them free. Cell 0 has no smallest
number; its upper octaves have rests of their own there, and what is smaller takes the free rests
of the cells 1, 2, 3 and so on, in order. Such small numbers are then drafted as something between
s and 32 s instead of almost nothing, which happens to one in fifty of normally distributed BF16
weights and costs the draft about as much as rounding does. Rest R - 1 of cell 0 is zero.

There is room for 59 octaves below s in BF16. A number below those that is not zero has no place:
the matrix is then stored as it is. F16 has no such numbers. Numbers are told apart by their
bits, so negative zero, infinities and NaN come back as they were.

Shape letters: R rows, C columns, G blocks of 32 columns.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError

BLOCK = 32
CODE_BITS = 6
CODE_CENTRE = 31.5
"""Code of zero, were there one: codes are the middles of their cells."""
CELL_OCTAVES = 5
"""The cells 1 to 31."""
NUM_CELLS = 32
REST_BITS = {7: 8, 10: 10}
"""By the bits of the mantissa."""
EXPONENT_BIAS = 127
"""Of the exponents that are kept: those of float32, whatever the numbers are."""

Numbers = NDArray[np.uint16]
Bytes = NDArray[np.uint8]


class SplitError(FormatError):
    """A block holds numbers too far apart to be split."""


@functools.cache
def _tables(mantissa_bits: int) -> tuple[Numbers, NDArray[np.int32]]:
    """Return where numbers go and where they come from.

    A slot is k * R + rest; a place is a number's bits less those of s.

    Returns:
        The slot of each place, beginning with the lowest place less one, which has none; and the
        place of each slot: of the slot of zero, the lowest less one.
    """
    size, num_rests = 1 << mantissa_bits, 1 << REST_BITS[mantissa_bits]
    slots = np.arange(num_rests * NUM_CELLS)
    k, rest = np.divmod(slots, num_rests)

    def begin(cell: NDArray[np.int64]) -> NDArray[np.int64]:
        octave = np.frexp(cell.astype(np.float64))[1] - 1
        begun: NDArray[np.int64] = octave * size + (cell << (mantissa_bits - octave)) - size
        return begun

    first, after = begin(np.maximum(k, 1)), begin(k + 1)
    zero = num_rests - 1
    small = slots - after
    places = np.where(small < zero, -1 - small, -small)
    places = np.where(rest < after - first, first + rest, places)
    places[zero] = nowhere = -_num_small(mantissa_bits)
    to_slot = np.full(slots.size, zero, np.uint16)
    to_slot[places - nowhere] = slots
    return to_slot, places.astype(np.int32)


def _num_small(mantissa_bits: int) -> int:
    """Return the rests that numbers below s have, the one of zero among them."""
    return (NUM_CELLS << REST_BITS[mantissa_bits]) - (CELL_OCTAVES << mantissa_bits)


def split(numbers_RC: Numbers, mantissa_bits: int) -> tuple[Bytes, Bytes, Numbers]:
    """Split numbers, given as their bits.

    Args:
        numbers_RC: bits of BF16 or F16 numbers; columns are whole blocks of 32.
        mantissa_bits: 7 of BF16, 10 of F16.

    Returns:
        Exponents, uint8 (R, G), s = 2^(exponent - 127); codes, uint8 (R, C), 0 to 63; and rests,
        uint16 (R, C), of 8 or 10 bits.

    Raises:
        SplitError: a number is too small beside the largest of its block.
    """
    to_slot, _ = _tables(mantissa_bits)
    magnitudes = (numbers_RC & 0x7FFF).astype(np.int32)
    blocks = magnitudes.reshape(len(numbers_RC), -1, BLOCK)
    largest = blocks.max(axis=2) >> mantissa_bits
    fields = np.maximum(largest - (CELL_OCTAVES - 1), 1)
    # Never too large: the largest of a block is below 32 s.
    places = blocks - (fields << mantissa_bits)[..., None]
    places += _num_small(mantissa_bits)
    is_zero = blocks == 0
    if np.any((places < 1) & ~is_zero):
        raise SplitError("a number is smaller than 2^-63 of the largest of its block")
    places[is_zero] = 0
    slots = to_slot[places].reshape(numbers_RC.shape)
    rest_bits = REST_BITS[mantissa_bits]
    cells = (slots >> rest_bits).astype(np.uint8)
    codes = np.where(numbers_RC >> 15, 31 - cells, 32 + cells).astype(np.uint8)
    exponents = (fields + _exponent_shift(mantissa_bits)).astype(np.uint8)
    return exponents, codes, slots & np.uint16((1 << rest_bits) - 1)


def join(
    exponents_RG: Bytes, codes_RC: Bytes, rests_RC: Numbers, mantissa_bits: int
) -> NDArray[np.uint16]:
    """Undo ``split``; see there for the arguments.

    Returns:
        The numbers' bits, uint16 (R, C).
    """
    _, from_slot = _tables(mantissa_bits)
    is_negative = codes_RC < NUM_CELLS
    codes = codes_RC.astype(np.int32)
    cells = np.where(is_negative, NUM_CELLS - 1 - codes, codes - NUM_CELLS)
    places = from_slot[(cells << REST_BITS[mantissa_bits]) | rests_RC]
    fields = exponents_RG.astype(np.int32) - _exponent_shift(mantissa_bits)
    starts = np.repeat(fields << mantissa_bits, BLOCK, axis=1)
    magnitudes = np.where(places == -_num_small(mantissa_bits), 0, starts + places)
    numbers: Numbers = (magnitudes | is_negative.astype(np.int32) << 15).astype(np.uint16)
    return numbers


def _exponent_shift(mantissa_bits: int) -> int:
    """Return what makes a number's exponent field one of float32."""
    own_bias = (1 << (14 - mantissa_bits)) - 1
    return EXPONENT_BIAS - own_bias
