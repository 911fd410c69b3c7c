"""A JSON object as a record, in the shapes that fine-tuning tools share.

``{"text"}``, ``{"messages": [{"role", "content"}]}``, ``{"prompt", "completion"}``, and
``{"prompt", "choices", "answer"}``. ``"unit"``, or else ``"patient"``, a string or a whole number,
says whose record it is, and is kept as a hash; other keys are left unread.

Chat messages are written as ``role: content`` lines, the last one being what is learned: the
model's own chat template belongs to tuning, not to reading.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import ValidationError

from mutirao.data.records import Record

ACCEPTED_ROWS = (
    '{"text"}, {"messages"}, {"prompt", "completion"} or {"prompt", "choices", "answer"}'
)
_UNIT_DIGITS = 32


class RowError(Exception):
    """What is wrong with a row, before file and line are known."""


def parse_row(row: Any, record_id: str, source: str) -> Record:
    """Return a row as a record; the most specific shape that fits is taken.

    Args:
        row: what stood in the file.
        record_id: see ``records.Record``.
        source: the file's name.

    Raises:
        RowError: it has none of the accepted shapes.
    """
    if not isinstance(row, dict):
        raise RowError(f"a JSON {type(row).__name__} (expected {ACCEPTED_ROWS})")
    try:
        parts = {**_parse_parts(row), "unit": _unit_of(row)}
        record = Record(id=record_id, source=source, **parts)
        record.model_dump_json().encode("utf-8")
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise RowError(f"{field + ': ' if field else ''}{message}") from None
    except ValueError:
        raise RowError("text with half a character (a lone surrogate)") from None
    return record


def _parse_parts(row: dict[str, Any]) -> dict[str, Any]:
    """Return Record fields of a row; the most specific shape that fits is taken."""
    if "prompt" in row and "choices" in row:
        return _parse_choices(row)
    if "prompt" in row and "completion" in row:
        return _join(_text_of(row, "prompt"), _text_of(row, "completion"))
    if "messages" in row:
        return _parse_messages(row["messages"])
    if "text" in row:
        return {"text": _text_of(row, "text")}
    keys = ", ".join(sorted(map(str, row))[:6]) or "none"
    raise RowError(f"keys {keys} are not a record (expected {ACCEPTED_ROWS})")


def _parse_choices(row: dict[str, Any]) -> dict[str, Any]:
    choices, answer = row["choices"], row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise RowError("choices must be a list of at least two non-empty strings")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise RowError(
            f"answer={answer!r} is not accepted (expected the index of the right choice, "
            f"0 to {len(choices) - 1})"
        )
    task = row.get("task", "question")
    if task not in ("question", "outcome"):
        raise RowError(f"task={task!r} is not accepted (expected 'question' or 'outcome')")
    if task == "outcome" and len(choices) != 2:
        raise RowError(f"an outcome has two choices, no then yes ({len(choices)} came)")
    completion = _text_of(row, "completion") if "completion" in row else choices[answer]
    joined = _join(_text_of(row, "prompt"), completion)
    return {**joined, "choices": tuple(choices), "answer": answer, "task": task}


def _parse_messages(messages: Any) -> dict[str, Any]:
    if not isinstance(messages, list) or not messages:
        raise RowError("messages must be a non-empty list of {role, content}")
    lines = []
    for message in messages:
        if not isinstance(message, dict):
            raise RowError("each message must be an object with role and content")
        lines.append((_text_of(message, "role"), _text_of(message, "content")))
    given = "".join(f"{role}: {content}\n" for role, content in lines[:-1])
    role, content = lines[-1]
    return _join(f"{given}{role}:", f" {content}")


def _join(context: str, completion: str) -> dict[str, Any]:
    return {"text": context + completion, "context_length": len(context)}


def _text_of(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{key} must be a string ({type(value).__name__} came)")
    return value


def hash_unit(value: Any) -> str:
    """Return what stands for whoever a record is of; empty where nobody is named."""
    if value is None:
        return ""
    return hashlib.sha256(str(value).encode("utf-8", "replace")).hexdigest()[:_UNIT_DIGITS]


def _unit_of(row: dict[str, Any]) -> str:
    """Return a hash of whose record a row is; what is there but unusable must not go unnoticed."""
    key = "unit" if "unit" in row else "patient"
    value = row.get(key)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and (not (is_number or isinstance(value, str)) or value == ""):
        raise RowError(f"{key} must be a non-empty string or a whole number")
    return hash_unit(value)
