"""The header of a GGUF file: its metadata and where its tensors lie.

Read as the GGUF specification (versions 2 and 3, github.com/ggml-org/ggml, docs/gguf.md)
lays it out; no count or length is believed before it was compared with the bytes that are
there. Needs neither a framework nor the gguf package. Nested arrays, big-endian and split
files are refused.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.errors import FormatError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_STRINGS = 1 << 21
"""Most strings in a header: room for the largest vocabularies of 2026 with their merges
(under a million together, an assumption), and a few seconds of reading at the worst."""
MAX_VALUES = 1 << 22
"""Most numbers in arrays that are kept: several per token of the largest vocabularies of
2026 (an assumption), and at most 200 MB as Python numbers."""
MAX_REASON_LENGTH = 300
MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS of ggml.h."""

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Name, numbers per block and bytes per block of the types of ggml.h, by their number."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file."""

    name: str
    type_name: str
    """Quantization type, such as 'Q4_K'."""
    shape: tuple[int, ...]
    """Dimensions as GGUF writes them, the contiguous one (columns) first."""
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """What the header of a GGUF file says, checked against the file."""

    version: int
    metadata: dict[str, Any]
    """Values by key: int, float, bool, str, or a list of them."""
    tensors: dict[str, GGUFTensor]
    """By name, in the file's order."""
    size_bytes: int
    """Size of the file in bytes."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as 'llama'."""
        return str(self.metadata["general.architecture"])


class _Damaged(Exception):
    """What is wrong with a file, without its name; becomes a FormatError."""


def read_gguf_header(path: Path, keep: Callable[[str], bool] | None = None) -> GGUFHeader:
    """Read a GGUF file's header and check that all its tensor data is there.

    Args:
        path: the file.
        keep: says by key which strings and arrays of the metadata to keep, stepping over the
            others (a vocabulary takes some tens of MB); None keeps all. Numbers always are.

    Raises:
        FormatError: not a GGUF file, truncated, damaged, or of an unsupported version.
    """
    if not path.is_file():
        raise FormatError(f"{path} is not a file (expected a GGUF file)")
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise _Damaged(f"does not begin with {MAGIC.decode()!r}, so it is no GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_header(_Cursor(data), len(data), keep or (lambda _: True))
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read: {error.strerror} (expected a GGUF file)"
        ) from None
    except _Damaged as error:
        # Names in a hostile file may be long, or hold control characters.
        reason = "".join(c if c.isprintable() else "?" for c in str(error)[:MAX_REASON_LENGTH])
        raise FormatError(f"{path} {reason}; download or convert it again") from None


