"""Rows of compressed layers (compressed-tensors, ``pack-quantized``), without a framework.

The same layout that ``compressed_tensors`` reads whole through torch; here a layer's rows are
expanded some at a time, with numpy, to the same bfloat16 numbers.

Shapes: O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError
from mutirao.formats.layer_bits import LayerBits, read_layer_bits
from mutirao.formats.safetensors_reader import SafeTensor

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

Read = Callable[[SafeTensor, int, int], NDArray[np.uint8]]
"""Reads some rows of a tensor as bytes: tensor, first row, end."""


@dataclass(frozen=True)
class PackedLayer:
    """One compressed layer."""

    num_bits: int
    codes: SafeTensor
    """(O, W) I32, the codes of a row without gaps, lowest bits first."""
    scale: SafeTensor
    """(O, G), a float type."""
    zero_point: SafeTensor | None
    """(ceil(O * num_bits / 32), G) I32, codes of zero along the output; None: the middle."""
    shape: tuple[int, int]
    """(O, I)."""

    @property
    def group_size(self) -> int:
        """Weights along the input that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    def read_rows(self, read: Read, begin: int, end: int) -> NDArray[np.uint8]:
        """Return rows begin..end as bfloat16, their bytes."""
        return to_bfloat16(expand_codes(*self.read_codes(read, begin, end)))

    def read_codes(
        self, read: Read, begin: int, end: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """Return codes (O, I), scales (O, G) and codes of zero (O, G) of rows begin..end."""
        words = read(self.codes, begin, end).reshape(end - begin, -1)
        codes_OI = unpack_bits(words, self.num_bits, self.shape[1])
        scale = _floats(read(self.scale, begin, end), self.scale.dtype)
        return codes_OI, scale.reshape(-1, self.scale.shape[1]), self.read_zero(read, begin, end)

    def read_zero(self, read: Read, begin: int, end: int) -> NDArray[np.uint8]:
        """Return the codes of zero (O, G) of rows begin..end."""
        num_groups = self.scale.shape[1]
        if self.zero_point is None:
            return np.full((end - begin, num_groups), 2 ** (self.num_bits - 1), np.uint8)
        whole = read(self.zero_point, 0, self.zero_point.shape[0]).view("<u4")
        by_group = np.ascontiguousarray(whole.reshape(-1, num_groups).T).view(np.uint8)
        return unpack_bits(by_group, self.num_bits, self.shape[0])[:, begin:end].T


def expand_codes(
    codes_OI: NDArray[np.uint8], scale_OG: NDArray[np.float32], zero_OG: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return the (O, I) weights that codes stand for: (code - zero) * scale."""
    codes_OGS = codes_OI.reshape(*scale_OG.shape, -1).astype(np.float32)
    shifted_OGS = codes_OGS - zero_OG.astype(np.float32)[..., None]
    return (shifted_OGS * scale_OG[..., None]).reshape(codes_OI.shape)


def packed_bits(config: dict[str, Any]) -> LayerBits | None:
    """Return the bits per code of a model whose config.json declares compressed weights.

    Args:
        config: the parsed config.json.

    Returns:
        Those of each layer, or None where weights are plain.

    Raises:
        FormatError: weights are compressed in a way that is not read here, or groups of layers
            contradict each other.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    declared = quantization if isinstance(quantization, dict) else {}
    is_ours = declared.get("quant_method") == "compressed-tensors"
    bits = read_layer_bits(declared) if is_ours else None
    if bits is None:
        raise FormatError(
            "config.json declares weights quantized in a way that is not read here (expected "
            "compressed-tensors, format 'pack-quantized', integer weights in groups); take the "
            "unquantized model, or a GGUF file of it"
        )
    return bits


def find_layer(
    tensors: dict[str, SafeTensor], prefix: str, shape: tuple[int, int], num_bits: int
) -> PackedLayer:
    """Return the compressed layer whose tensors begin with a name.

    Args:
        tensors: of the model, by name.
        prefix: the layer's name, without ``.weight_packed``.
        shape: (O, I) that it must have.
        num_bits: bits per code.

    Raises:
        FormatError: a part is missing, or of another type or shape.
    """
    num_outputs, num_inputs = shape
    codes, scale, zero_point = (tensors.get(f"{prefix}.{part}") for part in PARTS[:3])
    num_groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
    num_words = math.ceil(num_inputs * num_bits / 32)
    zero_words = math.ceil(num_outputs * num_bits / 32)
    if (
        codes is None
        or scale is None
        or (codes.dtype, codes.shape) != ("I32", (num_outputs, num_words))
        or scale.dtype not in ("F32", "F16", "BF16")
        or scale.shape[0] != num_outputs
        or num_groups == 0
        or num_inputs % num_groups
        or (
            zero_point is not None
            and (zero_point.dtype, zero_point.shape) != ("I32", (zero_words, num_groups))
        )
    ):
        raise FormatError(
            f"compressed layer {prefix[:100]} is damaged: its codes, scales and zero points do not "
            f"make a {num_outputs} x {num_inputs} matrix; make the model again"
        )
    return PackedLayer(num_bits, codes, scale, zero_point, shape)


def unpack_bits(octets_OB: NDArray[np.uint8], num_bits: int, num_codes: int) -> NDArray[np.uint8]:
    """Return the first codes of each row of little-endian words, (O, num_codes)."""
    stream = np.unpackbits(octets_OB, axis=1, bitorder="little")[:, : num_codes * num_bits]
    bits = stream.reshape(len(octets_OB), num_codes, num_bits)
    return np.packbits(bits, axis=2, bitorder="little")[..., 0]


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round float32 to the nearest bfloat16, ties to even, and return the bytes."""
    words = values.view(np.uint32)
    rounded = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
    is_nan = np.isnan(values)
    halves = np.where(is_nan, np.uint32(0x7FC0), rounded >> np.uint32(16)).astype("<u2")
    return np.ascontiguousarray(halves).reshape(-1).view(np.uint8)


def _floats(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
