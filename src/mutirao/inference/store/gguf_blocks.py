"""GGUF's quantized blocks taken apart, and put together again.

Codes come out by lines and scales by lanes, as ``planes`` stores them. Block layouts and the
order of codes are those of ggml (github.com/ggml-org/ggml, src/ggml-common.h and the
dequantize functions of src/ggml-quants.c).

Shape letters: P panels, R the 16 rows of a panel, S GGUF blocks along a row, B bytes of a
block, C its codes, G its blocks of 32 columns, J the 8 lines of such a block, L the 64
bytes of a line.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mutirao.inference.store.plane_formats import BLOCK_COLUMNS, LINE_BYTES, PANEL_ROWS, Format

Bytes = NDArray[np.uint8]

_ONE, _TWO, _FOUR = np.uint8(1), np.uint8(2), np.uint8(4)
_LOW_FOUR, _LOW_SIX, _UPPER_TWO = np.uint8(15), np.uint8(63), np.uint8(48)


def lane_codes(blocks_PRSB: Bytes, name: str) -> Bytes:
    """Return the codes of blocks, by lines.

    Args:
        blocks_PRSB: GGUF blocks.
        name: a quantized format.

    Returns:
        uint8 (G, J, P, S, L): line j of the block of 32 columns number S * G + g of a row.
    """
    if name == "Q8_0":
        return (lanes(blocks_PRSB[..., 2:]) ^ np.uint8(0x80))[None]
    if name == "Q6_K":
        return _codes_of_q6_k(blocks_PRSB)
    if name in ("Q4_K", "Q5_K"):
        return _codes_of_q45_k(blocks_PRSB, name)
    nibbles = lanes(blocks_PRSB[..., -16:])
    codes = np.concatenate((nibbles & _LOW_FOUR, nibbles >> _FOUR))
    if name in ("Q5_0", "Q5_1"):
        fifth = np.ascontiguousarray(blocks_PRSB[..., -20:-16])
        codes |= lanes(np.unpackbits(fifth, axis=-1, bitorder="little")) << _FOUR
    return codes[None]


def _codes_of_q45_k(blocks_PRSB: Bytes, name: str) -> Bytes:
    panels, _, blocks, _ = blocks_PRSB.shape
    nibbles = lanes(blocks_PRSB[..., -128:]).reshape(4, 1, 8, panels, blocks, LINE_BYTES)
    codes = np.concatenate((nibbles & _LOW_FOUR, nibbles >> _FOUR), axis=1)
    codes = codes.reshape(8, 8, panels, blocks, LINE_BYTES)
    if name == "Q5_K":
        fifth = lanes(blocks_PRSB[..., 16:48])
        for group in range(8):
            codes[group] |= ((fifth >> np.uint8(group)) & _ONE) << _FOUR
    return codes


def _codes_of_q6_k(blocks_PRSB: Bytes) -> Bytes:
    panels, _, blocks, _ = blocks_PRSB.shape
    tail = (panels, blocks, LINE_BYTES)
    codes = np.empty((8, 8, *tail), np.uint8)
    low = lanes(blocks_PRSB[..., :128]).reshape(2, 2, 8, *tail)
    high = lanes(blocks_PRSB[..., 128:192]).reshape(2, 8, *tail)
    for group in range(8):
        half, quarter = divmod(group, 4)
        nibble, part = divmod(quarter, 2)
        np.right_shift(low[half, part], np.uint8(4 * nibble), out=codes[group])
        codes[group] &= _LOW_FOUR
        codes[group] |= ((high[half] >> np.uint8(2 * quarter)) & np.uint8(3)) << _FOUR
    return codes


def lanes(bytes_PRSB: Bytes) -> Bytes:
    """Bring four neighbouring bytes of the 16 rows together: (bytes / 4, P, S, 64)."""
    panels, _, blocks, _ = bytes_PRSB.shape
    words = np.ascontiguousarray(bytes_PRSB).view("<u4").transpose(3, 0, 2, 1)
    lanes = np.ascontiguousarray(words).view(np.uint8)
    return lanes.reshape(words.shape[0], panels, blocks, LINE_BYTES)


def write_codes(blocks_PRSB: Bytes, codes_PRSC: Bytes, name: str) -> None:
    """Write codes into GGUF blocks, in place.

    Args:
        blocks_PRSB: blocks to fill; their scales are left alone.
        codes_PRSC: uint8 codes, by columns.
        name: a quantized format.
    """
    if name == "Q8_0":
        blocks_PRSB[..., 2:] = codes_PRSC ^ np.uint8(0x80)
        return
    lead = codes_PRSC.shape[:3]
    nibbles, upper = codes_PRSC & _LOW_FOUR, codes_PRSC >> _FOUR
    if name == "Q6_K":
        pairs = nibbles.reshape(*lead, 2, 2, 64)
        place = slice(0, 128)
        fours = upper.reshape(*lead, 2, 4, 32) << (np.arange(4, dtype=np.uint8) * _TWO)[:, None]
        blocks_PRSB[..., 128:192] = np.bitwise_or.reduce(fours, axis=-2).reshape(*lead, 64)
    else:
        is_small = codes_PRSC.shape[-1] == BLOCK_COLUMNS
        pairs = nibbles.reshape(*lead, 1 if is_small else 4, 2, 16 if is_small else 32)
        place = slice(-16 if is_small else -128, None)
    packed = pairs[..., 0, :] | pairs[..., 1, :] << _FOUR
    blocks_PRSB[..., place] = packed.reshape(*lead, codes_PRSC.shape[-1] // 2)
    if name == "Q5_K":
        eights = upper.reshape(*lead, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
        blocks_PRSB[..., 16:48] = np.bitwise_or.reduce(eights, axis=-2)
    elif name in ("Q5_0", "Q5_1"):
        blocks_PRSB[..., -20:-16] = np.packbits(upper, axis=-1, bitorder="little")


def pack_scales(blocks_PRSB: Bytes, form: Format) -> Bytes:
    """Return the scales of blocks by lanes, uint8 (P, S, bytes); see ``planes``."""
    panels, _, blocks, _ = blocks_PRSB.shape
    shape = (panels, blocks, -1)

    def halves(begin: int) -> Bytes:
        pairs = blocks_PRSB[..., begin : begin + 2].transpose(0, 2, 1, 3)
        return np.ascontiguousarray(pairs).reshape(shape)

    if form.scales == "H":
        return halves(0)
    if form.scales == "HM":
        return np.concatenate((halves(0), halves(2)), axis=-1)
    if form.scales == "K8":
        fine = blocks_PRSB[..., 192:208].transpose(0, 2, 3, 1).reshape(shape)
        return np.concatenate((halves(208), fine), axis=-1)
    values = _read_six_bits(blocks_PRSB[..., 4:16]).reshape(shape)
    low = (values[..., :128] & _LOW_FOUR) | (values[..., 128:] << _FOUR)
    high = np.zeros((panels, blocks, 64), np.uint8)
    for group in range(4):
        high |= values[..., 64 * group : 64 * group + 64] >> _FOUR << np.uint8(2 * group)
    return np.concatenate((halves(0), halves(2), low, high), axis=-1)


def _read_six_bits(scales_PRSB: Bytes) -> Bytes:
    """Return the 8 scales and 8 minimums of Q4_K and Q5_K blocks, (P, S, 16, R)."""
    by_lane = scales_PRSB.transpose(0, 2, 3, 1)
    scale, minimum, both = by_lane[:, :, :4], by_lane[:, :, 4:8], by_lane[:, :, 8:]
    return np.concatenate(
        (
            scale & _LOW_SIX,
            (both & _LOW_FOUR) | ((scale >> _TWO) & _UPPER_TWO),
            minimum & _LOW_SIX,
            (both >> _FOUR) | ((minimum >> _TWO) & _UPPER_TWO),
        ),
        axis=2,
    )


def unpack_six_bits(stored_PSB: Bytes) -> Bytes:
    """Return the 8 scales and 8 minimums that K6 scales hold behind d and dmin, (P, S, 16, R)."""
    low, high = stored_PSB[..., :128], stored_PSB[..., 128:]
    values = np.concatenate((low & _LOW_FOUR, low >> _FOUR), axis=-1)
    upper = [(high >> np.uint8(2 * group)) & np.uint8(3) for group in range(4)]
    values |= np.concatenate(upper, axis=-1) << _FOUR
    return values.reshape(*stored_PSB.shape[:2], 16, PANEL_ROWS)


def write_scales(blocks_PRSB: Bytes, scales_PSB: Bytes, form: Format) -> None:
    """Write scales into GGUF blocks, in place.

    Args:
        blocks_PRSB: blocks to fill; their codes are left alone.
        scales_PSB: what ``pack_scales`` returned.
        form: a quantized format.
    """
    lead = scales_PSB.shape[:2]

    def halves(begin: int) -> Bytes:
        pairs = scales_PSB[..., begin : begin + 32].reshape(*lead, PANEL_ROWS, 2)
        return pairs.transpose(0, 2, 1, 3)

    if form.scales == "K8":
        blocks_PRSB[..., 208:210] = halves(0)
        fine = scales_PSB[..., 32:].reshape(*lead, 16, PANEL_ROWS)
        blocks_PRSB[..., 192:208] = fine.transpose(0, 3, 1, 2)
        return
    blocks_PRSB[..., :2] = halves(0)
    if form.scales != "H":
        blocks_PRSB[..., 2:4] = halves(32)
    if form.scales != "K6":
        return
    values = unpack_six_bits(scales_PSB[..., 64:]).transpose(0, 3, 1, 2)
    scale, minimum = values[..., :8], values[..., 8:]
    blocks_PRSB[..., 4:8] = scale[..., :4] | (scale[..., 4:] & _UPPER_TWO) << _TWO
    blocks_PRSB[..., 8:12] = minimum[..., :4] | (minimum[..., 4:] & _UPPER_TWO) << _TWO
    blocks_PRSB[..., 12:16] = (scale[..., 4:] & _LOW_FOUR) | minimum[..., 4:] << _FOUR
