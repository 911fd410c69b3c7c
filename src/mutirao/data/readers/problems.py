"""What is wrong with a site's files: told at once, or counted while the rest is read.

A message names the file, the place in it and the kind of problem, never what stands there.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from mutirao.errors import DataError

_PLACES = 5
"""Places that are kept of each kind."""


class Problems:
    """Stops at the first problem."""

    def tell(self, kind: str, place: str, message: str) -> None:
        """Take note of a problem; what has it is left out by the caller.

        Args:
            kind: in a few words, such as 'broken JSON line'; problems are counted by it.
            place: file within the folder, and line or piece, such as 'notes.jsonl:12'.
            message: one sentence for people, with the whole path.

        Raises:
            DataError: with the message.
        """
        raise DataError(message)

    def note(self, kind: str, place: str) -> None:
        """Take note of what was mended or has nothing to read; never stops."""


class CountedProblems(Problems):
    """Counts problems, and lets the rest be read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def tell(self, kind: str, place: str, message: str) -> None:
        """Count a problem by kind and remember some of the places."""
        self.note(kind, place)

    def note(self, kind: str, place: str) -> None:
        """Count it as well."""
        self.counts[kind] += 1
        if len(self.places[kind]) < _PLACES:
            self.places[kind].append(place)
