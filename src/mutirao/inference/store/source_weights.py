"""A model's weights as its own file holds them, under the weight store's names.

Sources are a GGUF file or a Hugging Face directory with safetensors; in the latter, layers
that this project compressed (compressed-tensors, ``pack-quantized``) are expanded to
bfloat16, as ``formats.compressed_tensors`` expands them by default. Matrices are read by
rows, as they lie; vectors are small and read at once, as float32, with the RoPE frequencies
beside them. Needs neither a framework nor the gguf package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError
from mutirao.formats.gguf_header import GGUFTensor, read_gguf_header
from mutirao.formats.packed_rows import PARTS, PackedLayer, find_layer, packed_bits
from mutirao.formats.safetensors_reader import SafeTensor, read_model_tensors
from mutirao.inference.architecture.architectures import spec_from_config, spec_from_gguf
from mutirao.inference.architecture.families import (
    GGUF_ROPE_TABLE,
    gguf_names,
    hf_ignored,
    hf_names,
    norms_stored_minus_one,
)
from mutirao.inference.architecture.model_spec import (
    ModelSpec,
    matrix_shapes,
    rope_vectors,
    vector_shapes,
)
from mutirao.inference.store.plane_formats import FILE_FORMATS
from mutirao.inference.store.planes import floats_of, row_bytes

FLOAT_FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix in its source."""

    name: str
    """Store name."""
    num_rows: int
    num_columns: int
    format: str
    """One of ``plane_formats.FILE_FORMATS``."""
    read_rows: Callable[[int, int], NDArray[np.uint8]]
    """Rows begin..end as GGUF would store them, uint8 (rows * bytes of a row)."""


@dataclass(frozen=True)
class SourceModel:
    """A model's specification and weights, open for reading."""

    spec: ModelSpec
    matrices: dict[str, SourceMatrix]
    """By store name, all that the specification names."""
    vectors: dict[str, NDArray[np.float32]]
    """By store name, all that the specification names."""


@contextmanager
def open_source(path: Path) -> Iterator[SourceModel]:
    """Open a model's weights for reading.

    Args:
        path: a GGUF file, or a Hugging Face directory.

    Raises:
        FormatError: damaged, of an architecture or a type that is not supported, or with
            tensors missing, left over or of other shapes than its own description gives.
    """
    with _Files() as files:
        try:
            model = _open_directory(path, files) if path.is_dir() else _open_gguf(path, files)
        except FormatError as error:
            raise FormatError(
                str(error) if str(path) in str(error) else f"{path}: {error}"
            ) from None
        yield model


class _Files:
    """Source files kept open while they are read by position."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, path: Path, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Read bytes; fewer than asked for, or a read error, is a FormatError."""
        pieces, missing = [], num_bytes
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while missing:
                pieces.append(os.pread(self._descriptors[path], missing, offset))
                if not pieces[-1]:
                    raise FormatError(f"{path} became shorter while it was read; download it again")
                offset, missing = offset + len(pieces[-1]), missing - len(pieces[-1])
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from None
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return np.frombuffer(whole, np.uint8)

    def read_rows(
        self, tensor: SafeTensor, begin: int = 0, end: int | None = None
    ) -> NDArray[np.uint8]:
        """Read some entries of a tensor's first dimension, or all."""
        num_rows = tensor.shape[0] if tensor.shape else 1
        size = tensor.num_bytes // max(1, num_rows)
        num_bytes = ((num_rows if end is None else end) - begin) * size
        return self.read(tensor.path, tensor.offset + begin * size, num_bytes)


def _open_gguf(path: Path, files: _Files) -> SourceModel:
    header = read_gguf_header(path, lambda key: not key.startswith("tokenizer."))
    shapes = {name: tensor.shape[::-1] for name, tensor in header.tensors.items()}
    spec = spec_from_gguf(header.metadata, shapes)
    wanted, matrices, vectors = matrix_shapes(spec), {}, {}
    for name, store_name in gguf_names(spec).items():
        tensor = header.tensors[name]
        if store_name in wanted:
            matrices[store_name] = _gguf_matrix(path, files, tensor, store_name)
        else:
            vectors[store_name] = _gguf_vector(path, files, tensor)
    table = header.tensors.get(GGUF_ROPE_TABLE)
    factors = None if table is None else _gguf_vector(path, files, table)
    return SourceModel(spec, matrices, vectors | rope_vectors(spec, factors))


