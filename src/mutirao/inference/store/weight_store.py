"""The weight store: a model's weights in one file, laid out for large direct reads.

A store is a folder in the cache, built once from a GGUF file or a Hugging Face directory
and built again when that changes:

    weights.bin       matrices as scales and bit planes (``planes``), vectors as float32
    index.json        what lies where, the model's specification, the source's fingerprint
    checksums.bin     one 64-bit sum per 16 panels of every extent
    tokenizer files   see ``tokenizer_files``

A checksum is the sum of w_i (2 i + 1) mod 2^64 over the 64-bit words of a slab: it costs a
small part of reading and catches what disks and accidents do; against an adversary who can
write into the cache it guards nothing. Opening checks everything but the matrices, which
are checked as they are read. The engine needs neither a framework nor the gguf package here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.environment import cache_directory
from mutirao.errors import ArtifactError, ShapeError
from mutirao.inference.architecture.model_spec import ModelSpec
from mutirao.inference.store.plane_formats import PANEL_ROWS
from mutirao.inference.store.store_index import (
    CHECKSUMS_NAME,
    INDEX_NAME,
    SLAB_PANELS,
    WEIGHTS_NAME,
    Checksums,
    Extent,
    OtherVersionError,
    StoredTensor,
    StoreIndex,
    checksum,
    damaged,
    read_index,
)

__all__ = ["Extent", "StoredTensor", "WeightStore", "store_directory"]

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], object]
"""Called with the bytes that are done and all bytes, while a store is built."""

MAX_READ_BYTES = 1 << 30
"""Linux reads at most 2 GiB less a page in one call."""


@dataclass(frozen=True)
class WeightStore:
    """An opened store: what is in it and where; weights are read by whoever needs them."""

    directory: Path
    spec: ModelSpec
    tensors: dict[str, StoredTensor]
    """Matrices by store name, in the order they are used."""
    vectors: dict[str, NDArray[np.float32]]
    """By store name, read and checked."""
    checksums: Checksums
    """uint64, all of them; an extent's begin at ``Extent.checksums``."""
    index: StoreIndex

    @property
    def weights_path(self) -> Path:
        """The file that extents lie in."""
        return self.directory / WEIGHTS_NAME

    @classmethod
    def open(cls, directory: Path) -> WeightStore:
        """Open a store and check all of it but the matrices.

        Raises:
            ArtifactError: not a store, damaged, or of another version.
        """
        index = read_index(directory)
        layout = index.layout
        _check_files(directory, index)
        try:
            sums = np.fromfile(directory / CHECKSUMS_NAME, "<u8")
            with (directory / WEIGHTS_NAME).open("rb") as file:
                raw = np.fromfile(file, np.uint8, layout.vectors_extent.num_bytes)
        except OSError as error:
            raise damaged(directory, f"a file cannot be read ({error.strerror})") from None
        if raw.size != layout.vectors_extent.num_bytes or checksum(raw) != sums[0]:
            raise damaged(directory, f"the vectors in {WEIGHTS_NAME} were altered")
        vectors = {
            name: raw[offset : offset + 4 * size].view("<f4")
            for name, (offset, size) in layout.vectors.items()
        }
        for vector in vectors.values():
            vector.flags.writeable = False
        return cls(directory, index.spec, layout.tensors, vectors, sums, index)

    @classmethod
    def build(
        cls, source_path: Path, directory: Path, progress: Progress | None = None
    ) -> WeightStore:
        """Build a store, or finish one whose building was interrupted; see ``store_build``.

        Args:
            source_path: a GGUF file, or a Hugging Face directory.
            directory: where the store is to be; an older store there is replaced.
            progress: told of the bytes done; None shows a bar on the console.

        Raises:
            FormatError: the source is missing, damaged or not supported.
            ArtifactError: ``directory`` holds something else than a store.
            DiskFullError: no room; what was there is as it was.
        """
        from mutirao.inference.store.store_build import build_store

        build_store(source_path, directory, progress)
        return cls.open(directory)

    @classmethod
    def open_or_build(cls, source_path: Path, progress: Progress | None = None) -> WeightStore:
        """Open the store of a model from the cache, built first where it is not there yet.

        Args:
            source_path: a GGUF file, a Hugging Face directory, or a store's own folder.
            progress: told of the bytes done; None shows a bar on the console.

        Raises:
            FormatError: the source is missing, damaged or not supported.
            ArtifactError: the store in the cache is damaged.
            DiskFullError: no room to build it.
        """
        from mutirao.inference.store.source_fingerprint import is_same_source

        if (source_path / INDEX_NAME).is_file():
            return cls.open(source_path)
        directory = store_directory(source_path)
        if (directory / INDEX_NAME).exists():
            try:
                store = cls.open(directory)
            except OtherVersionError:
                return cls.build(source_path, directory, progress)
            if is_same_source(store.index.source, source_path):
                return store
        return cls.build(source_path, directory, progress)

    def load(self, name: str) -> tuple[Bytes, list[Bytes]]:
        """Read one matrix whole, and check it.

        Args:
            name: store name.

        Returns:
            Scales (empty in the float formats) and planes, as ``planes.pack`` returns them
            but flat.

        Raises:
            ArtifactError: it was altered, or cannot be read.
        """
        tensor = self.tensors[name]
        parts = [self._read(extent, tensor) for extent in tensor.extents]
        if tensor.scales is None:
            return np.empty(0, np.uint8), parts
        return parts[0], parts[1:]

    def verify(self) -> None:
        """Read every matrix and check it.

        Raises:
            ArtifactError: one was altered, or cannot be read.
        """
        for tensor in self.tensors.values():
            for extent in tensor.extents:
                self._read(extent, tensor)

    def check_slabs(
        self, extent: Extent, tensor: StoredTensor, data: Bytes, first: int = 0
    ) -> None:
        """Check bytes of an extent that begin at a slab against its checksums.

        Args:
            extent: where they were read.
            tensor: whose it is.
            data: uint8, whole slabs of 16 panels; the extent's last one may be shorter.
            first: number of the first slab.

        Raises:
            ArtifactError: the bytes are not those that were written.
            ShapeError: the bytes are not whole slabs of the extent.
        """
        slab_bytes = extent.num_bytes // max(1, tensor.num_panels) * SLAB_PANELS
        end = first * slab_bytes + data.nbytes
        if end > extent.num_bytes or (end < extent.num_bytes and data.nbytes % slab_bytes):
            raise ShapeError(f"{data.nbytes} bytes are not whole slabs of {tensor.name}")
        for slab, begin in enumerate(range(0, data.nbytes, slab_bytes), first):
            came = checksum(data[begin : begin + slab_bytes])
            if came != self.checksums[extent.checksums + slab]:
                row = slab * SLAB_PANELS * PANEL_ROWS
                raise damaged(
                    self.directory,
                    f"the {extent.kind} of {tensor.name} from row {row} on differ from what was "
                    "written",
                )

    def _read(self, extent: Extent, tensor: StoredTensor) -> Bytes:
        data = np.empty(extent.num_bytes, np.uint8)
        try:
            with self.weights_path.open("rb", buffering=0) as file:
                file.seek(extent.offset)
                have = 0
                while have < data.size:
                    num = file.readinto(data.data[have : have + MAX_READ_BYTES])
                    if not num:
                        raise damaged(self.directory, f"{WEIGHTS_NAME} is truncated")
                    have += num
        except OSError as error:
            raise ArtifactError(f"{self.weights_path} cannot be read: {error.strerror}") from None
        self.check_slabs(extent, tensor, data)
        return data


def store_directory(source_path: Path) -> Path:
    """Return the folder of the cache that a source's store has, whether it is there or not.

    It is named for the source's path, so that a changed source replaces its store.
    """
    resolved = source_path.resolve()
    key = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in resolved.stem)
    return cache_directory() / "stores" / f"{stem[:80]}-{key}"


def _check_files(directory: Path, index: StoreIndex) -> None:
    layout = index.layout
    for name, expected in (
        (WEIGHTS_NAME, layout.weights_bytes),
        (CHECKSUMS_NAME, 8 * layout.num_checksums),
    ):
        path = directory / name
        came = path.stat().st_size if path.is_file() else None
        if came != expected:
            what = "is missing" if came is None else f"has {came} bytes instead of {expected}"
            raise damaged(directory, f"{name} {what}")
    for name, sha256 in index.files.items():
        try:
            data = (directory / name).read_bytes()
        except (OSError, ValueError):
            raise damaged(directory, f"{name[:80]} is missing or cannot be read") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(directory, f"{name[:80]} was altered")
