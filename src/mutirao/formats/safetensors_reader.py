"""Where the tensors of safetensors files lie: names, types, shapes and places, without torch.

The layout is that of github.com/huggingface/safetensors; a sharded model's index is
``model.safetensors.index.json`` as transformers writes it. Nothing that a header says is
believed before it was compared with the file.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.errors import FormatError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
MAX_SHOWN = 100
"""Most characters of a name from a file that a message repeats."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of a number of each type; types of less than a byte are not read."""


@dataclass(frozen=True)
class SafeTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As the format writes it, such as 'BF16'."""
    shape: tuple[int, ...]
    path: Path
    """The file that holds it."""
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """Read the header of one safetensors file and check it against the file.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the header's order.

    Raises:
        FormatError: missing, truncated or damaged, or with a type that is not known.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size_bytes
            if header_bytes > min(size_bytes - 8, MAX_HEADER_BYTES):
                raise FormatError(f"{path} is truncated or no safetensors file: its header is cut")
            header = json.loads(file.read(header_bytes), object_pairs_hook=_without_doubles)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not the JSON of one") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    begin = 8 + int(header_bytes)
    tensors = {name: _read_entry(path, begin, name, entry) for name, entry in header.items()}
    end = begin
    for tensor in sorted(tensors.values(), key=lambda each: each.offset):
        if tensor.offset != end:
            raise _damaged(path, f"{_shown(tensor.name)} does not lie where another ends")
        end = tensor.offset + tensor.num_bytes
    if end != size_bytes:
        raise FormatError(
            f"{path} has {size_bytes} bytes (its header says {end}), so it is truncated or "
            "damaged; download or make it again"
        )
    return tensors


def read_model_tensors(folder: Path) -> dict[str, SafeTensor]:
    """Read the headers of a model directory's weights, in one file or in shards.

    Args:
        folder: a Hugging Face directory.

    Returns:
        The tensors of all shards, by name.

    Raises:
        FormatError: a file is missing, truncated or damaged, or index and shards disagree.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return read_safetensors(folder / WEIGHTS_NAME)
    places = _weight_map(folder)
    tensors: dict[str, SafeTensor] = {}
    for shard in sorted(set(places.values())):
        for name, tensor in read_safetensors(folder / shard).items():
            if places.get(name) != shard:
                raise FormatError(
                    f"{folder / shard} holds {_shown(name)}, which {INDEX_NAME} does not place "
                    "there; download the model again"
                )
            tensors[name] = tensor
    missing = next((name for name in places if name not in tensors), None)
    if missing is not None:
        raise FormatError(
            f"{folder / places[missing]} lacks {_shown(missing)}, which {INDEX_NAME} places "
            "there; download the model again"
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted.

    Raises:
        FormatError: there are none, or the index of the shards is damaged.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    return [folder / shard for shard in sorted(set(_weight_map(folder).values()))]


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{folder} holds no {WEIGHTS_NAME} (pickled weights are not read)"
        ) from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not valid JSON; download the model again") from None
    places = document.get("weight_map") if isinstance(document, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(_is_file_name(shard) for shard in places.values())
    ):
        raise FormatError(f"{path} is damaged: its weight_map names no shards")
    return places


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set("/\\\0") & set(name)
        and len(name) < 256
    )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("two entries have one name")
    return document


def _read_entry(path: Path, begin: int, name: str, entry: Any) -> SafeTensor:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(
            f"{path} has {_shown(name)} of type {_shown(dtype)}, which is not supported "
            f"(expected one of {', '.join(DTYPE_BYTES)})"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{_shown(name)} has no proper shape and place")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise _damaged(path, f"{_shown(name)} has not the bytes of its shape")
    return SafeTensor(name, dtype, tuple(shape), path, begin + offsets[0], num_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _shown(name: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(name)[:MAX_SHOWN])


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} has a damaged header: {what}; download or make it again")
