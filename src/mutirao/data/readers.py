"""Read a silo's folder of text files as a stream of records.

``.jsonl`` files hold one JSON object a line, in the shapes that fine-tuning tools share:
``{"text"}``, ``{"messages": [{"role", "content"}]}``, ``{"prompt", "completion"}``, and
``{"prompt", "choices", "answer"}``. ``"unit"``, or else ``"patient"``, a string or a whole
number, says whose record it is, and is kept as a hash; other keys of a row are left unread.
``.txt`` and ``.md`` files are a document each, long ones split at blank lines. Everything is
UTF-8. Hidden files are passed over. Parquet, PDF and word-processor files are not read.

Chat messages are written as ``role: content`` lines, the last one being what is learned:
the model's own chat template belongs to tuning, not to reading.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mutirao.artifact import sha256_of_file
from mutirao.data.records import Record
from mutirao.errors import DataError

ACCEPTED_SUFFIXES = (".jsonl", ".txt", ".md")
PIECE_CHARACTERS = 4000
"""About 1,000 tokens of English: a few training windows; assumption."""

_UNIT_DIGITS = 32
_ACCEPTED_ROWS = (
    '{"text"}, {"messages"}, {"prompt", "completion"} or {"prompt", "choices", "answer"}'
)


def read_folder(folder: Path) -> Iterator[Record]:
    """Read every record of a folder and its subfolders, files in sorted order.

    The folder is checked at once; files are read one line or piece at a time.

    Args:
        folder: holds ``.jsonl``, ``.txt`` or ``.md`` files.

    Raises:
        DataError: the folder is missing, empty or holds no accepted file; a file cannot be
            read or is not UTF-8; a line is not JSON or has none of the accepted keys.
    """
    return _read_files(folder, list_files(folder))


def read_file(path: Path) -> Iterator[Record]:
    """Read every record of one file, one line or piece at a time.

    Args:
        path: a ``.jsonl``, ``.txt`` or ``.md`` file.

    Raises:
        DataError: see ``read_folder``.
    """
    if not path.is_file() or path.suffix.lower() not in ACCEPTED_SUFFIXES:
        what = "is of another kind" if path.is_file() else "is no file"
        raise DataError(f"{path} {what} (expected a .jsonl, .txt or .md file)")
    return _read_files(path.parent, [path])


def list_files(folder: Path) -> list[Path]:
    """Return the files that ``read_folder`` reads, in the order in which it does.

    Raises:
        DataError: the folder is missing, empty, or holds no accepted file.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what} (expected a folder of .jsonl, .txt or .md files)")
    found = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]
    files = sorted(
        (path for path in found if path.suffix.lower() in ACCEPTED_SUFFIXES),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not files:
        what = f"holds {len(found)} files of other kinds" if found else "is empty"
        raise DataError(f"{folder} {what} (expected at least one .jsonl, .txt or .md file)")
    return files


def folder_sha256(folder: Path) -> str:
    """Return one sha256 of the names and contents of the files that ``read_folder`` reads.

    Raises:
        DataError: the folder holds nothing to read, or a file may not be read.
    """
    digest = hashlib.sha256()
    for path in list_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            content = sha256_of_file(path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}; let this user read the silo's files"
            ) from None
        digest.update(f"{content} {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def row_id(source: str, line_number: int) -> str:
    """Return the id of a record read from a JSONL file; lines count from 1."""
    return f"{source}:{line_number}"


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read_files(folder: Path, files: Iterable[Path]) -> Iterator[Record]:
    for path in files:
        # A name that is not UTF-8 itself must still be printable and storable.
        source = path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
        name = source.decode("utf-8", "replace")
        if path.suffix.lower() == ".jsonl":
            yield from _read_rows(path, name)
        else:
            yield from _read_document(path, name)


def _read_lines(path: Path) -> Iterator[str]:
    """Yield a file's lines without their ends, decoding strictly."""
    offset = 0
    try:
        with path.open("rb") as file:
            for raw in file:
                data = raw.removeprefix(codecs.BOM_UTF8) if offset == 0 else raw
                skipped = len(raw) - len(data)
                try:
                    yield data.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is not UTF-8 text: byte {offset + skipped + error.start} is "
                        f"0x{data[error.start]:02x}; save the file as UTF-8"
                    ) from None
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_rows(path: Path, source: str) -> Iterator[Record]:
    for number, line in enumerate(_read_lines(path), start=1):
        if line.strip():
            yield _parse_row(line, path, source, number)


