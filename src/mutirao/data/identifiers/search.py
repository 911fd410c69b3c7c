"""Find identifiers of people in text.

**NAMES ARE NOT FOUND, and so are NOT removed: nor are street addresses, employers, rare
diagnoses, or anything else that no checksum, fixed form or telling word beside it gives
away.** Text that has passed here is not anonymous; it holds fewer direct identifiers.

Most text holds few digits and fewer telling words. Recognisers of numbers are run only where a
row of digits and marks is long enough, the others only on text that has one of their words or
marks: what is found is the same, some times faster.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mutirao.data.identifiers.recognisers import RECOGNISERS, Recogniser

NOT_REMOVED = (
    "Names of people are NOT found and NOT removed, nor are street addresses, employers or "
    "anything that only its meaning gives away: this text is not anonymous."
)
"""To be shown wherever the counts of removed identifiers are."""

_CONTEXT_CHARACTERS = 32
"""How far before a value its telling word may stand; assumption."""

_NUMBER = re.compile(r"[\d(+][\d .()/x+-]{5,}")
"""All that a recogniser of numbers can match lies in one: see ``Recogniser.least_digits``."""

_DIGIT = re.compile(r"\d")

_SEEN_AFTER = 2
"""Characters behind a number that a pattern may look at."""

Region = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Identifier:
    """Where an identifier stands in a text, and what it seems to be."""

    start: int
    """First character, from 0."""
    end: int
    """One past the last character."""
    type: str
    """For instance 'CPF'; see ``recognisers.RECOGNISERS``."""
    score: float
    """How sure the recogniser is, 0 to 1; orders overlapping finds, is no probability."""


def find_identifiers(text: str) -> list[Identifier]:
    """Return the identifiers of a text in order; none overlaps another.

    Of finds that overlap the higher score stays, then the longer, then the earlier.
    """
    lower = text.lower()
    numbers = list(_numbers(text))
    found: list[Identifier] = []
    for recogniser in RECOGNISERS:
        if _can_match(recogniser, text, lower):
            found += _find(recogniser, text, _regions(recogniser, text, numbers))
    if len(found) < 2:
        return found
    found.sort(key=lambda item: (-item.score, item.start - item.end, item.start))
    kept: list[Identifier] = []
    taken = bytearray(len(text))
    for item in found:
        if not any(taken[item.start : item.end]):
            taken[item.start : item.end] = b"\x01" * (item.end - item.start)
            kept.append(item)
    return sorted(kept, key=lambda item: item.start)


def count_types(identifiers: Iterable[Identifier]) -> dict[str, int]:
    """Return how many identifiers there are of each type, types in alphabetic order."""
    return dict(sorted(Counter(item.type for item in identifiers).items()))


def _numbers(text: str) -> Iterator[tuple[int, Region]]:
    """Yield how many digits there are in each row of digits and marks, and the row."""
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        yield len(_DIGIT.findall(match[0])), (start, min(len(text), end + _SEEN_AFTER))


def _can_match(recogniser: Recogniser, text: str, lower: str) -> bool:
    if recogniser.words and not any(word in lower for word in recogniser.words):
        return False
    return recogniser.hint is None or recogniser.hint.search(text) is not None


def _regions(
    recogniser: Recogniser, text: str, numbers: Iterable[tuple[int, Region]]
) -> Iterable[Region]:
    """Return where a recogniser has to look."""
    if not recogniser.least_digits:
        return [(0, len(text))]
    return [region for num_digits, region in numbers if num_digits >= recogniser.least_digits]


def _find(recogniser: Recogniser, text: str, regions: Iterable[Region]) -> Iterator[Identifier]:
    group = "value" if "value" in recogniser.pattern.groupindex else 0
    for begin, until in regions:
        for match in recogniser.pattern.finditer(text, begin, until):
            start, end = match.span(group)
            if recogniser.check is not None and not recogniser.check(text[start:end]):
                continue
            before = text[max(0, start - _CONTEXT_CHARACTERS) : start]
            if recogniser.context is not None and not recogniser.context.search(before):
                continue
            if recogniser.unless is None or not recogniser.unless.search(before):
                yield Identifier(start, end, recogniser.type, recogniser.score)
