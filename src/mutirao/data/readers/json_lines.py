"""JSON lines: one object a line, each a record; see ``rows`` for the shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mutirao.data.readers.opening import Source, read_lines
from mutirao.data.readers.rows import ACCEPTED_ROWS, RowError, parse_row
from mutirao.data.records import Record


def row_id(source: str, line_number: int) -> str:
    """Return the id of a record read from a table or JSON lines; lines count from 1."""
    return f"{source}:{line_number}"


def read_json_lines(source: Source) -> Iterator[Record]:
    """Yield the record of each line that is not blank."""
    for number, line in read_lines(source, encoding="utf_8"):
        if not line.strip():
            continue
        place = f":{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            reason = f"is not JSON (expected one object a line: {ACCEPTED_ROWS})"
            source.tell("broken JSON line", reason, place)
            continue
        try:
            yield parse_row(row, row_id(source.name, number), source.name)
        except RowError as error:
            kind, reason = "row of another shape", str(error)
            source.tell(
                kind, f"is {reason}" if reason.startswith("a JSON") else f": {reason}", place
            )
