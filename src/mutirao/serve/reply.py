"""Replies and errors in OpenAI's shapes (platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


class ApiError(Exception):
    """A request that is refused; becomes the reply."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: of HTTP.
            message: one sentence for people.
            code: one word for programs.
            param: the field that is wrong.
            headers: of the reply, besides the usual ones.
        """
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the reply's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        """Return the reply's JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Replies:
    """The replies to one request, which share a name and a time."""

    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, text: str, finish_reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """Return the one reply to a request that is not streamed."""
        answer = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": answer} if self.is_chat else {"text": text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._frame(kind, [_choice(content, finish_reason)]), "usage": usage.body()}

    def opening(self) -> dict[str, Any] | None:
        """Return what a streamed chat begins with; a plain completion begins with its text."""
        if not self.is_chat:
            return None
        return self._part({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str) -> dict[str, Any]:
        """Return a part of a text."""
        return self._part({"delta": {"content": text}} if self.is_chat else {"text": text}, None)

    def closing(self, finish_reason: FinishReason) -> dict[str, Any]:
        """Return the end of a text."""
        return self._part({"delta": {}} if self.is_chat else {"text": ""}, finish_reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the tokens that a streamed request took, for those who asked."""
        return {**self._frame(self._part_kind, []), "usage": usage.body()}

    @property
    def _part_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _part(self, content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return self._frame(self._part_kind, [_choice(content, reason)])

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _choice(content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def describe_model(name: str, created: int) -> dict[str, Any]:
    """Return a model's entry in the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "mutirao"}


def event(content: Mapping[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {data}\n\n".encode()
