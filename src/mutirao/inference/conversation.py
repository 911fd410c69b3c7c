"""What any generator of text is asked and answers: messages, generations, conversations.

``engine.Engine`` and ``generate.TextGenerator`` are both such generators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol, Self

Message = Mapping[str, str]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Generation:
    """A finished text and how it came."""

    text: str
    """What was generated, without the prompt."""
    num_tokens: int
    """Generated tokens, the end-of-text token included."""
    seconds: float
    """Time from the request to the last token."""
    time_to_first_token_s: float
    """Time from the request to the first token, in seconds."""
    tokens_per_s: float
    """Tokens after the first, over the time they took; over all where there is only one."""
    bytes_read_per_token: float = 0.0
    """Bytes of weights read from the disk, over the tokens after the first."""
    acceptance: float | None = None
    """Share of drafted tokens that were kept; None without drafts."""
    peak_memory_bytes: int = 0
    """Peak resident memory of the process so far; 0 where it was not measured."""
    predicted_tokens_per_s: float | None = None
    """What the cost model expected; None where it was not asked."""
    plan: str = "all resident"
    """How the weights were placed, in words."""

    def to_json(self) -> str:
        """Return these fields as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


class TextPieces(Protocol):
    """Pieces of one text as they come; leaving its ``with`` block stops generation."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def close(self) -> None:
        """Stop generating."""
        ...

    def finish(self, text: str) -> Generation:
        """Describe the generation once it has ended; ``text`` is its pieces, joined."""
        ...


class Generator(Protocol):
    """A model that writes."""

    @property
    def has_chat_template(self) -> bool:
        """Say whether the model takes messages; a plain prompt always works."""
        ...

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> TextPieces:
        """Generate text piece by piece."""
        ...

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Generate a whole text."""
        ...


class Chat:
    """A conversation that remembers its turns."""

    def __init__(self, generator: Generator, *, system: str | None = None) -> None:
        """Start a conversation.

        Args:
            generator: the model; it needs a chat template.
            system: what the model is told before the first turn.
        """
        self.generator = generator
        self.messages: list[Message] = []
        """All turns so far."""
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def say(self, text: str, **settings: Any) -> Iterator[str]:
        """Answer ``text`` piece by piece, and remember both.

        An answer that is stopped early is remembered as far as it was read; a turn that
        fails before its first piece is forgotten.

        Args:
            text: what the person says.
            settings: see ``Engine.stream``.

        Raises:
            InputError: the conversation no longer fits into the model's context.
        """
        turn: Message = {"role": "user", "content": text}
        pieces: list[str] = []
        with self.generator.stream([*self.messages, turn], **settings) as stream:
            try:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            finally:
                if pieces:
                    answer: Message = {"role": "assistant", "content": "".join(pieces)}
                    self.messages += [turn, answer]
