"""One vector in 8-bit codes: version 1 of the wire form, which runs send today.

An update is one vector, all tensors flattened in the order of their names. It travels as
8-bit integer codes with one float32 scale per block, so a block's largest value is exact
to half a step. Sizes, types and finiteness are checked before anything is added up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError
from mutirao.federated.codec.blocks import GRIDS, dequantize_blocks, quantize_blocks, to_blocks

BLOCK_SIZE = 256
"""Values that share a scale: 4 bytes of scale per 256 codes add 1.6 %."""
_GRID = GRIDS["int8"]


@dataclass(frozen=True)
class EncodedUpdate:
    """An update as it travels: N values in ceil(N / BLOCK_SIZE) blocks."""

    codes: NDArray[np.int8]
    """(N,) integer codes."""
    scales: NDArray[np.float32]
    """(blocks,) value of one step in each block."""

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def sha256(self) -> str:
        """Hash of the content, for logs."""
        return hashlib.sha256(self.codes.tobytes() + self.scales.tobytes()).hexdigest()


def encode_update(vector: NDArray[np.float32]) -> EncodedUpdate:
    """Round an update to 8 bits in blocks.

    Args:
        vector: (N,) float32 values.

    Raises:
        UpdateError: a value is not finite; such an update must not leave the site.
    """
    if not np.isfinite(vector).all():
        raise UpdateError("this site's update has values that are not finite; it was not sent")
    codes_BK, scales = quantize_blocks(to_blocks(vector, BLOCK_SIZE), _GRID)
    return EncodedUpdate(codes_BK.reshape(-1)[: vector.size].copy(), scales)


def decode_update(update: EncodedUpdate, size: int) -> NDArray[np.float32]:
    """Return the update's values.

    Args:
        update: what a site sent; not trusted.
        size: number of values that is expected.

    Raises:
        UpdateError: types or sizes are wrong, or a scale or value is not finite.
    """
    codes, scales = update.codes, update.scales
    num_blocks = -(-size // BLOCK_SIZE)
    if codes.dtype != np.int8 or scales.dtype != np.float32:
        raise UpdateError(
            f"an update came as {codes.dtype} codes and {scales.dtype} scales "
            "(expected int8 and float32)"
        )
    if codes.shape != (size,) or scales.shape != (num_blocks,):
        raise UpdateError(
            f"an update has {codes.shape} codes and {scales.shape} scales "
            f"(expected ({size},) and ({num_blocks},))"
        )
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise UpdateError("an update has a scale that is negative or not finite")
    values = dequantize_blocks(to_blocks(codes, BLOCK_SIZE), scales, _GRID).reshape(-1)[:size]
    if not np.isfinite(values).all():
        raise UpdateError("an update has values too large for float32")
    return values
