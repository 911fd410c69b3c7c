"""Sizes as people write them: 600MB, 1.5GiB, 800000000."""

from __future__ import annotations

import re

from mutirao.errors import InputError

_UNITS = {
    "": 1,
    "b": 1,
    **{
        f"{letter}{ending}": 1000 ** (i + 1)
        for i, letter in enumerate("kmgt")
        for ending in ("", "b")
    },
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Read a size in bytes; units are decimal (MB) or binary (MiB), in any case.

    Raises:
        InputError: it is not a positive number with a known unit.
    """
    match = _SIZE.fullmatch(text)
    size = round(float(match[1]) * _UNITS.get(match[2].lower(), 0)) if match else 0
    if size <= 0:
        raise InputError(f"size {text!r} is not understood (expected for example 600MB or 1.5GiB)")
    return size
