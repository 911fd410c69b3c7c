"""Weights as GGUF's blocks: as they are, rounded by the gguf package, or codes taken over.

A compressed layer is codes of a few bits in groups, weight = (code - zero) * scale. Three block
formats of 32 weights hold such codes without rounding weights anew (d, m: float16, q: code):

    Q4_1   q d + m     up to 4 bits: d = scale, m = -zero * scale
    Q4_0   (q - 8) d   4 bits whose zero is 8 everywhere: d = scale
    Q8_0   q d         codes whose distance from zero fits 8 bits, as 2 to 7 bits always do

Groups of 32 fill a block, those of 64 or 128 several. What float16 changes: a bfloat16 scale has
8 significant bits and is kept, unless it is below 6.1e-5, where float16 has fewer digits (an
error of up to 3e-8). -zero * scale has up to 12 significant bits and float16 has 11: with zero
above 8 a group's weights may all move together by up to 1/137 of the step between two codes.
A scale of more digits, float32, is rounded to 11 bits.

Shapes: O outputs, I inputs, G groups of inputs, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError
from mutirao.formats.packed_rows import PackedLayer, Read, expand_codes

BLOCK = 32
FLOATS = ("F32", "F16", "BF16")
"""Types that safetensors and GGUF call alike."""
SLAB_WEIGHTS = 1 << 22
"""Weights that are converted at a time, so that copies take some tens of MB."""


@dataclass(frozen=True)
class Codes:
    """A compressed layer's parts."""

    codes: NDArray[np.uint8]
    """(O, I)."""
    scale: NDArray[np.float32]
    """(O, G)."""
    zero: NDArray[np.uint8]
    """(O, G), the code of zero."""

    def take(self, rows: NDArray[np.intp]) -> Codes:
        """Return the layer with its outputs in another order."""
        return Codes(self.codes[rows], self.scale[rows], self.zero[rows])

    def expand(self) -> NDArray[np.float32]:
        """Return (O, I) weights."""
        return expand_codes(self.codes, self.scale, self.zero)

    def blocks(self, type_name: str) -> NDArray[np.uint8]:
        """Return (O, bytes) blocks with the same codes, of a type that ``holds_codes``.

        Raises:
            FormatError: a scale is too large for float16.
        """
        num_outputs, num_inputs = self.codes.shape
        times = num_inputs // self.scale.shape[1] // BLOCK
        scale_OB = np.repeat(self.scale, times, axis=1)
        parts = [_halves(scale_OB)]
        if type_name == "Q8_0":
            distances_OI = distances(self.codes, self.zero).astype(np.int8)
            parts.append(distances_OI.view(np.uint8).reshape(num_outputs, -1, BLOCK))
        else:
            if type_name == "Q4_1":
                zero_OB = np.repeat(self.zero, times, axis=1).astype(np.float32)
                parts.append(_halves(-zero_OB * scale_OB))
            # Byte j holds weights j and j + 16, the latter in its upper half.
            halves = self.codes.reshape(num_outputs, -1, 2, BLOCK // 2)
            parts.append(halves[:, :, 0] | halves[:, :, 1] << np.uint8(4))
        return np.concatenate(parts, axis=2).reshape(num_outputs, -1)


def holds_codes(type_name: str, layer: PackedLayer, read: Read) -> bool:
    """Whether blocks of a type hold the very codes of a compressed layer."""
    num_outputs = layer.shape[0]
    if layer.group_size % BLOCK:
        return False
    if type_name == "Q4_1":
        return layer.num_bits <= 4
    if type_name == "Q4_0":
        return layer.num_bits == 4 and bool((layer.read_zero(read, 0, num_outputs) == 8).all())
    if type_name != "Q8_0" or layer.num_bits < 8:
        return type_name == "Q8_0"
    codes_OI, _, zero_OG = layer.read_codes(read, 0, num_outputs)
    return bool((np.abs(distances(codes_OI, zero_OG) + 0.5) < 128).all())


def distances(codes_OI: NDArray[np.uint8], zero_OG: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return (O, I) code - zero."""
    codes_OGS = codes_OI.reshape(*zero_OG.shape, -1).astype(np.int16)
    return (codes_OGS - zero_OG[..., None]).reshape(codes_OI.shape)


def row_bytes(type_name: str, num_columns: int) -> int:
    """Return the bytes of a row; the type's block must divide it."""
    import gguf

    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(num_columns // size * num_bytes)


def to_floats(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """Return the numbers that bytes of a float type stand for."""
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[type_name]).astype(np.float32)


def convert(values_OI: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    """Round weights to a type.

    Args:
        values_OI: (O, I), finite.
        type_name: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.

    Returns:
        (O, bytes of a row).

    Raises:
        FormatError: a weight is too large for float16.
    """
    from gguf import GGMLQuantizationType, quants

    num_outputs, num_columns = values_OI.shape
    step = max(1, SLAB_WEIGHTS // num_columns)
    result = np.empty((num_outputs, row_bytes(type_name, num_columns)), np.uint8)
    for begin in range(0, num_outputs, step):
        rows = np.ascontiguousarray(values_OI[begin : begin + step])
        if type_name == "F16":
            blocks: NDArray[Any] = _as_float16(rows)
        else:
            blocks = quants.quantize(rows, GGMLQuantizationType[type_name])
        result[begin : begin + step] = np.ascontiguousarray(blocks).view(np.uint8)
    return result


def _halves(values_OB: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return (O, B, 2) bytes of float16."""
    return _as_float16(values_OB)[..., None].view(np.uint8)


def _as_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise FormatError(
            f"a weight or scale of {float(np.abs(values).max()):.3g} does not fit float16, "
            "which has numbers up to 65504; export with --type bf16"
        )
    return halves
