"""Chat templates: Jinja, as Hugging Face models carry them, run in a sandbox.

A template comes with a model and is not to be trusted: it runs in Jinja's immutable sandbox,
without files or imports. It finds what transformers (utils/chat_template_utils.py) promises:
``messages``, ``add_generation_prompt``, ``tools``, ``documents``, the special tokens by name,
``raise_exception``, ``strftime_now``, ``tojson`` that leaves HTML alone, ``break`` and
``continue``, and ``generation`` blocks, which are passed through. Tools cannot be given yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mutirao.errors import FormatError, InputError


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template's text.
            special_tokens: names such as 'bos_token' and what they are; found by the template.

        Raises:
            FormatError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise FormatError(
                f"the model's chat template is broken: {error}; give the model a plain prompt"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return messages as the text that the model was trained on.

        Raises:
            InputError: the template does not take these messages, for example two turns of
                one speaker, or no user's turn.
        """
        context = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except Exception as error:  # whatever a model's own program may run into
            raise InputError(f"the model's chat template refuses these messages: {error}") from None


class _Generation(Extension):
    """``{% generation %}``, which marks answers for training: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape ``<``, ``>`` and ``&`` for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
