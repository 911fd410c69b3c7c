"""``mutirao run`` and ``mutirao chat``: a model, asked once or in turns.

Through transformers for now, with the whole model in memory; the engine that runs a model
larger than memory is not here yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from mutirao.inference.generate import TextGenerator

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
    messages = [{"role": "user", "content": prompt}]
    if json:
        result = generator.generate(
            messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        output.print_json(result.to_json())
        return
    _stream(generator, messages, max_new_tokens, temperature, seed)


def chat(
    source: Source,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it."""
    from mutirao.console import console

    generator = _open(source)
    console.print("An empty line or Ctrl-D ends the conversation.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = console.input("[bold]you:[/] ").strip()
        except EOFError:
            break
        if not question:
            break
        messages.append({"role": "user", "content": question})
        answer = _stream(generator, messages, max_new_tokens, temperature, seed)
        messages.append({"role": "assistant", "content": answer})


def _open(source: str) -> TextGenerator:
    """Open a model from any source; a GGUF is dequantized into the cache the first time."""
    from mutirao.console import console
    from mutirao.inference.generate import TextGenerator
    from mutirao.inference.model_source import resolve_model

    with console.status("opening the model"):
        return TextGenerator.open(resolve_model(source))


def _stream(
    generator: TextGenerator,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    pieces: list[str] = []
    for piece in generator.stream(
        messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    ):
        pieces.append(piece)
        typer.echo(piece, nl=False)
    typer.echo()
    return "".join(pieces)