def _gguf_matrix(path: Path, files: _Files, tensor: GGUFTensor, name: str) -> SourceMatrix:
    num_columns, num_rows = tensor.shape
    if tensor.type_name not in FILE_FORMATS:
        raise FormatError(
            f"{path}: matrix {tensor.name} is of type {tensor.type_name}, which is not supported "
            f"(expected one of {', '.join(FILE_FORMATS)}); choose another quantization of this "
            "model, such as Q4_K_M"
        )
    size = row_bytes(tensor.type_name, num_columns)

    def read_rows(begin: int, end: int) -> NDArray[np.uint8]:
        return files.read(path, tensor.offset + begin * size, (end - begin) * size)

    return SourceMatrix(name, num_rows, num_columns, tensor.type_name, read_rows)


def _gguf_vector(path: Path, files: _Files, tensor: GGUFTensor) -> NDArray[np.float32]:
    if tensor.type_name not in FLOAT_FORMATS:
        raise FormatError(
            f"{path}: vector {tensor.name} is of type {tensor.type_name}, which is not supported "
            f"(expected one of {', '.join(FLOAT_FORMATS)}); download or convert the model again"
        )
    return floats_of(files.read(path, tensor.offset, tensor.num_bytes), tensor.type_name)


def _open_directory(folder: Path, files: _Files) -> SourceModel:
    config = _read_config(folder)
    spec, bits = spec_from_config(config), packed_bits(config)
    tensors = read_model_tensors(folder)
    places = _places(spec, tensors, is_packed=bits is not None)
    matrices = {}
    for name, shape in matrix_shapes(spec).items():
        place = places[name]
        if place in tensors:
            matrices[name] = _plain_matrix(files, tensors[place], name, shape)
        else:
            assert bits is not None  # else places are those of plain tensors
            prefix = place.removesuffix(".weight")
            layer = find_layer(tensors, prefix, shape, bits.of(prefix))
            matrices[name] = _packed_matrix(files, layer, name)
    frequencies, lifted = rope_vectors(spec), norms_stored_minus_one(spec)
    vectors = dict(frequencies)
    for name, size in vector_shapes(spec).items():
        if name not in frequencies:
            tensor = tensors[places[name]]
            _check_tensor(tensor, size)
            values = floats_of(files.read_rows(tensor), tensor.dtype)
            vectors[name] = values + np.float32(1) if name in lifted else values
    return SourceModel(spec, matrices, vectors)


def _places(spec: ModelSpec, tensors: dict[str, SafeTensor], is_packed: bool) -> dict[str, str]:
    """Return the source's tensor name of every store name; a compressed layer's ``.weight``.

    Raises:
        FormatError: a tensor is missing, there twice, or has no place in the model.
    """
    names, places = hf_names(spec), dict[str, str]()
    matrices = matrix_shapes(spec)
    for name in tensors:
        layer, _, part = name.rpartition(".")
        is_part = is_packed and part in PARTS
        place = f"{layer}.weight" if is_part else name
        if place in names and (not is_part or names[place] in matrices):
            if places.setdefault(names[place], place) != place or (is_part and place in tensors):
                raise FormatError(f"tensor {name[:100]} is there twice, under two names")
        elif not hf_ignored(spec, name):
            raise FormatError(
                f"tensor {name[:100]!r} has no place in a model of the {spec.architecture} family "
                "as it is supported; choose another model"
            )
    for name in {**matrices, **vector_shapes(spec)}:
        if name not in places and not name.startswith("rope_freqs"):
            stems = sorted(theirs for theirs, ours in names.items() if ours == name)
            raise FormatError(
                f"the weights lack {stems[-1] if stems else name}, which config.json calls for; "
                "download the model again"
            )
    return places


def _plain_matrix(
    files: _Files, tensor: SafeTensor, name: str, shape: tuple[int, int]
) -> SourceMatrix:
    _check_tensor(tensor, shape)
    return SourceMatrix(
        name, *shape, tensor.dtype, lambda begin, end: files.read_rows(tensor, begin, end)
    )


def _packed_matrix(files: _Files, layer: PackedLayer, name: str) -> SourceMatrix:
    return SourceMatrix(
        name,
        *layer.shape,
        "BF16",
        lambda begin, end: layer.read_rows(files.read_rows, begin, end),
    )


def _check_tensor(tensor: SafeTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOAT_FORMATS:
        raise FormatError(
            f"{tensor.path}: {tensor.name[:100]} is of type {tensor.dtype}, which is not "
            f"supported (expected one of {', '.join(FLOAT_FORMATS)}); choose another model"
        )
    if tensor.shape != shape:
        raise FormatError(
            f"{tensor.path}: {tensor.name[:100]} has shape {tensor.shape} (expected {shape}, as "
            "config.json says); download the model again"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not valid JSON; download the model again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is damaged (expected a JSON object)")
    return config
