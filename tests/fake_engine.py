"""An engine without a model, for tests of the server: it repeats the prompt, word by word."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mutirao.errors import InferenceError, InputError
from mutirao.inference.text.text_stream import until_stop


@dataclass
class FakeEngine:
    """A token is a word with the spaces before it; ``gate`` lets each of them out."""

    context: int = 32
    has_chat_template: bool = True
    gate: threading.Semaphore | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    num_generated: int = 0
    num_running: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def encode_prompt(self, prompt: str | Sequence[Any]) -> list[int]:
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in prompt)
        if not text.split():
            raise InputError("the prompt is empty (expected some text)")
        return [len(word) for word in text.split()]

    def stream(self, prompt: str | Sequence[Any], **settings: Any) -> FakeStream:
        self.asked.append({"prompt": prompt, **settings})
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return FakeStream(self, text.split(" "), **settings)


class FakeStream:
    """Words of a prompt, then an end."""

    def __init__(
        self,
        engine: FakeEngine,
        words: list[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        **settings: Any,
    ) -> None:
        self._engine = engine
        self._num_tokens = 0
        self._words = words
        self._limit = max_new_tokens
        self._pieces = until_stop(self._generate(), stop)

    def __enter__(self) -> FakeStream:
        self._engine.num_running += 1
        assert self._engine.num_running == 1, "two generations at once"
        self._engine.ended.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.num_running -= 1
        self._engine.ended.set()

    def __iter__(self) -> Any:
        return self._pieces

    def _generate(self) -> Any:
        for index, word in enumerate(self._words):
            if self._num_tokens == self._limit:
                return
            if self._engine.gate is not None:
                self._engine.gate.acquire()
            if word == "BREAK":
                raise InferenceError("the disk could not be read")
            if word == "CRASH":
                raise RuntimeError("private details")
            self._num_tokens += 1
            self._engine.num_generated += 1
            yield word if index == 0 else " " + word
        self._num_tokens += 1  # the token that ends the text

    def finish(self, text: str) -> FakeStream:
        return self

    @property
    def num_tokens(self) -> int:
        return self._num_tokens
