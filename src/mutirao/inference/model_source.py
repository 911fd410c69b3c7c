"""From a source to a model that is ready to write.

The engine runs what it knows, from a GGUF file or a Hugging Face directory as it lies. What it
does not know goes through transformers, which is told; a GGUF is dequantized for it once, into
the cache, under the hash of its content.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from mutirao.artifact import open_artifact, sha256_of_file, write_artifact
from mutirao.console import console
from mutirao.environment import cache_directory
from mutirao.errors import ArtifactError, FormatError, MissingKernelError, SourceError
from mutirao.inference.conversation import Generator
from mutirao.sources import GGUFSource, PathSource, fetch, parse_source

if TYPE_CHECKING:
    from mutirao.inference.engine import Speculation


def locate_model(text: str) -> Path:
    """Return the file or folder of the model that a source names, fetched if need be.

    A path is not read through here: what opens it checks it.

    Args:
        text: a path, ``hf:``, ``gguf:`` or ``pypi:`` source.

    Raises:
        SourceError: the source is malformed or names nothing.
        NetworkError: it is not in the cache and could not be downloaded.
        ArtifactError: it is an artifact of ours and was altered.
    """
    source = parse_source(text)
    if isinstance(source, PathSource | GGUFSource) and source.path.is_file():
        return source.path.resolve()
    if isinstance(source, PathSource) and source.path.is_dir():
        path = source.path.resolve()
    else:
        path = fetch(source).path
    if path.is_dir() and (path / "manifest.json").exists():
        open_artifact(path)
    return path


def open_model(
    text: str,
    *,
    memory: int | None = None,
    threads: int | None = None,
    context: int | None = None,
    speculation: Speculation = "auto",
) -> Generator:
    """Open a model from any source, with the engine where it can be.

    Args:
        text: a path, ``hf:``, ``gguf:`` or ``pypi:`` source.
        memory: peak of the whole process, in bytes; None: as much as the model takes.
        threads: to compute with; None: all cores.
        context: most tokens of prompt and answer; None: see ``Engine.open``.
        speculation: see ``Engine.open``.

    Raises:
        SourceError: the source is malformed or names nothing.
        FormatError: what it names is no model, is damaged, or, with a limit of memory, is of a
            kind that the engine does not run.
        InputError: the memory is too small.
    """
    from mutirao.inference.engine import Engine

    path = locate_model(text)
    try:
        return Engine.open(
            path, memory=memory, threads=threads, context=context, speculation=speculation
        )
    except (FormatError, MissingKernelError) as error:
        if memory is not None:
            raise
        reason = error
    model = _as_directory(path, text)
    from mutirao.inference.generate import TextGenerator

    generator = TextGenerator.open(model)
    console.print(f"through transformers, with the whole model in memory: {reason}", style="dim")
    return generator


def _as_directory(path: Path, text: str) -> Path:
    """Return a folder that transformers reads; a GGUF is dequantized into the cache."""
    from mutirao.formats.gguf import check_gguf, convert_gguf
    from mutirao.formats.huggingface import check_model_directory

    if path.is_dir():
        check_model_directory(path)
        return path
    if not path.exists():
        raise SourceError(f"source {text} does not exist (expected a model)")
    summary = check_gguf(path)
    sha256 = sha256_of_file(path)
    converted = cache_directory() / "converted" / sha256
    try:
        open_artifact(converted, "model")
    except ArtifactError:
        console.print(f"dequantizing {path.name} once, into the cache", style="dim")
        recipe: dict[str, JsonValue] = {
            "source": text,
            "source_quantization": summary.main_type,
        }
        with write_artifact(converted, "model", recipe=recipe) as writer:
            writer.add_source("source", text, sha256)
            convert_gguf(path, writer.path)
    return converted
