"""What a client asks for, read from OpenAI's fields.

Nothing is dropped in silence: a field that is not known is an error, and so is one that asks
for what cannot be done yet (tools, several answers, probabilities, formats). Fields that only
label a request, and values that ask for nothing, are accepted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mutirao.inference.conversation import Message
from mutirao.serve.reply import ApiError

MAX_STOPS = 4
MAX_STOP_LENGTH = 1000
"""In characters; a stop text is looked for at every piece."""
MAX_TEMPERATURE = 2.0
DEFAULT_COMPLETION_TOKENS = 16
"""The first four are OpenAI's."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_OURS = frozenset(
    {
        "model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens",
    }
)  # fmt: skip


@dataclass(frozen=True)
class TextRequest:
    """A request for a text."""

    model: str
    prompt: str | list[Message]
    max_new_tokens: int | None
    """At most so many; None: as many as the context has room for."""
    temperature: float
    top_p: float
    seed: int | None
    """None: another one each time."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """End a stream with the tokens it took."""

    @property
    def is_chat(self) -> bool:
        """Say whether the prompt is messages."""
        return not isinstance(self.prompt, str)


def read_chat(body: bytes) -> TextRequest:
    """Read the body of a request to /v1/chat/completions.

    Raises:
        ApiError: it is no JSON, a field is missing, unknown, or out of range.
    """
    fields = _Fields(body, _OURS | {"messages", "max_completion_tokens"})
    asked = fields.integer("max_completion_tokens", None, 1)
    limit = fields.integer("max_tokens", asked, 1)
    if asked is not None and limit != asked:
        fields.refuse("max_tokens", "is another than max_completion_tokens (give one of them)")
    return _request(fields, _messages(fields), limit)


def read_completion(body: bytes) -> TextRequest:
    """Read the body of a request to /v1/completions.

    Raises:
        ApiError: it is no JSON, a field is missing, unknown, or out of range.
    """
    fields = _Fields(body, _OURS | {"prompt"})
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        fields.refuse("prompt", "is not accepted (expected one text; neither several nor tokens)")
    return _request(fields, prompt, fields.integer("max_tokens", DEFAULT_COMPLETION_TOKENS, 1))


def _request(fields: _Fields, prompt: str | list[Message], limit: int | None) -> TextRequest:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        fields.refuse("model", "is missing (expected the name of a model; see /v1/models)")
    options = fields.get("stream_options")
    if options is not None and not (
        isinstance(options, dict)
        and set(options) <= {"include_usage"}
        and isinstance(options.get("include_usage", False), bool)
    ):
        fields.refuse("stream_options", 'is not accepted (expected {"include_usage": true})')
    return TextRequest(
        model=model,
        prompt=prompt,
        max_new_tokens=limit,
        temperature=fields.number("temperature", 1.0, 0.0, MAX_TEMPERATURE),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above=True),
        seed=fields.integer("seed", None, -(2**63)),
        stop=_stops(fields),
        stream=fields.flag("stream"),
        include_usage=bool(options and options.get("include_usage")),
    )


class _Fields:
    """A request's JSON object, of which nothing is left unread."""

    def __init__(self, body: bytes, known: frozenset[str]) -> None:
        try:
            content = json.loads(body.decode(), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request is no JSON: {error}", code="invalid_json") from None
        if not isinstance(content, dict):
            raise ApiError(400, "the request is not a JSON object", code="invalid_json")
        self._content = content
        for name, value in content.items():
            if name in known or name in _LABELS or value is None:
                continue
            if name not in _NEUTRAL:
                self.refuse(name, "is not known", code="unknown_parameter")
            if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
                self.refuse(
                    name, f"= {_shown(value)} is not supported", code="unsupported_parameter"
                )

    def get(self, name: str) -> Any:
        return self._content.get(name)

    def refuse(self, name: str, reason: str, *, code: str = "invalid_value") -> NoReturn:
        raise ApiError(400, f"{_shown(name, quoted=False)} {reason}", code=code, param=name[:100])

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, f"= {_shown(value)} is not accepted (expected true or false)")
        return bool(value)

    def integer(self, name: str, default: int | None, least: int) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            expected = "a whole number" + (f" >= {least}" if least >= 0 else "")
            self.refuse(name, f"= {_shown(value)} is not accepted (expected {expected})")
        return value

    def number(
        self, name: str, default: float, least: float, most: float, *, above: bool = False
    ) -> float:
        value = self.get(name)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (above and value == least):
            bounds = f"above {least:g}, to {most:g}" if above else f"{least:g} to {most:g}"
            self.refuse(name, f"= {_shown(value)} is not accepted (expected {bounds})")
        return float(value)


def _messages(fields: _Fields) -> list[Message]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        fields.refuse("messages", "is not accepted (expected a list of at least one message)")
    return [_message(fields, index, message) for index, message in enumerate(messages)]


def _message(fields: _Fields, index: int, message: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        fields.refuse(where, 'is not accepted (expected {"role": …, "content": …})')
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        fields.refuse(
            f"{where}.role",
            f"= {_shown(role)} is not supported (expected {', '.join(sorted(_ROLES))})",
        )
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            fields.refuse(f"{where}.{name}", "is not supported", code="unsupported_parameter")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(fields, where, part) for part in content)
    if not isinstance(content, str):
        fields.refuse(f"{where}.content", "is not accepted (expected text)")
    return {"role": _ROLES[role], "content": content}


def _part(fields: _Fields, where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        fields.refuse(f"{where}.content", "has a part that is no text, which is not supported")
    return text


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)
    ):
        fields.refuse(
            "stop",
            f"is not accepted (expected up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} "
            "characters)",
        )
    return tuple(stops)


def _same(value: Any, other: Any) -> bool:
    """Compare as JSON does: true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return bool(value == other)


def _shown(value: Any, *, quoted: bool = True) -> str:
    """Return a value for a message, cut, without control characters."""
    text = json.dumps(value) if quoted else str(value)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 100 else text[:97] + "..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
