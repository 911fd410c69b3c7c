"""What an advice found, kept for the next one: lines of JSON in files of the cache.

A file bears a hash of what its lines belong to, so that none is ever out of date; one that is
deleted is found again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.errors import explain_disk_errors


@dataclass(frozen=True)
class KeptLines:
    """A file of JSON objects, one a line, that only grows."""

    path: Path

    def read(self) -> list[dict[str, Any]]:
        """Return what the file has; a line that a kill cut is left out."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else []:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict):
                found.append(values)
        return found

    def add(self, values: Mapping[str, Any]) -> None:
        """Write one more line; it is on disk afterwards.

        Raises:
            DiskFullError: no room; the lines before it are kept.
        """
        with explain_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(values))  # a line that a kill cut ends here
                file.flush()
                os.fsync(file.fileno())
