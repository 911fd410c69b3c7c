"""Quantized matrices as bit planes and scales, in panels of 16 rows.

A matrix of a GGUF file is turned, without loss and without a byte more, into what the
kernels read: the unsigned integer codes split into bit planes, most significant first, and
the block scales apart from them. 16-bit floats are split into such codes and a rest, which is
the last plane and makes them whole (``split_floats``). With all planes the weights are those of
the file; with the upper ones only, each dropped group of low bits reads as its midpoint. Block
layouts are those of ggml (github.com/ggml-org/ggml, src/ggml-common.h).

A plane of width w takes w lines of 64 bytes per panel and block of 32 columns. Inside a
block v[j][4 r + i] holds the plane's bits of row r of the panel, column 4 j + i, and

    w = 2: line l, byte b = sum over i of v[4 l + i][b] << 2 i      (i = 0..3)
    w = 1: byte b = sum over i of v[i][b] << i                      (i = 0..7)

Scales, per panel and group of columns, 16 lanes = 16 rows, little endian:

    H    d f16[16]                                                 per 32 columns
    HM   d f16[16], m f16[16]                                      per 32 columns
    K6   d f16[16], dmin f16[16], low u8[128], high u8[64]         per 256 columns
    K8   d f16[16], sc int8[16 sub-blocks of 16 columns][16]       per 256 columns
    E    u8[16], exponents of float32: d = 2^(e - 127)             per 32 columns

The 256 six-bit values of K6, u[e] with e = 16 i + lane (i = 0..7 scales, 8..15 minimums of
the sub-blocks of 32 columns), lie as low[t] = (u[t] & 15) | (u[t + 128] & 15) << 4 and
high[t] = sum over g of (u[64 g + t] >> 4) << 2 g. Rows that fill the last panel up have zero
codes and zero scales, or numbers of zero where floats are split. Whole float matrices
have no scales and one plane: [panel][column][16 rows].

The rest of split floats takes w lines as well: a plane of width 8, line j being v[j], with the low
bits, and where w = 10 behind it, block by block, one of width 2 with bits 8 and 9.

Shape letters: P panels, R the 16 rows of a panel, S GGUF blocks along a row, G blocks of 32
columns in a GGUF block, J the 8 quadruples of columns in a block of 32, B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError, ShapeError
from mutirao.inference.store.gguf_blocks import (
    Bytes,
    lane_codes,
    lanes,
    pack_scales,
    unpack_six_bits,
    write_codes,
    write_scales,
)
from mutirao.inference.store.plane_formats import (
    BLOCK_COLUMNS,
    FORMATS,
    LINE_BYTES,
    PANEL_ROWS,
    Format,
    find_format,
    num_panels,
    plane_panel_bytes,
    row_bytes,
    scales_panel_bytes,
)
from mutirao.inference.store.split_floats import (
    EXPONENT_BIAS,
    join,
    split,
)

__all__ = [
    "BLOCK_COLUMNS",
    "FORMATS",
    "LINE_BYTES",
    "PANEL_ROWS",
    "Format",
    "dequantize",
    "find_format",
    "floats_of",
    "num_panels",
    "pack",
    "plane_panel_bytes",
    "row_bytes",
    "scales_panel_bytes",
    "unpack",
    "unpack_codes",
    "unpack_scales",
]

Floats = NDArray[np.float32]
Buffer = Bytes | bytes | bytearray | memoryview

MANTISSA_BITS = {"BF16": 7, "F16": 10}
CHUNK_CODES = 1 << 19
"""Codes packed at a time, so that what is in between stays in a core's cache (assumption)."""


