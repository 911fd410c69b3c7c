"""Tensors in safetensors files that are read and written one at a time.

A state of full weights should not lie whole in memory. A safetensors file says in its header
where each tensor lies, and that follows from names, types and shapes, so a file can be written
in one go by somebody who knows those and makes the values one after another. What is written
here any safetensors reader reads; what is read here has float32 and uint8 only.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import ArtifactError, explain_disk_errors

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""Longer headers are refused; a thousand layers need less than 1 MB."""
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorPlace:
    """One tensor in a file."""

    dtype: np.dtype[Any]
    """Of its values."""
    shape: tuple[int, ...]
    """Its sizes."""
    offset: int
    """Its first byte in the file."""

    @property
    def num_values(self) -> int:
        """Values that it holds."""
        return prod(self.shape)


class StateFile:
    """A file of tensors, of which one at a time is read.

    Raises:
        ArtifactError: the file is missing, cut or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._places = _read_places(path)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise _damaged(path, error) from None

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name, sorted."""
        return {name: self._places[name].shape for name in self.names}

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a copy of one float32 tensor.

        Raises:
            ArtifactError: there is none of that name and type, or the file was cut since.
        """
        place = self._place(name, "F32")
        values = np.fromfile(self.path, "<f4", place.num_values, offset=place.offset)
        if values.size != place.num_values:
            raise _damaged(self.path, "it is cut")
        return values.astype(np.float32, copy=False).reshape(place.shape)

    def map_bytes(self, name: str) -> NDArray[np.uint8]:
        """Return one uint8 tensor as a read-only view of the file, which takes no memory.

        Raises:
            ArtifactError: there is none of that name and type.
        """
        place = self._place(name, "U8")
        if not place.num_values:
            return np.zeros(0, np.uint8)
        mapped = np.memmap(self.path, np.uint8, "r", place.offset, (place.num_values,))
        return mapped.view(np.ndarray)

    def _place(self, name: str, kind: str) -> TensorPlace:
        place = self._places.get(name)
        if place is None or place.dtype != _TYPES[kind]:
            raise _damaged(self.path, f"it has no {kind} tensor {name!r}")
        return place


class StateWriter:
    """A file that is being written, in any order; ``writing`` makes one."""

    def __init__(self, file: BinaryIO, start: int, layout: Mapping[str, TensorPlace]) -> None:
        self._file = file
        self._start = start
        self._left = dict(layout)

    def write(self, name: str, values: NDArray[Any]) -> None:
        """Write one tensor to its place.

        Raises:
            ValueError: it was not announced, is there already, or has another type or shape.
        """
        place = self._left.pop(name, None)
        if place is None or (values.dtype, values.shape) != (place.dtype, place.shape):
            raise ValueError(f"{name!r}: {values.dtype} of shape {values.shape}, not {place}")
        self._file.seek(self._start + place.offset)
        self._file.write(np.ascontiguousarray(values).data)

    def finish(self) -> None:
        """Make sure that nothing is missing, and that all of it is on disk.

        Raises:
            ValueError: a tensor was not written.
        """
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written: {min(self._left)!r}")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writing(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Iterator[StateWriter]:
    """Write a file of tensors, which lie in the order of their names; all of it, or nothing.

    Args:
        path: of the file.
        shapes: of all tensors, by name.
        dtype: "F32" or "U8".

    Yields:
        What takes the tensors.

    Raises:
        DiskFullError: no room; ``path`` is as it was.
    """
    header, places = _lay_out(shapes, dtype)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as file:
                file.write(header)
                writer = StateWriter(file, len(header), places)
                yield writer
                writer.finish()
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _lay_out(
    shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> tuple[bytes, dict[str, TensorPlace]]:
    """Return a file's first bytes, and where after them each tensor will lie."""
    entries: dict[str, object] = {}
    places: dict[str, TensorPlace] = {}
    offset = 0
    for name in sorted(shapes):
        shape = tuple(int(size) for size in shapes[name])
        end = offset + prod(shape) * _TYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places[name] = TensorPlace(_TYPES[dtype], shape, offset)
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors writes it: values begin at a whole word
    return _LENGTH.pack(len(text)) + text, places


def _read_places(path: Path) -> dict[str, TensorPlace]:
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\xff"))
        if length > MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
    start, size = _LENGTH.size + length, path.stat().st_size
    places, end = {}, start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        place = TensorPlace(
            _TYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        stop = place.offset + place.num_values * place.dtype.itemsize
        if start + entry["data_offsets"][1] != stop or place.offset < start or stop > size:
            raise ValueError(f"tensor {name!r} does not lie in it")
        places[name], end = place, max(end, stop)
    if end != size:
        raise ValueError(f"it has {size} bytes (expected {end})")
    return places


def _damaged(path: Path, error: object) -> ArtifactError:
    return ArtifactError(
        f"the journal {path} is damaged ({error}); restore it from a copy, or begin a new run in "
        "another folder"
    )
