"""Signed updates in files: written as they came, read one tensor at a time.

A file holds what ``Parcel.to_bytes`` gives. Whoever sent it was checked when it arrived
(``check_update``), so reading it again trusts the file; a damaged one is named.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import ArtifactError, UpdateError, explain_disk_errors
from mutirao.federated.codec import CodecConfig, Shapes, decode_tensor
from mutirao.federated.codec.blocks import stretches
from mutirao.federated.codec.shapes import check_names
from mutirao.federated.messages import TENSOR_PREFIX
from mutirao.federated.parcel import MAX_TEXT_BYTES, Parcel

_LENGTH = struct.Struct("<Q")

Decode = Callable[[str, str], NDArray[np.float32]]
"""Gives a site's decoded update of one tensor: (site, tensor name)."""


class ParcelFile:
    """A parcel on disk, whose payloads are read when they are wanted.

    Raises:
        ArtifactError: the file is missing, cut or no parcel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text, start = _read_text(path)
            header = json.loads(text)
            self.fields: Mapping[str, Any] = header["fields"]
            """As in the parcel."""
            self._places: dict[str, tuple[int, int]] = {}
            for name, (size, _) in sorted(header["payloads"].items()):
                self._places[name] = (start, size)
                start += size
            if start != path.stat().st_size:
                raise ValueError("it is cut")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None

    def payload(self, name: str) -> NDArray[np.uint8]:
        """Return a copy of one payload.

        Raises:
            ArtifactError: there is none of that name, or the file was cut since.
        """
        if name not in self._places:
            raise self._damaged(f"it has no {name!r}")
        start, size = self._places[name]
        values = np.fromfile(self.path, np.uint8, size, offset=start)
        if values.size != size:
            raise self._damaged("it is cut")
        return values

    def _damaged(self, error: object) -> ArtifactError:
        return ArtifactError(
            f"the journaled parcel {self.path} is damaged ({error}); remove it, and its round is "
            "asked for again"
        )


def write_parcel(path: Path, parcel: Parcel) -> None:
    """Write a parcel to a file, without a second copy of it in memory; all of it, or nothing.

    Raises:
        DiskFullError: no room.
    """
    signature = bytes.fromhex(parcel.signature)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as file:
                for part in (parcel.text, signature):
                    file.write(_LENGTH.pack(len(part)) + part)
                for name in sorted(parcel.payloads):
                    file.write(np.ascontiguousarray(parcel.payloads[name]).data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def read_parcel(path: Path) -> Parcel | None:
    """Return a journaled parcel whose payloads are views of the file; None without a sound one."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Parcel.from_bytes(memoryview(content))
    except (OSError, ValueError, UpdateError):
        return None


def check_update(
    parcel: Parcel, shapes: Shapes, codec: CodecConfig, *, max_norm: float | None = None
) -> float:
    """Decode every tensor of an update once, one at a time, before it is accepted.

    Args:
        parcel: what a site sent; not trusted.
        shapes: what was agreed.
        codec: what was agreed.
        max_norm: largest L2 norm; None for no bound.

    Returns:
        Its L2 norm.

    Raises:
        UpdateError: a tensor is missing, unknown or malformed, or the update is too large.
    """
    who = f"site {parcel.sender}"
    check_names(
        parcel.payloads, {TENSOR_PREFIX + name: shape for name, shape in shapes.items()}, who
    )
    squares = 0.0
    for name in sorted(shapes):
        try:
            values = decode_tensor(name, parcel.payloads[TENSOR_PREFIX + name], shapes[name], codec)
        except UpdateError as error:
            raise UpdateError(f"{who}: {error}") from None
        squares += sum_squares(values)
    norm = math.sqrt(squares)
    if max_norm is not None and norm > max_norm:
        raise UpdateError(
            f"{who} sent an update of norm {norm:g} (expected at most {max_norm:g}, "
            "federated.max_update_norm)"
        )
    return norm


def sum_squares(values: NDArray[Any]) -> float:
    """Return the sum of squares, in float64."""
    return sum_products(values, values)


def sum_products(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the inner product of two arrays of one shape, in float64, a stretch at a time.

    Not by BLAS, whose sums depend on the number of threads.
    """
    one_N, other_N = one.reshape(-1), other.reshape(-1)
    return math.fsum(
        float((one_N[part].astype(np.float64) * other_N[part]).sum())
        for part in stretches(one_N.size)
    )


def decoder(files: Mapping[str, ParcelFile], shapes: Shapes, codec: CodecConfig) -> Decode:
    """Return what decodes one tensor of one site from its file.

    Args:
        files: each site's update, by name.
        shapes: what was agreed.
        codec: what was agreed.
    """

    def decode(site: str, name: str) -> NDArray[np.float32]:
        payload = files[site].payload(TENSOR_PREFIX + name)
        return decode_tensor(name, payload, shapes[name], codec)

    return decode


def _read_text(path: Path) -> tuple[bytes, int]:
    """Return a parcel's header and where its payloads begin."""
    with path.open("rb") as file:
        parts = []
        for most in (MAX_TEXT_BYTES, 64):
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\xff"))
            if length > most:
                raise ValueError("one of its parts is too long")
            parts.append(file.read(length))
        return parts[0], file.tell()
