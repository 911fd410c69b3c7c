"""A site's folder as a stream of records, files in sorted order.

========== =======================================================================================
ending     read as
========== =======================================================================================
.jsonl     JSON lines in the shapes of fine-tuning tools, see ``rows``
.csv .tsv  a row a record, columns named as the keys of JSON lines, see ``tables``
.parquet   the same
.txt .md   a document, long ones cut at blank lines, see ``documents``
.html .htm its visible text
.pdf       its text layer
.json      an HL7 FHIR bundle, see ``fhir``
========== =======================================================================================

All but Parquet may be compressed (.gz, .bz2, .xz). Hidden files are passed over, and links to
folders are not followed. Word-processor files and images are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mutirao.artifact import sha256_of_file
from mutirao.data.readers.documents import read_html, read_pdf, read_text
from mutirao.data.readers.fhir import read_bundle
from mutirao.data.readers.json_lines import read_json_lines
from mutirao.data.readers.opening import COMPRESSED, Source, is_compressed
from mutirao.data.readers.problems import Problems
from mutirao.data.readers.tables import read_csv, read_parquet
from mutirao.data.records import Record
from mutirao.errors import DataError

READERS: dict[str, Callable[[Source], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".md": read_text,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".json": read_bundle,
}
ACCEPTED = f"{', '.join(READERS)}, or {', '.join(COMPRESSED)} of them"


def read_folder(folder: Path, problems: Problems | None = None) -> Iterator[Record]:
    """Read every record of a folder and its subfolders, files in sorted order.

    The folder is checked at once; files are read one line or piece at a time.

    Args:
        folder: holds files of the accepted kinds.
        problems: is told what is wrong with files and rows; None: the first raises.

    Raises:
        DataError: the folder is missing, empty or holds no accepted file; or, where nothing else
            is told, a file cannot be read or a row has no accepted shape.
    """
    return _read_files(folder, list_files(folder), problems or Problems())


def read_file(path: Path, problems: Problems | None = None) -> Iterator[Record]:
    """Read every record of one file, one line or piece at a time.

    Args:
        path: of an accepted kind.
        problems: see ``read_folder``.

    Raises:
        DataError: see ``read_folder``.
    """
    if not path.is_file() or not _is_accepted(path):
        what = "is of another kind" if path.is_file() else "is no file"
        raise DataError(f"{path} {what} (expected {ACCEPTED})")
    return _read_files(path.parent, [path], problems or Problems())


def list_files(folder: Path) -> list[Path]:
    """Return the files that ``read_folder`` reads, in the order in which it does.

    Raises:
        DataError: the folder is missing, empty, or holds no accepted file.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what} (expected a folder of {ACCEPTED})")
    found = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)]
    files = sorted(
        filter(_is_accepted, found), key=lambda path: path.relative_to(folder).as_posix()
    )
    if not files:
        what = f"holds {len(found)} files of other kinds" if found else "is empty"
        raise DataError(f"{folder} {what} (expected at least one of {ACCEPTED})")
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


def _is_accepted(path: Path) -> bool:
    suffix = path.suffix.lower()
    if is_compressed(path):
        inner = Path(path.stem).suffix.lower()
        return inner in READERS and inner != ".parquet"
    return suffix in READERS


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _read_files(folder: Path, files: Iterable[Path], problems: Problems) -> Iterator[Record]:
    for path in files:
        # A name that is not UTF-8 itself must still be printable and storable.
        name = path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
        source = Source(path, name.decode("utf-8", "replace"), problems)
        if not path.stat().st_size:
            problems.note("empty file", source.name)
            continue
        for record in READERS[source.suffix](source):
            yield _without_nul(record, problems) if "\0" in record.text else record


def _without_nul(record: Record, problems: Problems) -> Record:
    """Return a record without NUL characters, which no text has and many programs stop at."""
    problems.note("NUL characters removed", record.id)
    context = record.context.replace("\0", "")
    changes = {
        "text": context + record.completion.replace("\0", ""),
        "context_length": len(context),
        "choices": tuple(each.replace("\0", "") for each in record.choices),
    }
    return record.model_copy(update=changes)
