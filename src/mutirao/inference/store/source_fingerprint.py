"""Telling a changed model from an unchanged one without reading all of it.

A fingerprint holds each file's size, modification time and the hash of its ends; small
files, and larger ones up to 256 MiB, are hashed whole besides, so that a copy or a touched
file is known again. A large file that is altered in its middle, with its size and time put
back, goes unnoticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mutirao.errors import FormatError
from mutirao.formats.safetensors_reader import weight_files

ENDS_BYTES = 1 << 20
"""Bytes that are hashed at each end of a file."""
WHOLE_BYTES = 1 << 28
"""Up to this size a file is hashed whole: some tenths of a second, once per build."""


def fingerprint(path: Path) -> dict[str, Any]:
    """Return what changes when a source does.

    Args:
        path: a GGUF file, or a Hugging Face directory.

    Returns:
        ``path``, and ``files``: name, size_bytes, mtime_ns, sha256 of both ends together
        (``ends_sha256``) and of the whole (``sha256``, None for large files).

    Raises:
        FormatError: the source is not there or cannot be read.
    """
    files = [_look_at(file) for file in _source_files(path)]
    for entry, file in zip(files, _source_files(path), strict=True):
        is_small = entry["size_bytes"] <= WHOLE_BYTES
        entry["sha256"] = _hash(file, [(0, entry["size_bytes"])]) if is_small else None
    return {"path": str(path.resolve()), "files": files}


def is_same_source(old: dict[str, Any], path: Path) -> bool:
    """Whether a source is still what a fingerprint was taken of.

    Args:
        old: what ``fingerprint`` returned, maybe long ago.
        path: a GGUF file, or a Hugging Face directory.

    Raises:
        FormatError: the source is not there or cannot be read.
    """
    files, entries = _source_files(path), old.get("files")
    if not isinstance(entries, list) or len(entries) != len(files):
        return False
    for was, file in zip(entries, files, strict=True):
        now = _look_at(file)
        if not isinstance(was, dict):
            return False
        if any(was.get(key) != now[key] for key in ("name", "size_bytes", "ends_sha256")):
            return False
        if was.get("mtime_ns") != now["mtime_ns"]:
            whole = was.get("sha256")
            if whole is None or whole != _hash(file, [(0, now["size_bytes"])]):
                return False
    return True


def _source_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path} does not exist (expected a GGUF file or a model directory)")
    texts = {file for kind in ("*.json", "*.jinja") for file in path.glob(kind) if file.is_file()}
    return sorted(texts | set(weight_files(path)))


def _look_at(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    size = status.st_size
    ends = [(0, min(size, ENDS_BYTES)), (max(0, size - ENDS_BYTES), size)]
    return {
        "name": path.name,
        "size_bytes": size,
        "mtime_ns": status.st_mtime_ns,
        "ends_sha256": _hash(path, ends),
    }


def _hash(path: Path, pieces: Iterable[tuple[int, int]]) -> str:
    """Return the sha256 of some stretches of a file, in bytes from its beginning."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for begin, end in pieces:
                file.seek(begin, os.SEEK_SET)
                while begin < end and (data := file.read(min(ENDS_BYTES, end - begin))):
                    digest.update(data)
                    begin += len(data)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
