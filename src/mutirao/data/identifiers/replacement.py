"""Put something else in the place of identifiers that were found."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mutirao.data.identifiers.search import Identifier

Put = Callable[[str, str], str]
"""Returns what stands for an identifier, from its type and its value."""


def type_in_brackets(type_: str, _: str) -> str:
    """Return the type, in brackets."""
    return f"[{type_}]"


def redact(text: str, identifiers: Iterable[Identifier], put: Put = type_in_brackets) -> str:
    """Return the text with each identifier replaced, by default by its type: '[CPF]'.

    Args:
        text: the text in which they were found.
        identifiers: not overlapping, in any order.
        put: see ``Put``.
    """
    pieces, position = [], 0
    for item in sorted(identifiers, key=lambda item: item.start):
        pieces += [text[position : item.start], put(item.type, text[item.start : item.end])]
        position = item.end
    return "".join([*pieces, text[position:]])
