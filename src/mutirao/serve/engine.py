"""What the server needs of an engine; ``mutirao.inference.Engine`` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mutirao.inference.conversation import Message, TextPieces


class TextEngine(Protocol):
    """A model that writes; used by one thread at a time."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Say whether it takes messages."""
        ...

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            InputError: the prompt is empty, or the model does not take these messages.
        """
        ...

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[str],
    ) -> TextPieces:
        """Begin to generate.

        Raises:
            InputError: the prompt or a setting is not accepted.
        """
        ...
