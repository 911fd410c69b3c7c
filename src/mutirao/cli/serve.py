"""``mutirao serve``: a model over HTTP, for OpenAI's clients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.run import Context, Draft, Memory, Source, Threads

if TYPE_CHECKING:
    from mutirao.inference.engine import Engine

SERVER_BYTES = 12_000_000
"""Memory of the server beside the engine's own: 6 MB of libraries and 3 MB while eight clients
ask at once (2026-11, starlette 1.3, uvicorn 0.49, Python 3.11), and something to spare."""


def serve(
    source: Source,
    memory: Memory = None,
    threads: Threads = None,
    context: Context = None,
    speculation: Draft = "auto",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8000,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines connect, unencrypted.")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--key-file", help="File with the API key; else MUTIRAO_API_KEY, or a new one."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; default: its own.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait in line.")
    ] = 8,
) -> None:
    """Serve a model over HTTP to OpenAI's clients; Ctrl-C ends it."""
    from mutirao.console import console
    from mutirao.serve.server import Server, find_key, listen

    api_key, is_new = find_key(key_file)
    listener = listen(host, port, allow_remote=allow_remote)
    model = name or _name(source)
    with listener, _open(source, memory, threads, context, speculation) as engine:
        server = Server(engine, listener, model=model, api_key=api_key, max_waiting=max_waiting)

        def tell() -> None:
            console.print(f"{model}: {engine.opened.plan}", style="dim", markup=False)
            if allow_remote:
                console.print("other machines can connect; nothing is encrypted", style="yellow")
            if is_new:
                console.print("API key, made for this run and not kept: ", end="")
                console.print(api_key, markup=False, soft_wrap=True)
            address = f"[{host}]" if ":" in host else host
            url = f"http://{address}:{listener.getsockname()[1]}/v1"
            console.print(f"serving at {url}; Ctrl-C ends it", markup=False, soft_wrap=True)

        server.run(on_start=tell)


def _open(
    source: str, memory: str | None, threads: int | None, context: int | None, speculation: str
) -> Engine:
    from mutirao.errors import InputError
    from mutirao.inference.engine import Engine
    from mutirao.inference.model_source import locate_model
    from mutirao.inference.sizes import parse_size

    if speculation not in ("auto", "on", "off"):
        raise InputError(f"--speculation {speculation} is not accepted (expected auto, on or off)")
    budget = None if memory is None else max(parse_size(memory) - SERVER_BYTES, 1)
    try:
        return Engine.open(
            locate_model(source),
            memory=budget,
            threads=threads,
            context=context,
            speculation=speculation,  # type: ignore[arg-type]
        )
    except InputError as error:
        if budget is None or type(error) is not InputError:
            raise
        raise InputError(
            f"{error} (the server itself takes {SERVER_BYTES / 1e6:.0f} MB of --memory besides)"
        ) from None


def _name(source: str) -> str:
    """Return what people call the model that a source names."""
    path = Path(source)
    text = path.resolve().name if path.exists() else source.rpartition("/")[2].partition("@")[0]
    return text.removesuffix(".gguf")
