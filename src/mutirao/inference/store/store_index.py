"""What a weight store holds and where: its entries, its layout, its index file.

``index.json`` describes ``weights.bin``: for every matrix an extent of scales and one per
bit plane, each at a multiple of 4096 bytes, one after the other; and one extent with all
float32 vectors. Every extent says its kind, so that later kinds (a neuron's gate, up and
down weights side by side, an expert) can stand beside these. The index carries its own
sha256. Nothing that it says is believed: sizes must be those that shapes and formats give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import ArtifactError, FormatError, InputError
from mutirao.inference.architecture.model_spec import ModelSpec, matrix_shapes, vector_shapes
from mutirao.inference.store.plane_formats import (
    find_format,
    num_panels,
    plane_panel_bytes,
    row_bytes,
    scales_panel_bytes,
)

FORMAT_NAME = "mutirao weight store"
VERSION = 2
"""Of this layout; a store of another version is built again."""
INDEX_NAME = "index.json"
WEIGHTS_NAME = "weights.bin"
CHECKSUMS_NAME = "checksums.bin"

PAGE_BYTES = 4096
"""Extents begin at multiples of it, as direct reads want."""
SLAB_PANELS = 16
"""Panels under one checksum."""
VECTOR_ALIGNMENT = 64
"""Vectors begin at multiples of it inside their extent: a cache line, a SIMD register."""
MAX_INDEX_BYTES = 1 << 26

Checksums = NDArray[np.uint64]


@dataclass(frozen=True)
class Extent:
    """A run of bytes in ``weights.bin`` that is read as a whole or by slabs."""

    offset: int
    """From the start of the file, in bytes; a multiple of PAGE_BYTES."""
    num_bytes: int
    checksums: int
    """Place of its first checksum; one per slab of 16 panels, one for the vectors."""
    kind: str = "plane"
    """'scales', 'plane' or 'vectors'."""

    @property
    def end(self) -> int:
        """Where the next extent may begin, in bytes."""
        return align(self.offset + self.num_bytes)


@dataclass(frozen=True)
class StoredTensor:
    """A matrix in the panel format of ``planes``."""

    name: str
    num_rows: int
    """Outputs."""
    num_columns: int
    """Inputs."""
    format: str
    """A key of ``planes.FORMATS``."""
    scales: Extent | None
    """None in the float formats."""
    planes: tuple[Extent, ...]
    """Most significant first; their widths follow from the format."""

    @property
    def num_panels(self) -> int:
        """Panels of 16 rows."""
        return num_panels(self.num_rows)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Scales and planes, as they lie in the file."""
        return (self.scales, *self.planes) if self.scales is not None else self.planes

    @property
    def num_bytes(self) -> int:
        """Bytes of scales and planes, without the padding between them."""
        return sum(extent.num_bytes for extent in self.extents)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in ``weights.bin``."""

    tensors: dict[str, StoredTensor]
    vectors: dict[str, tuple[int, int]]
    """Offset in the vectors' extent, in bytes, and count of float32, by name."""
    vectors_extent: Extent
    weights_bytes: int
    """Size of ``weights.bin``."""
    num_checksums: int


@dataclass(frozen=True)
class StoreIndex:
    """What ``index.json`` says."""

    source: dict[str, Any]
    """Fingerprint of what the store was built from; see ``source_fingerprint``."""
    spec: ModelSpec
    layout: Layout
    files: dict[str, str]
    """sha256 of the other files of the folder, by name."""


class OtherVersionError(ArtifactError):
    """A store of another version of the layout; one can be built in its place."""


