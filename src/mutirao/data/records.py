"""One piece of text to learn from, in the single shape that every stage shares.

A record is plain text, a question with options, or an outcome to predict. What is given
and what is learned stand in one string with the boundary beside it, so that filters see
the text as a reader would. Reading files is ``readers``; token ids are ``tokenization``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mutirao.config import Config

Task = Literal["text", "question", "outcome"]


class Record(Config):
    """A text, where it came from, and what of it is given, learned and scored."""

    id: str
    """File name inside the silo and line or piece number: 'notes.jsonl:12', 'a.md#3'."""
    source: str
    """File name inside the silo, with forward slashes."""
    text: str
    """The whole text: what is given, then what is learned."""
    context_length: int = 0
    """Leading characters of ``text`` that are given, not learned."""
    choices: tuple[str, ...] = ()
    """Continuations of the given part to score against each other; empty for plain text."""
    answer: int | None = None
    """Index of the right choice, from 0; None for plain text."""
    task: Task = "text"
    """What the record is for: text to model, a question, or a yes/no outcome."""
    unit: str = ""
    """Whose record it is, such as a patient's pseudonym: all records of a unit are hidden
    together by differential privacy. Empty where each record stands for itself."""

    @property
    def context(self) -> str:
        """The given part."""
        return self.text[: self.context_length]

    @property
    def unit_key(self) -> str:
        """The unit, or the record's own id where it has none."""
        return f"unit:{self.unit}" if self.unit else f"record:{self.id}"

    @property
    def completion(self) -> str:
        """The learned part."""
        return self.text[self.context_length :]

    @model_validator(mode="after")
    def _check_parts(self) -> Record:
        if not 0 <= self.context_length <= len(self.text):
            raise ValueError(
                f"context_length={self.context_length} is not accepted "
                f"(expected 0 to {len(self.text)}, the text's length)"
            )
        if self.choices and (self.answer is None or not 0 <= self.answer < len(self.choices)):
            raise ValueError(
                f"answer={self.answer} is not accepted (expected 0 to {len(self.choices) - 1}, "
                "the index of the right choice)"
            )
        if not self.choices and (self.answer is not None or self.task != "text"):
            raise ValueError(f"a record with answer or task={self.task!r} needs choices")
        return self