def pack(raw: Buffer, name: str, num_rows: int, num_columns: int) -> tuple[Bytes, list[Bytes]]:
    """Split rows of GGUF blocks into scales and bit planes, without loss.

    Args:
        raw: the rows' bytes as GGUF stores them, one row after the other.
        name: format, a key of ``FORMATS``.
        num_rows: rows, 0 or more.
        num_columns: columns, whole blocks of the format.

    Returns:
        The scales, uint8 (panels, GGUF blocks, bytes), and the planes, most significant
        first, uint8 (panels, blocks of 32 columns, width, 64); in the float formats empty
        scales and one plane (panels, columns, 16 rows' bytes).

    Raises:
        FormatError: unknown format.
        SplitError: numbers that cannot be split are to be.
        ShapeError: columns or bytes do not fit.
    """
    form = find_format(name)
    rows_RB = _as_rows(raw, num_rows, row_bytes(name, num_columns), name)
    panels = num_panels(num_rows)
    num_blocks = num_columns // form.block_columns
    blocks_PRSB = _pad(rows_RB, form).reshape(panels, PANEL_ROWS, num_blocks, form.block_bytes)
    if form.is_float:
        return np.empty((panels, num_blocks, 0), np.uint8), [_transpose_floats(blocks_PRSB)]
    scales = np.empty((panels, num_blocks, form.scales_bytes), np.uint8)
    groups = num_columns // BLOCK_COLUMNS
    planes = [np.empty((panels, groups, w, LINE_BYTES), np.uint8) for w in form.plane_widths]
    step = max(1, CHUNK_CODES // max(1, PANEL_ROWS * num_columns))
    for begin in range(0, panels if num_columns else 0, step):
        chunk = slice(begin, begin + step)
        parts = [plane[chunk] for plane in planes]
        if form.split_from:
            scales[chunk] = _pack_split(blocks_PRSB[chunk], form, parts)
        else:
            scales[chunk] = pack_scales(blocks_PRSB[chunk], form)
            _pack_planes(lane_codes(blocks_PRSB[chunk], name), form.bits, form.code_widths, parts)
    return scales, planes


def unpack(
    scales: Buffer, planes: Sequence[Buffer], name: str, num_rows: int, num_columns: int
) -> bytes:
    """Undo ``pack``: return the rows' bytes as GGUF stores them.

    Args:
        scales: what ``pack`` returned, or its bytes.
        planes: all planes, or their bytes.
        name: format, a key of ``FORMATS``.
        num_rows: rows, 0 or more.
        num_columns: columns, whole blocks of the format.

    Raises:
        FormatError: unknown format.
        ShapeError: bytes, planes or columns do not fit.
    """
    form = find_format(name)
    num_bytes = row_bytes(name, num_columns)
    panels, num_blocks = num_panels(num_rows), num_columns // form.block_columns
    if len(planes) != len(form.plane_widths):
        raise ShapeError(f"{name} has {len(form.plane_widths)} planes (got {len(planes)})")
    if form.is_float:
        plane = _as_plane(planes[0], form, 0, num_rows, num_columns)
        values = plane.reshape(panels, num_columns, PANEL_ROWS, form.block_bytes)
        rows = values.transpose(0, 2, 1, 3).reshape(panels * PANEL_ROWS, num_bytes)
        return rows[:num_rows].tobytes()
    widths = form.code_widths
    codes = unpack_codes(planes[: len(widths)], name, panels * PANEL_ROWS, num_columns)
    if not codes.size:
        return b""
    if form.split_from:
        exponents = _as_scales(scales, form, num_rows, num_columns).transpose(0, 2, 1)
        lines = _as_plane(planes[-1], form, len(widths), num_rows, num_columns)
        lines = lines.reshape(panels, num_blocks, form.plane_widths[-1], LINE_BYTES)
        rests = _by_columns(lines[:, :, :8]).astype(np.uint16)
        if form.plane_widths[-1] > 8:
            rests |= _by_columns(_spread(lines[:, :, 8:])).astype(np.uint16) << np.uint16(8)
        numbers = join(
            exponents.reshape(panels * PANEL_ROWS, num_blocks),
            codes,
            rests,
            MANTISSA_BITS[form.split_from],
        )
        return numbers[:num_rows].astype("<u2").tobytes()
    codes_PRSC = codes.reshape(panels, PANEL_ROWS, num_blocks, form.block_columns)
    blocks = np.empty((panels, PANEL_ROWS, num_blocks, form.block_bytes), np.uint8)
    write_codes(blocks, codes_PRSC, name)
    write_scales(blocks, _as_scales(scales, form, num_rows, num_columns), form)
    return blocks.reshape(panels * PANEL_ROWS, num_bytes)[:num_rows].tobytes()


def unpack_codes(planes: Sequence[Buffer], name: str, num_rows: int, num_columns: int) -> Bytes:
    """Return the integer codes of a quantized matrix, uint8 (rows, columns).

    Args:
        planes: the uppermost planes, any number of them; bits of the others are zero.
        name: a quantized format.
        num_rows: rows, 0 or more.
        num_columns: columns, whole blocks of the format.

    Raises:
        FormatError: unknown format, or a float one.
        ShapeError: bytes, planes or columns do not fit.
    """
    form = _quantized(name, len(planes))
    panels, groups = num_panels(num_rows), num_columns // BLOCK_COLUMNS
    codes_PGJL = np.zeros((panels, groups, 8, LINE_BYTES), np.uint8)
    shift = form.bits
    for index, plane in enumerate(planes):
        shift -= form.plane_widths[index]
        lines = _as_plane(plane, form, index, num_rows, num_columns)
        lines = lines.reshape(panels, groups, form.plane_widths[index], LINE_BYTES)
        codes_PGJL |= _spread(lines) << np.uint8(shift)
    return _by_columns(codes_PGJL)[:num_rows]


@np.errstate(over="ignore", invalid="ignore")
def unpack_scales(
    scales: Buffer, name: str, num_rows: int, num_columns: int
) -> tuple[Floats, Floats | None]:
    """Return a quantized matrix's scales, so that weight = scale * (code - zero) + minimum.

    Args:
        scales: what ``pack`` returned, or its bytes.
        name: a quantized format; its ``code_offset`` is the zero.
        num_rows: rows, 0 or more.
        num_columns: columns, whole blocks of the format.

    Returns:
        Scales and minimums (None where the format has none), float32 (rows, columns /
        ``scale_columns``); products of two stored scales are rounded to float32, as ggml
        rounds them.

    Raises:
        FormatError: unknown format, or a float one.
        ShapeError: bytes or columns do not fit.
    """
    form = _quantized(name, 0)
    stored = _as_scales(scales, form, num_rows, num_columns)
    if form.scales == "E":
        powers = np.exp2(stored.astype(np.float32) - EXPONENT_BIAS)
        return _by_rows(powers[:, :, None], num_rows), None
    d_PSKR = _half_floats(stored[..., :32])
    if form.scales == "H":
        return _by_rows(d_PSKR, num_rows), None
    if form.scales == "K8":
        fine = np.ascontiguousarray(stored[..., 32:]).view(np.int8)
        d_PSKR = d_PSKR * fine.reshape(*stored.shape[:2], 16, PANEL_ROWS).astype(np.float32)
        return _by_rows(d_PSKR, num_rows), None
    m_PSKR = _half_floats(stored[..., 32:64])
    if form.scales == "K6":
        values = unpack_six_bits(stored[..., 64:]).astype(np.float32)
        d_PSKR, m_PSKR = d_PSKR * values[:, :, :8], m_PSKR * -values[:, :, 8:]
    return _by_rows(d_PSKR, num_rows), _by_rows(m_PSKR, num_rows)


@np.errstate(over="ignore", invalid="ignore")
def dequantize(
    scales: Buffer, planes: Sequence[Buffer], name: str, num_rows: int, num_columns: int
) -> Floats:
    """Return a matrix's weights, or those that its upper planes alone stand for.

    Args:
        scales: what ``pack`` returned, or its bytes; ignored in the float formats.
        planes: the uppermost planes. n dropped low bits read as their midpoint,
            (2^n - 1) / 2.
        name: format, a key of ``FORMATS``.
        num_rows: rows, 0 or more.
        num_columns: columns, whole blocks of the format.

    Returns:
        float32 (rows, columns).

    Raises:
        FormatError: unknown format.
        ShapeError: bytes, planes or columns do not fit.
    """
    form = find_format(name)
    row_bytes(name, num_columns)
    if form.is_float or (form.split_from and len(planes) == len(form.plane_widths)):
        raw = unpack(scales, planes, name, num_rows, num_columns)
        return floats_of(raw, form.split_from or name).reshape(num_rows, num_columns)
    scale_RK, minimum_RK = unpack_scales(scales, name, num_rows, num_columns)
    codes = unpack_codes(planes, name, num_rows, num_columns)
    dropped_bits = form.bits - sum(form.plane_widths[: len(planes)])
    middle = np.float32(((1 << dropped_bits) - 1) / 2 - form.code_offset)
    values = codes.astype(np.float32)
    values += middle
    values_RKC = values.reshape(*scale_RK.shape, form.scale_columns)
    values_RKC *= scale_RK[..., None]
    if minimum_RK is not None:
        values_RKC += minimum_RK[..., None]
    return values


def floats_of(raw: Buffer, name: str) -> Floats:
    """Return little-endian F32, F16 or BF16 numbers as float32, exactly."""
    if name == "BF16":
        halves = np.frombuffer(raw, "<u2").astype(np.uint32)
        return (halves << np.uint32(16)).view(np.float32)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[name]).astype(np.float32)


