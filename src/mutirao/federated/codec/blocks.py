"""Integer codes of 8, 4 or 2 bits with one float32 scale per block of values.

A block's scale is the step between two codes, set by the block's largest magnitude, so no value
is off by more than half a step (a whole one with stochastic rounding), but for float32's own
rounding and for values below 1e-36, where float32 grows coarse. With 8 and 4 bits zero is a code.
With 2 bits it is not: the four codes stand for ±1/2 and ±3/2 steps, whose mean squared error on
values spread like a bell is less than half that of the levels -1, 0, 1; a block of zeros stays
zero.

Shapes: B blocks, K values in a block, N values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.codec.rounding import Dither, round_values

STRETCH = 65_536
"""Values worked on at a time: working memory does not grow with the tensor."""
SCALE_BYTES = 4

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Grid:
    """The values that a code can stand for: (code + offset) steps."""

    num_bits: int
    """Bits of a code on the wire, two's complement."""
    lowest: int
    """Lowest code."""
    highest: int
    """Highest code."""
    offset: float = 0.0
    """Added to each code, in steps."""

    def reach(self, dither: Dither | None) -> float:
        """Steps from zero to a block's largest value.

        The outermost code stands for all within half a step of it; stochastic rounding wants
        a code on either side of every value, or its mean is off.
        """
        return self.highest + self.offset * (2 if dither is None else 1)


GRIDS = {
    "int8": Grid(8, -127, 127),
    "int4": Grid(4, -7, 7),
    "int2": Grid(2, -2, 1, offset=0.5),
}


def stretches(num_values: int, block_size: int = 1) -> Iterator[slice]:
    """Cut values into stretches of whole blocks and, but for the last, whole bytes of codes."""
    whole = 4 * block_size
    step = max(1, STRETCH // whole) * whole
    for start in range(0, num_values, step):
        yield slice(start, min(start + step, num_values))


def quantize_blocks(
    blocks_BK: NDArray[np.float32], grid: Grid, dither: Dither | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round blocks of values to codes.

    Args:
        blocks_BK: (B, K) finite values.
        grid: what codes stand for.
        dither: random bits, or None for the nearest code.

    Returns:
        (B, K) codes, and (B,) scales: the value of one step in each block.
    """
    reach = np.float32(grid.reach(dither))
    scales_B = np.abs(blocks_BK).max(axis=1, initial=0.0) / reach
    scales_B = np.minimum(scales_B, _largest_scale(grid)).astype(np.float32)
    steps_B = np.where(scales_B > 0, scales_B, np.float32(1)).astype(np.float32)
    places_BK = (blocks_BK / steps_B[:, None] - np.float32(grid.offset)).astype(np.float32)
    rounded = round_values(places_BK, dither)
    return np.clip(rounded, grid.lowest, grid.highest).astype(np.int8), scales_B


def dequantize_blocks(
    codes_BK: NDArray[np.int8], scales_B: NDArray[np.float32], grid: Grid
) -> NDArray[np.float32]:
    """Return the values of codes, (B, K); infinite where a scale is too large for float32."""
    steps = codes_BK.astype(np.float32) + np.float32(grid.offset)
    with np.errstate(over="ignore"):
        steps *= scales_B[:, None]
    return steps


def to_blocks(values_N: NDArray[T], block_size: int) -> NDArray[T]:
    """Return values as (B, K), the last block filled up with zeros; a view where none is."""
    num_blocks = -(-values_N.size // block_size)
    if num_blocks * block_size == values_N.size:
        return values_N.reshape(num_blocks, block_size)
    padded = np.zeros(num_blocks * block_size, values_N.dtype)
    padded[: values_N.size] = values_N
    return padded.reshape(num_blocks, block_size)


def pack_codes(codes_N: NDArray[np.int8], num_bits: int) -> NDArray[np.uint8]:
    """Pack codes into bytes, the first code lowest; unused bits of the last byte are zero."""
    octets = codes_N.view(np.uint8)
    if num_bits == 8:
        return octets
    per_byte = 8 // num_bits
    fields = to_blocks(octets & np.uint8(2**num_bits - 1), per_byte)
    packed = fields[:, 0].copy()
    for place in range(1, per_byte):
        packed |= fields[:, place] << np.uint8(place * num_bits)
    return packed


def unpack_codes(octets: NDArray[np.uint8], num_bits: int) -> NDArray[np.int8]:
    """Return all codes that bytes hold, those of the last byte's unused bits too."""
    if num_bits == 8:
        return octets.view(np.int8)
    per_byte, sign = 8 // num_bits, np.uint8(2 ** (num_bits - 1))
    codes = np.empty((octets.size, per_byte), np.uint8)
    for place in range(per_byte):
        fields = (octets >> np.uint8(place * num_bits)) & np.uint8(2**num_bits - 1)
        codes[:, place] = (fields ^ sign) - sign  # two's complement, as uint8 wraps
    return codes.reshape(-1).view(np.int8)


def _largest_scale(grid: Grid) -> np.float32:
    """The largest scale whose outermost code is still a float32."""
    outermost = max(grid.highest + grid.offset, -(grid.lowest + grid.offset))
    largest = np.float32(np.finfo(np.float32).max / outermost)
    return np.float32(np.nextafter(largest, np.float32(0)))
