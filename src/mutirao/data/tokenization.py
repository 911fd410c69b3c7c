"""Turn records into token sequences with a known boundary between given and learned.

The given part and the learned part are encoded apart and joined, so that the boundary
falls between two tokens and scoring a continuation sees the same tokens as training did.
The tokenizer comes in as a function; batching and padding belong to ``train``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mutirao.data.records import Record
from mutirao.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence for the model; loss counts from ``ids[num_context]`` on."""

    ids: tuple[int, ...]
    """Token ids, at least two."""
    num_context: int
    """Leading tokens that are given, at least one: the first token is never predicted."""


def encode_records(
    records: Iterable[Record],
    encode: Callable[[str], Sequence[int]],
    eos_id: int,
    max_tokens: int,
    *,
    learn_context: bool = False,
) -> list[Example]:
    """Encode records in order; see ``encode_record``. Records without tokens give none."""
    return [
        example
        for record in records
        for example in encode_record(
            record, encode, eos_id, max_tokens, learn_context=learn_context
        )
    ]


def encode_record(
    record: Record,
    encode: Callable[[str], Sequence[int]],
    eos_id: int,
    max_tokens: int,
    *,
    learn_context: bool = False,
) -> list[Example]:
    """Encode one record, ended by ``eos_id``, into sequences of at most ``max_tokens``.

    Plain text that is longer is cut into windows; each starts with the last token of the
    one before as its context, so that every token but the first is learned exactly once.
    A given part that is too long loses its beginning, and the learned part stays whole; a
    learned part too long for one sequence goes on in windows as plain text does.

    Args:
        record: what to encode.
        encode: text to token ids, without special tokens.
        eos_id: token that ends a record.
        max_tokens: longest sequence, at least 2.
        learn_context: learn the given part too, as text of the silo; never that of an
            outcome record, whose findings are drawn and follow from nothing.

    Raises:
        DataError: max_tokens is below 2.
    """
    if max_tokens < 2:
        raise DataError(f"max_tokens={max_tokens} is not accepted (expected at least 2)")
    context = list(encode(record.context)) if record.context else []
    completion = list(encode(record.completion)) if record.completion else []
    if not completion:
        return []
    learned = [*completion, eos_id]
    if not context:
        return _cut_windows(learned, max_tokens)
    num_context = min(len(context), max(1, max_tokens - len(learned)))
    ids = context[len(context) - num_context :] + learned
    if len(ids) > max_tokens:
        return _cut_windows(ids, max_tokens)
    return [Example(tuple(ids), 1 if learn_context and record.task != "outcome" else num_context)]


def _cut_windows(ids: list[int], max_tokens: int) -> list[Example]:
    """Cut into windows that overlap by one token; the first token of each is its context."""
    starts = range(0, len(ids) - 1, max_tokens - 1)
    return [Example(tuple(ids[start : start + max_tokens]), 1) for start in starts]
