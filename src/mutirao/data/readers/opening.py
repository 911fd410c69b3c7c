"""Bytes and lines of a file: decompressed as they are read, decoded, within bounds.

Compressed: ``.gz``, ``.bz2``, ``.xz``. Text is UTF-8; a file that is not, and says nothing by a
byte order mark, is taken as what charset-normalizer finds likeliest of the encodings that English
and Portuguese were written in, unless as many of its characters are right in UTF-8 as are wrong:
then those are told. JSON is UTF-8 by its standard (RFC 8259) and is not guessed at.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from charset_normalizer import from_bytes

from mutirao.data.readers.problems import Problems

LINE_BYTES = 64 * 2**20
"""Longest line: bounds memory."""
FILE_BYTES = 256 * 2**20
"""Largest file, decompressed, of those that are read whole: bounds memory."""
BOMB_BYTES = 2**30
BOMB_RATIO = 200
"""More than so many bytes, and so many times what is on disk, is no text: it was made to harm."""
_SAMPLE_BYTES = 2**20
_ENCODINGS = ["utf_16", "cp1252", "cp850", "mac_roman"]
_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
COMPRESSED = tuple(_OPENERS)
_MARKS = (
    (codecs.BOM_UTF8, "utf_8"),
    (codecs.BOM_UTF16_LE, "utf_16_le"),
    (codecs.BOM_UTF16_BE, "utf_16_be"),
)
_DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Source:
    """A file to read, under its name within the folder."""

    path: Path
    name: str
    problems: Problems

    @property
    def suffix(self) -> str:
        """What the file is, without how it is compressed: '.jsonl' of 'a.jsonl.gz'."""
        path = self.path
        return Path(path.stem if is_compressed(path) else path.name).suffix.lower()

    def tell(self, kind: str, reason: str, place: str = "") -> None:
        """Take note of a problem at a place such as ':12'."""
        self.problems.tell(kind, f"{self.name}{place}", f"{self.path}{place} {reason}")


class _Refused(Exception):
    """The rest of a file is not read; the problem has been told."""


def is_compressed(path: Path) -> bool:
    """Say whether a file's name ends as a compressed one's."""
    return path.suffix.lower() in _OPENERS


def read_lines(source: Source, *, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield a file's lines with their numbers, from 1, without their ends.

    Args:
        source: of text.
        encoding: to decode strictly, a byte order mark apart; None: it is detected.
    """
    try:
        with _open(source) as file:
            sample = file.peek(_SAMPLE_BYTES) if encoding is None else b""
            yield from _decoded(source, file, encoding or _detect(source, sample))
    except _Refused:
        return
    except _DAMAGED:
        source.tell("damaged file", "is damaged: it cannot be decompressed to its end")
    except OSError as error:
        source.tell("unreadable file", f"cannot be read: {error.strerror or error}")


def read_whole(source: Source) -> bytes | None:
    """Return a file's bytes; None, once the problem is told, where they cannot be had."""
    try:
        with _open(source) as file:
            data = file.read(FILE_BYTES + 1)
    except _DAMAGED:
        source.tell("damaged file", "is damaged: it cannot be decompressed to its end")
        return None
    except _Refused:
        return None
    except OSError as error:
        source.tell("unreadable file", f"cannot be read: {error.strerror or error}")
        return None
    if len(data) > FILE_BYTES:
        source.tell("file too large", f"is larger than {FILE_BYTES:,} bytes, decompressed")
        return None
    return data


def decode(source: Source, data: bytes) -> str | None:
    """Return bytes as text; None, once the problem is told, where they are none."""
    try:
        encoding = _detect(source, data[:_SAMPLE_BYTES])
    except _Refused:
        return None
    try:
        return data.decode("utf_8_sig" if encoding == "utf_8" else encoding)
    except UnicodeDecodeError as error:
        _tell_undecodable(source, encoding, error.start, data[error.start])
        return None


class _Watched:
    """A file that ends where it was made to harm."""

    def __init__(self, source: Source, file: IO[bytes]) -> None:
        self._source, self._file, self._num_bytes = source, file, 0
        self._stored_bytes = max(1, source.path.stat().st_size)
        self._begun = b""

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self, size: int) -> bytes:
        """Return the first bytes, which are read again afterwards."""
        self._begun = self._file.read(size)
        return self._begun

    def read(self, size: int) -> bytes:
        data = self._begun + self._file.read(max(0, size - len(self._begun)))
        self._begun = b""
        self._count(len(data))
        return data

    def readline(self, size: int) -> bytes:
        """Return a line, or its first ``size`` bytes."""
        if not self._begun:
            line = self._file.readline(size)
        else:
            end = self._begun.find(b"\n") + 1
            if end or len(self._begun) >= size:
                end = min(end or size, size)
                line, self._begun = self._begun[:end], self._begun[end:]
            else:
                line = self._begun + self._file.readline(size - len(self._begun))
                self._begun = b""
        self._count(len(line))
        return line

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > BOMB_BYTES and self._num_bytes > BOMB_RATIO * self._stored_bytes:
            self._source.tell(
                "decompression bomb",
                f"grows to more than {BOMB_RATIO} times its size when it is decompressed",
            )
            raise _Refused


def _open(source: Source) -> _Watched:
    opener = _OPENERS.get(source.path.suffix.lower(), partial(open, mode="rb"))
    return _Watched(source, opener(source.path))


def _detect(source: Source, sample: bytes) -> str:
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            return encoding
    try:
        # A sample may end within a character.
        codecs.utf_8_decode(sample, "strict", False)
        return "utf_8"
    except UnicodeDecodeError:
        valid = sample.decode("utf_8", "ignore")
        num_wide = sum(character > "\x7f" for character in valid)
        if num_wide >= len(sample) - len(valid.encode("utf_8")):
            return "utf_8"  # with damaged places, which are told
    best = from_bytes(sample, cp_isolation=_ENCODINGS, preemptive_behaviour=False).best()
    if best is None:
        source.tell("unknown encoding", "is text in no encoding that is known; save it as UTF-8")
        raise _Refused
    return best.encoding


def _decoded(source: Source, file: _Watched, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of bytes that are cut at newlines, or of a wider encoding as a whole."""
    if encoding.startswith("utf_16"):
        text = file.read(FILE_BYTES).decode(encoding, "replace").removeprefix("\ufeff")
        yield from enumerate(text.splitlines(), start=1)
        return
    offset, number = 0, 0
    while raw := file.readline(LINE_BYTES + 1):
        number += 1
        if len(raw) > LINE_BYTES:
            source.tell("line too long", f"is longer than {LINE_BYTES:,} bytes", f":{number}")
            while raw and not raw.endswith(b"\n"):
                offset += len(raw)
                raw = file.readline(LINE_BYTES)
        else:
            data = raw.removeprefix(codecs.BOM_UTF8) if offset == 0 else raw
            skipped = len(raw) - len(data)
            try:
                yield number, data.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                place = offset + skipped + error.start
                _tell_undecodable(source, encoding, place, data[error.start], f":{number}")
        offset += len(raw)


def _tell_undecodable(
    source: Source, encoding: str, offset: int, byte: int, place: str = ""
) -> None:
    name = {"utf_8": "UTF-8"}.get(encoding, encoding)
    message = (
        f"{source.path} is not {name} text: byte {offset} is 0x{byte:02x}; save the file as UTF-8"
    )
    source.problems.tell(f"invalid {name}", f"{source.name}{place}", message)