def align(num_bytes: int, step: int = PAGE_BYTES) -> int:
    """Round up to a multiple of ``step``."""
    return -(-num_bytes // step) * step


def num_slabs(tensor_panels: int) -> int:
    """Return how many checksums an extent of so many panels has."""
    return -(-tensor_panels // SLAB_PANELS)


def plan_layout(spec: ModelSpec, formats: Mapping[str, str]) -> Layout:
    """Lay out a model's vectors, then its matrices in the order they are used.

    Args:
        spec: gives names and shapes.
        formats: format of each matrix, by store name.

    Raises:
        FormatError: a format is not one that is computed with.
        ShapeError: a matrix's columns are not whole blocks of its format.
    """
    offset, entries = 0, {}
    for name, (size,) in vector_shapes(spec).items():
        entries[name] = (offset, size)
        offset = align(offset + 4 * size, VECTOR_ALIGNMENT)
    vectors = Extent(0, offset, 0, "vectors")
    position, checksums = vectors.end, 1
    tensors = {}
    for name, (rows, columns) in matrix_shapes(spec).items():
        row_bytes(formats[name], columns)
        sizes = [("plane", size) for size in plane_panel_bytes(formats[name], columns)]
        if not find_format(formats[name]).is_float:
            sizes.insert(0, ("scales", scales_panel_bytes(formats[name], columns)))
        extents = []
        for kind, panel_bytes in sizes:
            extents.append(Extent(position, panel_bytes * num_panels(rows), checksums, kind))
            position, checksums = extents[-1].end, checksums + num_slabs(num_panels(rows))
        scales = extents.pop(0) if extents[0].kind == "scales" else None
        tensors[name] = StoredTensor(name, rows, columns, formats[name], scales, tuple(extents))
    return Layout(tensors, entries, vectors, position, checksums)


def checksum(data: NDArray[np.uint8], first_word: int = 0) -> int:
    """Return sum of w_i (2 i + 1) mod 2^64 over the bytes as little-endian 64-bit words.

    Args:
        data: bytes; zeros are added to fill the last word.
        first_word: i of the first word, where a slab comes in pieces.
    """
    if data.nbytes % 8:
        data = np.concatenate((data, np.zeros(-data.nbytes % 8, np.uint8)))
    words = data.view("<u8")
    places = np.arange(first_word, first_word + words.size).view(np.uint64)
    return int(np.dot(words, 2 * places + 1))


def write_index(index: StoreIndex, path: Path) -> None:
    """Write ``index.json``, with the sha256 of itself."""
    document = _document(index)
    document["sha256"] = _digest(document)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def read_index(folder: Path) -> StoreIndex:
    """Read a store's ``index.json`` and check it against itself.

    Raises:
        ArtifactError: missing, damaged, of another version, or what it says cannot be.
    """
    document = _read_document(folder)
    try:
        spec = ModelSpec.from_json(document["spec"])
        formats = {str(entry["name"]): entry["format"] for entry in document["tensors"]}
        if set(formats) != set(matrix_shapes(spec)):
            raise FormatError("its matrices are not those of its model")
        layout = plan_layout(spec, formats)
        index = StoreIndex(dict(document["source"]), spec, layout, dict(document["files"]))
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise damaged(folder, f"{INDEX_NAME} does not describe a model ({error})") from None
    if _digest(_document(index)) != _digest(document):
        raise damaged(folder, f"{INDEX_NAME} places something where it cannot be")
    return index


def damaged(folder: Path, what: str) -> ArtifactError:
    """Return the error for a store that is not as it was written."""
    return ArtifactError(
        f"weight store {folder} is damaged: {what}; delete that folder, and it is built again "
        "from the model when it is next needed"
    )


def _document(index: StoreIndex) -> dict[str, Any]:
    layout = index.layout
    return {
        "format": FORMAT_NAME,
        "version": VERSION,
        "source": index.source,
        "spec": index.spec.to_json(),
        "weights_bytes": layout.weights_bytes,
        "num_checksums": layout.num_checksums,
        "vectors": {"extent": asdict(layout.vectors_extent), "entries": layout.vectors},
        "tensors": [
            {
                "name": tensor.name,
                "num_rows": tensor.num_rows,
                "num_columns": tensor.num_columns,
                "format": tensor.format,
                "extents": [asdict(extent) for extent in tensor.extents],
            }
            for tensor in layout.tensors.values()
        ],
        "files": index.files,
    }


def _digest(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_document(folder: Path) -> dict[str, Any]:
    """Read ``index.json`` as it is, checked for its kind, its version and its own sha256."""
    path = folder / INDEX_NAME
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise damaged(folder, f"{INDEX_NAME} has more than {MAX_INDEX_BYTES} bytes")
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{folder} is not a weight store: it has no {INDEX_NAME} (expected a folder that "
            "Mutirão built from a model)"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise damaged(folder, f"{INDEX_NAME} is not valid JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise ArtifactError(
            f"{folder} is not a weight store: {INDEX_NAME} is another program's (expected a "
            "folder that Mutirão built from a model)"
        )
    if document.get("sha256") != _digest(document):
        raise damaged(folder, f"{INDEX_NAME} was altered")
    if document.get("version") != VERSION:
        raise OtherVersionError(
            f"weight store {folder} has version {document.get('version')!r} (this version of "
            f"Mutirão reads {VERSION}); delete that folder, and it is built again from the model"
        )
    return document
