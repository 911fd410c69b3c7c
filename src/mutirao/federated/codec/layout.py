"""A payload's bytes, version 2: how many there are, where each part lies, and its header.

    header   24 bytes: "MU", version, format, block size, values of the tensor, values kept
    places   top-k only: 2 or 4 bytes for each kept value, ascending
    scales   integer formats only: a float32 for each block of kept values
    values   float32, bfloat16, or codes packed lowest bits first; unused bits are zero

All numbers are little-endian. Everything follows from the settings and the tensor's size, so a
receiver computes it and compares; it never takes a size from a payload.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, UpdateError
from mutirao.federated.codec.blocks import GRIDS, SCALE_BYTES, STRETCH
from mutirao.federated.codec.config import CodecConfig
from mutirao.federated.codec.places import place_bytes
from mutirao.federated.codec.shapes import Shapes, count_values

WIRE_VERSION = 2
MAGIC = b"MU"
HEADER = struct.Struct("<2sBBIQQ")
FORMATS = ("fp32", "bf16", "int8", "int4", "int2")
"""Their places are their numbers on the wire."""
SPARSE_FLAG = 16
MAX_SPARSE_SIZE = 2**32
"""Places have at most 4 bytes."""
_VALUE_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class Layout:
    """Where the parts of one tensor's payload lie; each begins where the one before ends."""

    size: int
    """Values of the tensor."""
    num_kept: int
    """Values that go."""
    places_bytes: int
    """Bytes of the places."""
    scales_bytes: int
    """Bytes of the scales."""
    values_bytes: int
    """Bytes of the values."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload, header and all."""
        return HEADER.size + self.places_bytes + self.scales_bytes + self.values_bytes

    def split(self, payload: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], ...]:
        """Return views of a payload's places, scales and values."""
        ends = np.cumsum([HEADER.size, self.places_bytes, self.scales_bytes])
        return tuple(np.split(payload, ends)[1:])


def lay_out(size: int, codec: CodecConfig) -> Layout:
    """Return where the parts of a payload lie.

    Args:
        size: values of the tensor.
        codec: how they are written.

    Raises:
        InputError: the tensor is too large for places of 4 bytes.
    """
    if codec.is_sparse and size > MAX_SPARSE_SIZE:
        raise InputError(
            f"a tensor of {size} values is too large for keep_one_in={codec.keep_one_in} "
            f"(expected at most {MAX_SPARSE_SIZE}); send it dense, with keep_one_in=1"
        )
    num_kept = -(-size // codec.keep_one_in)
    num_blocks = -(-num_kept // codec.block_size) if codec.format in GRIDS else 0
    return Layout(
        size=size,
        num_kept=num_kept,
        places_bytes=num_kept * place_bytes(size) if codec.is_sparse else 0,
        scales_bytes=num_blocks * SCALE_BYTES,
        values_bytes=-(-num_kept * _VALUE_BITS[codec.format] // 8),
    )


def count_payload_bytes(shape: tuple[int, ...], codec: CodecConfig) -> int:
    """Return the bytes of a tensor's payload, before it is made; exact."""
    return lay_out(count_values(shape), codec).num_bytes


def count_bytes(shapes: Shapes, codec: CodecConfig) -> int:
    """Return the bytes of all payloads of an update, before they are made; exact.

    Names and framing of the message around them are the transport's, and not counted.
    """
    return sum(count_payload_bytes(shape, codec) for shape in shapes.values())


def count_decode_bytes(shape: tuple[int, ...], codec: CodecConfig) -> int:
    """Return a bound on the memory, in bytes, that decoding one payload takes.

    The values themselves, for top-k the kept values and their places beside them, and a
    working stretch. Whatever a payload holds, no more is allocated; one of another length
    than agreed is refused before anything is.
    """
    layout = lay_out(count_values(shape), codec)
    beside = 20 * layout.num_kept if codec.is_sparse else 0
    return 4 * layout.size + beside + 16 * STRETCH


def write_header(layout: Layout, codec: CodecConfig) -> bytes:
    """Return the header of a payload."""
    code = FORMATS.index(codec.format) + (SPARSE_FLAG if codec.is_sparse else 0)
    block_size = codec.block_size if codec.format in GRIDS else 0
    return HEADER.pack(MAGIC, WIRE_VERSION, code, block_size, layout.size, layout.num_kept)


def check_header(header: bytes, layout: Layout, codec: CodecConfig, name: str) -> None:
    """Refuse a header that is not the one that was agreed, and say where it differs.

    Args:
        header: the first bytes of a payload.
        layout: what was agreed.
        codec: what was agreed.
        name: of the tensor, for messages.

    Raises:
        UpdateError: with the first difference.
    """
    expected = write_header(layout, codec)
    if header == expected:
        return
    parts = ("mark", "version", "format", "block size", "number of values", "number kept")
    for part, came, wanted in zip(
        parts, HEADER.unpack(header), HEADER.unpack(expected), strict=True
    ):
        if came != wanted:
            raise UpdateError(
                f"the payload of tensor {name!r} has {part} {came!r} (expected {wanted!r}); all "
                "sites must run the agreed plan and version"
            )