class _Cursor:
    """Reads little-endian values in order, each only after its bytes are known to be there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.position = len(MAGIC)
        self.num_strings = 0
        self.num_values = 0
        self._data = data
        self._size = len(data)

    def take(self, num_bytes: int, what: str) -> int:
        """Step over bytes and return where they began."""
        if num_bytes > self._size - self.position:
            raise _Damaged(
                f"is truncated or damaged: {what} needs {num_bytes} bytes at byte "
                f"{self.position} of {self._size}"
            )
        begin = self.position
        self.position += num_bytes
        return begin

    def number(self, layout: str, what: str) -> int | float:
        begin = self.take(struct.calcsize("<" + layout), what)
        value: int | float = struct.unpack_from("<" + layout, self._data, begin)[0]
        return value

    def numbers(self, layout: str, num: int, what: str) -> list[int | float]:
        self.num_values += num
        if self.num_values > MAX_VALUES:
            raise _Damaged(f"holds more than {MAX_VALUES} numbers in its metadata's arrays")
        begin = self.take(num * struct.calcsize("<" + layout), what)
        return list(struct.unpack_from(f"<{num}{layout}", self._data, begin))

    def count(self, layout: str, what: str, smallest_bytes: int) -> int:
        """Read how many entries follow, and refuse more than there are bytes for."""
        num = int(self.number(layout, what))
        if num * smallest_bytes > self._size - self.position:
            raise _Damaged(
                f"is truncated or damaged: it announces {num} {what} in the "
                f"{self._size - self.position} bytes that follow"
            )
        return num

    def skip_string(self, what: str) -> tuple[int, int]:
        self.num_strings += 1
        if self.num_strings > MAX_STRINGS:
            raise _Damaged(f"is damaged: it holds more than {MAX_STRINGS} strings")
        num_bytes = self.count("Q", f"bytes of {what}", 1)
        return self.take(num_bytes, what), num_bytes

    def string(self, what: str) -> str:
        begin, num_bytes = self.skip_string(what)
        try:
            return self._data[begin : begin + num_bytes].decode()
        except UnicodeDecodeError:
            raise _Damaged(f"is damaged: {what} is not UTF-8") from None


def _read_header(cursor: _Cursor, size_bytes: int, keep: Callable[[str], bool]) -> GGUFHeader:
    version = int(cursor.number("I", "the version"))
    _check_version(version)
    num_tensors = cursor.count("Q", "tensors", 24)
    num_pairs = cursor.count("Q", "metadata pairs", 13)
    metadata = _read_metadata(cursor, num_pairs, keep)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"is damaged: its alignment is {alignment!r} (expected a power of 2)")
    tensors = [_read_tensor(cursor) for _ in range(num_tensors)]
    data_begin = -(-cursor.position // alignment) * alignment
    _check_layout(tensors, alignment, size_bytes - data_begin)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _Damaged("is damaged: its metadata name no general.architecture")
    placed = {
        each.name: GGUFTensor(
            each.name, each.type_name, each.shape, each.offset + data_begin, each.num_bytes
        )
        for each in tensors
    }
    return GGUFHeader(version, metadata, placed, size_bytes)


def _check_version(version: int) -> None:
    if version in SUPPORTED_VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "little"), "big") in SUPPORTED_VERSIONS:
        raise _Damaged("is big-endian, which is not supported (expected little-endian)")
    raise _Damaged(f"has GGUF version {version}, which is not supported (expected 2 or 3)")


def _read_metadata(cursor: _Cursor, num_pairs: int, keep: Callable[[str], bool]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    seen = set()
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in seen:
            raise _Damaged(f"is damaged: it has {key} twice")
        seen.add(key)
        kind = int(cursor.number("I", f"the type of {key}"))
        if kind == _STRING and keep(key):
            metadata[key] = cursor.string(key)
        elif kind == _STRING:
            cursor.skip_string(key)
        elif kind == _ARRAY and keep(key):
            metadata[key] = _read_array(cursor, key)
        elif kind == _ARRAY:
            _skip_array(cursor, key)
        elif kind in _SCALARS:
            metadata[key] = cursor.number(_SCALARS[kind], key)
        else:
            raise _Damaged(f"is damaged: {key} is of the unknown type {kind}")
    return metadata


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind = int(cursor.number("I", f"the type of {key}"))
    if kind == _STRING:
        num = cursor.count("Q", f"strings in {key}", 8)
        return [cursor.string(f"a string of {key}") for _ in range(num)]
    return cursor.numbers(_SCALARS[kind], _count_numbers(cursor, kind, key), key)


def _skip_array(cursor: _Cursor, key: str) -> None:
    kind = int(cursor.number("I", f"the type of {key}"))
    if kind == _STRING:
        for _ in range(cursor.count("Q", f"strings in {key}", 8)):
            cursor.skip_string(f"a string of {key}")
    else:
        num = _count_numbers(cursor, kind, key)
        cursor.take(num * struct.calcsize("<" + _SCALARS[kind]), key)


def _count_numbers(cursor: _Cursor, kind: int, key: str) -> int:
    if kind not in _SCALARS:
        raise _Damaged(f"has an array {key} of type {kind}, which is not supported")
    return cursor.count("Q", f"values in {key}", struct.calcsize("<" + _SCALARS[kind]))


def _read_tensor(cursor: _Cursor) -> GGUFTensor:
    """Read one tensor's entry; its offset is still from the start of the tensor data."""
    name = cursor.string("a tensor's name")
    num_dimensions = int(cursor.number("I", f"the rank of {name}"))
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise _Damaged(f"is damaged: {name} has {num_dimensions} dimensions (expected 1 to 4)")
    shape = tuple(int(cursor.number("Q", f"the shape of {name}")) for _ in range(num_dimensions))
    kind = int(cursor.number("I", f"the type of {name}"))
    if kind not in TENSOR_TYPES:
        raise _Damaged(f"has tensor {name} of type {kind}, which is not supported")
    type_name, block_size, block_bytes = TENSOR_TYPES[kind]
    offset = int(cursor.number("Q", f"the offset of {name}"))
    num_elements = math.prod(shape)
    if num_elements == 0 or shape[0] % block_size:
        raise _Damaged(
            f"is damaged: {name} has shape {list(shape)} (expected rows of whole {type_name} "
            f"blocks of {block_size})"
        )
    num_bytes = num_elements // block_size * block_bytes
    return GGUFTensor(name, type_name, shape, offset, num_bytes)


def _check_layout(tensors: list[GGUFTensor], alignment: int, data_bytes: int) -> None:
    """Check that tensors lie aligned, apart from each other, and inside the file."""
    if not tensors:
        raise _Damaged("holds no tensors, so it is not a model")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Damaged("is damaged: two of its tensors have one name")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise _Damaged(
                f"is damaged: {tensor.name} lies at {tensor.offset}, unaligned or over another"
            )
        end = tensor.offset + tensor.num_bytes
        if end > data_bytes:
            raise _Damaged(
                f"is truncated: {tensor.name} ends at byte {end} of the tensor data, of which "
                f"only {max(data_bytes, 0)} are there"
            )
