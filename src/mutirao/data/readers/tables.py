"""Tables: CSV, TSV and Parquet, a record a row.

A table's columns are the keys of JSON lines (see ``rows``): ``text``, or ``prompt`` and
``completion``, and ``unit`` or ``patient``. A table with neither is asked for its text column.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from mutirao.data.readers.json_lines import row_id
from mutirao.data.readers.opening import LINE_BYTES, Source, read_lines
from mutirao.data.readers.rows import RowError, parse_row
from mutirao.data.records import Record

_ROWS_AT_ONCE = 1024


def read_csv(source: Source) -> Iterator[Record]:
    """Yield the record of each row of a CSV file; the first row names the columns.

    What separates columns is found in the first row: a comma, a semicolon or a tab.
    """
    csv.field_size_limit(LINE_BYTES)
    lines = read_lines(source)
    first = next(lines, None)
    if first is None:
        return
    separator = max(",;\t", key=first[1].count)
    names = next(csv.reader([first[1]], delimiter=separator))
    rows = csv.reader((line + "\n" for _, line in lines), delimiter=separator, strict=True)
    while True:
        number = rows.line_num + 2  # the row's first line; the names stand on line 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            source.tell("broken table row", f"is no row of a table ({error})", f":{number}")
            continue
        if row and len(row) != len(names):
            reason = f"has {len(row)} columns (expected {len(names)}, as in the first row)"
            source.tell("broken table row", reason, f":{number}")
        elif row:
            yield from _record(source, dict(zip(names, row, strict=True)), number)


def read_parquet(source: Source) -> Iterator[Record]:
    """Yield the record of each row of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(source.path)
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield from _record(source, row, number)
    except (pyarrow.ArrowException, OSError):
        source.tell("damaged file", "is no Parquet file that can be read")


def _record(source: Source, row: dict[str, Any], number: int) -> Iterator[Record]:
    row = {name: value for name, value in row.items() if value not in (None, "")}
    if not row:
        return
    try:
        yield parse_row(row, row_id(source.name, number), source.name)
    except RowError as error:
        source.tell("row of another shape", f": {error}", f":{number}")
