"""What the server needs of an engine; ``mutirao.inference.Engine`` is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol

Message = Mapping[str, str]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}."""


class FinishedText(Protocol):
    """What is known of a generation that has ended."""

    @property
    def num_tokens(self) -> int:
        """Generated tokens, the one that ended the text included."""


class TextPieces(Protocol):
    """A text while it is generated; leaving its ``with`` block stops generation."""

    def __enter__(self) -> TextPieces: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __iter__(self) -> Iterator[str]: ...

    def finish(self, text: str) -> FinishedText:
        """Describe the generation, given all its pieces joined."""


class TextEngine(Protocol):
    """A model that writes; used by one thread at a time."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it takes messages."""

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            InputError: the prompt is empty, or the model does not take these messages.
        """

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