def _quantized(name: str, num_planes: int) -> Format:
    form = find_format(name)
    if form.is_float:
        raise FormatError(f"{name} has no codes (expected a quantized format)")
    if num_planes > len(form.code_widths):
        raise ShapeError(f"{name} has {len(form.code_widths)} planes (got {num_planes})")
    return form


def _as_bytes(data: Buffer, shape: tuple[int, ...], what: str) -> Bytes:
    flat: Bytes = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    if flat.size * flat.itemsize != np.prod(shape):
        raise ShapeError(
            f"{what} have {flat.size * flat.itemsize} bytes (expected {np.prod(shape)})"
        )
    return np.ascontiguousarray(flat).view(np.uint8).reshape(shape)


def _as_rows(raw: Buffer, num_rows: int, num_bytes: int, name: str) -> Bytes:
    return _as_bytes(raw, (num_rows, num_bytes), f"{num_rows} rows of {name}")


def _as_plane(plane: Buffer, form: Format, index: int, num_rows: int, num_columns: int) -> Bytes:
    panel_bytes = num_columns * form.plane_widths[index] * PANEL_ROWS // 8
    return _as_bytes(plane, (num_panels(num_rows), panel_bytes), f"plane {index} of {form.name}")


def _as_scales(scales: Buffer, form: Format, num_rows: int, num_columns: int) -> Bytes:
    row_bytes(form.name, num_columns)
    shape = (num_panels(num_rows), num_columns // form.block_columns, form.scales_bytes)
    return _as_bytes(scales, shape, f"scales of {form.name}")


def _pad(rows_RB: Bytes, form: Format) -> Bytes:
    """Fill the last panel up with rows of zero codes and zero scales."""
    num_rows, num_bytes = rows_RB.shape
    missing = -num_rows % PANEL_ROWS
    if not missing:
        return rows_RB
    padding = np.zeros((missing, num_bytes), np.uint8)
    if form.name == "Q8_0":  # its codes are stored less 128
        padding.reshape(missing, num_bytes // form.block_bytes, form.block_bytes)[..., 2:] = 0x80
    return np.concatenate((rows_RB, padding))


def _transpose_floats(blocks_PRSB: Bytes) -> Bytes:
    panels, rows, columns, width = blocks_PRSB.shape
    words = blocks_PRSB.view(f"<u{width}")[..., 0].transpose(0, 2, 1)
    return np.ascontiguousarray(words).view(np.uint8).reshape(panels, columns, rows * width)


def _pack_split(blocks_PRSB: Bytes, form: Format, planes: list[Bytes]) -> Bytes:
    """Write the planes of some panels of 16-bit floats, and return their exponents, (P, S, R)."""
    panels, rows, num_blocks, _ = blocks_PRSB.shape
    numbers = blocks_PRSB.view("<u2").reshape(panels * rows, num_blocks * BLOCK_COLUMNS)
    exponents, codes, rests = split(numbers, MANTISSA_BITS[form.split_from])
    shape = (panels, rows, num_blocks, BLOCK_COLUMNS)
    _pack_planes(lanes(codes.reshape(shape))[None], form.bits, form.code_widths, planes[:-1])
    low, upper = (rests & 0xFF).astype(np.uint8), (rests >> 8).astype(np.uint8)
    planes[-1][:, :, :8] = lanes(low.reshape(shape)).transpose(1, 2, 0, 3)
    if form.plane_widths[-1] > 8:
        packed = np.empty((panels, num_blocks, 2, LINE_BYTES), np.uint8)
        _pack_planes(lanes(upper.reshape(shape))[None], 2, (2,), [packed])
        planes[-1][:, :, 8:] = packed
    return exponents.reshape(panels, rows, num_blocks).transpose(0, 2, 1)


def _pack_planes(
    codes_GJPSL: Bytes, bits: int, widths: Sequence[int], planes: Sequence[Bytes]
) -> None:
    """Write the planes of some panels, given their codes by lines."""
    groups, _, panels, blocks, _ = codes_GJPSL.shape
    words = codes_GJPSL.view(np.uint64).reshape(groups, 8, -1)
    shift = bits
    for width, plane in zip(widths, planes, strict=True):
        shift -= width
        sources = words.reshape(groups, width, 8 // width, -1)
        packed = np.zeros((groups, width, sources.shape[-1]), np.uint64)
        scratch = np.empty_like(packed)
        for place in range(8 // width):
            left = place * width - shift
            move = np.left_shift if left >= 0 else np.right_shift
            move(sources[:, :, place], np.uint64(abs(left)), out=scratch)
            scratch &= np.uint64(((1 << width) - 1 << place * width) * 0x0101010101010101)
            packed |= scratch
        lines = packed.reshape(groups, width, panels, blocks, 8).transpose(2, 3, 0, 1, 4)
        plane.view(np.uint64).reshape(panels, blocks, groups, width, 8)[...] = lines


def _spread(lines_PGWL: Bytes) -> Bytes:
    """Return the bits of one plane as bytes, (P, G, J, L)."""
    panels, groups, width, _ = lines_PGWL.shape
    places = (np.arange(8 // width, dtype=np.uint8) * width)[:, None]
    bits: Bytes = (lines_PGWL[:, :, :, None] >> places) & np.uint8((1 << width) - 1)
    return bits.reshape(panels, groups, 8, LINE_BYTES)


def _by_columns(codes_PGJL: Bytes) -> Bytes:
    """Return codes by rows and columns, (P * R, G * 32)."""
    panels, groups, _, _ = codes_PGJL.shape
    lanes_PRGJ4 = codes_PGJL.reshape(panels, groups, 8, PANEL_ROWS, 4).transpose(0, 3, 1, 2, 4)
    return lanes_PRGJ4.reshape(panels * PANEL_ROWS, groups * BLOCK_COLUMNS)


def _half_floats(stored_PSB: Bytes) -> Floats:
    """Return 16 rows' float16 as float32, (P, S, 1, R)."""
    return np.ascontiguousarray(stored_PSB).view("<f2").astype(np.float32)[:, :, None]


def _by_rows(values_PSKR: Floats, num_rows: int) -> Floats:
    panels, blocks, per_block, _ = values_PSKR.shape
    rows = values_PSKR.transpose(0, 3, 1, 2)
    return rows.reshape(panels * PANEL_ROWS, blocks * per_block)[:num_rows]