def _parse_row(line: str, path: Path, source: str, number: int) -> Record:
    place = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(
            f"{place} is not JSON (expected one object a line: {_ACCEPTED_ROWS})"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is a JSON {type(row).__name__} (expected {_ACCEPTED_ROWS})")
    try:
        parts = {**_parse_parts(row), "unit": _unit_of(row)}
        record = Record(id=row_id(source, number), source=source, **parts)
        record.model_dump_json().encode("utf-8")
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise DataError(f"{place}: {field + ': ' if field else ''}{message}") from None
    except (_RowError, ValueError) as error:
        raise DataError(f"{place}: {error}") from None
    return record


class _RowError(Exception):
    """What is wrong with a row, before file and line are known."""


def _parse_parts(row: dict[str, Any]) -> dict[str, Any]:
    """Return Record fields of a row; the most specific shape that fits is taken."""
    if "prompt" in row and "choices" in row:
        return _parse_choices(row)
    if "prompt" in row and "completion" in row:
        return _join(_text_of(row, "prompt"), _text_of(row, "completion"))
    if "messages" in row:
        return _parse_messages(row["messages"])
    if "text" in row:
        return {"text": _text_of(row, "text")}
    keys = ", ".join(sorted(map(str, row))[:6]) or "none"
    raise _RowError(f"keys {keys} are not a record (expected {_ACCEPTED_ROWS})")


def _parse_choices(row: dict[str, Any]) -> dict[str, Any]:
    choices, answer = row["choices"], row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise _RowError("choices must be a list of at least two non-empty strings")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise _RowError(
            f"answer={answer!r} is not accepted (expected the index of the right choice, "
            f"0 to {len(choices) - 1})"
        )
    task = row.get("task", "question")
    if task not in ("question", "outcome"):
        raise _RowError(f"task={task!r} is not accepted (expected 'question' or 'outcome')")
    if task == "outcome" and len(choices) != 2:
        raise _RowError(f"an outcome has two choices, no then yes ({len(choices)} came)")
    completion = _text_of(row, "completion") if "completion" in row else choices[answer]
    joined = _join(_text_of(row, "prompt"), completion)
    return {**joined, "choices": tuple(choices), "answer": answer, "task": task}


def _parse_messages(messages: Any) -> dict[str, Any]:
    if not isinstance(messages, list) or not messages:
        raise _RowError("messages must be a non-empty list of {role, content}")
    lines = []
    for message in messages:
        if not isinstance(message, dict):
            raise _RowError("each message must be an object with role and content")
        lines.append((_text_of(message, "role"), _text_of(message, "content")))
    given = "".join(f"{role}: {content}\n" for role, content in lines[:-1])
    role, content = lines[-1]
    return _join(f"{given}{role}:", f" {content}")


def _join(context: str, completion: str) -> dict[str, Any]:
    return {"text": context + completion, "context_length": len(context)}


def _text_of(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _RowError(f"{key} must be a string ({type(value).__name__} came)")
    return value


def _unit_of(row: dict[str, Any]) -> str:
    """Return a hash of whose record a row is; what is there but unusable must not go unnoticed."""
    key = "unit" if "unit" in row else "patient"
    value = row.get(key)
    if value is None:
        return ""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not (is_number or isinstance(value, str)) or value == "":
        raise _RowError(f"{key} must be a non-empty string or a whole number")
    return hashlib.sha256(str(value).encode("utf-8", "replace")).hexdigest()[:_UNIT_DIGITS]


def _read_document(path: Path, source: str) -> Iterator[Record]:
    for number, piece in enumerate(_split_at_blank_lines(_read_lines(path)), start=1):
        yield Record(id=f"{source}#{number}", source=source, text=piece)


def _split_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join paragraphs into pieces of at most PIECE_CHARACTERS, cutting longer paragraphs."""
    piece = ""
    for paragraph in _paragraphs(lines):
        for part in _cut(paragraph):
            if piece and len(piece) + 2 + len(part) > PIECE_CHARACTERS:
                yield piece
                piece = part
            else:
                piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    num_characters = 0
    for line in lines:
        if line.strip():
            paragraph.append(line)
            num_characters += len(line)
        # A book without blank lines must not be gathered whole.
        if paragraph and (not line.strip() or num_characters > 4 * PIECE_CHARACTERS):
            yield "\n".join(paragraph)
            paragraph, num_characters = [], 0
    if paragraph:
        yield "\n".join(paragraph)


def _cut(paragraph: str) -> Iterator[str]:
    """Cut a long paragraph at the last line end, else sentence, else space that fits."""
    start = 0
    while len(paragraph) - start > PIECE_CHARACTERS:
        window = paragraph[start : start + PIECE_CHARACTERS]
        end = max(window.rfind("\n"), window.rfind(". ") + 1)
        if end < PIECE_CHARACTERS // 2:
            end = window.rfind(" ")
        if end < PIECE_CHARACTERS // 2:
            end = PIECE_CHARACTERS
        yield paragraph[start : start + end].strip()
        start += end
    if rest := paragraph[start:].strip():
        yield rest
