"""Put something else in the place of identifiers that were found."""

from __future__ import annotations

from collections.abc import Iterable

from mutirao.data.identifiers.search import Identifier


def redact(text: str, identifiers: Iterable[Identifier]) -> str:
    """Return the text with each identifier replaced by its type in brackets: '[CPF]'.

    Args:
        text: the text in which they were found.
        identifiers: not overlapping, in any order.
    """
    pieces, position = [], 0
    for item in sorted(identifiers, key=lambda item: item.start):
        pieces += [text[position : item.start], f"[{item.type}]"]
        position = item.end
    return "".join([*pieces, text[position:]])
