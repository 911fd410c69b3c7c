"""Read single fields of a model's own description, believing none of them.

Beside ``architectures.py``, its only user: counts, numbers, flags and token ids, out of
config.json and out of GGUF metadata alike, each checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mutirao.errors import FormatError
from mutirao.inference.architecture.model_spec import MAX_SIZE

MAX_SHOWN = 100  # characters of a field's value in a message: it may be a file's worth


def count(
    fields: Mapping[str, Any], key: str, default: int | None = None, limit: int = MAX_SIZE
) -> int:
    """Return a positive integer; the default where the field is absent or null.

    Raises:
        FormatError: absent without a default, not an integer, or outside 1 to limit.
    """
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise unsupported(key, value, [f"a whole number from 1 to {limit}"])
    return value


def number(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a finite number; the default where the field is absent or null.

    Raises:
        FormatError: absent without a default, or not a finite number.
    """
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise unsupported(key, value, ["a number"])
    return float(value)


def flag(fields: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Return a truth value; the default where the field is absent or null.

    Raises:
        FormatError: something else than true or false.
    """
    value = fields.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise unsupported(key, value, ["true", "false"])
    return value


def token_ids(value: Any) -> tuple[int, ...]:
    """Return token ids out of null, one id or a list of ids.

    Raises:
        FormatError: an id is no whole number from 0.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_SIZE:
            raise unsupported("an end token", token, ["a token id"])
    return tuple(dict.fromkeys(values))


def uniform(key: str, value: Any) -> Any:
    """Return the one value of a list that has the same value for each layer.

    Raises:
        FormatError: the values differ.
    """
    if not isinstance(value, list) or not value:
        return value
    if any(entry != value[0] for entry in value):
        raise unsupported(key, value, ["one value for all layers"])
    return value[0]


def refuse(fields: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that change the maths.

    Args:
        fields: a model's description.
        refused: field to the values under which it changes nothing, None meaning absent.

    Raises:
        FormatError: a field has another value; the message names both.
    """
    for key, harmless in refused.items():
        if fields.get(key) not in harmless:
            accepted = ["no such field", *(str(v) for v in harmless if v is not None)]
            raise unsupported(key, fields[key], accepted)


def unsupported(key: str, value: Any, accepted: Iterable[str]) -> FormatError:
    """Return the error for a field whose value cannot be used."""
    shown = "".join(c if c.isprintable() else "?" for c in repr(value)[:MAX_SHOWN])
    return FormatError(
        f"the model's {key} is {shown}, which is not supported (expected "
        f"{' or '.join(accepted)}); choose another model, or download this one again"
    )
