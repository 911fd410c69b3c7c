"""Repositories of the Hugging Face hub: their configuration, tokenizer and safetensors.

This is the only place that lifts HF_HUB_OFFLINE, and only for one call. Pickled weights and
code are never downloaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

from mutirao.artifact import canonical_json, sha256_of_file, write_atomic
from mutirao.environment import cache_directory
from mutirao.errors import SourceError, explain_disk_errors
from mutirao.sources.download import locked, unreachable
from mutirao.sources.forms import FetchedSource, HubSource

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*")
"""What is taken from a hub repository: weights as safetensors only, never pickles."""


def sha256_of_folder(folder: Path) -> str:
    """Return one sha256 for a folder: of its files' relative names and contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}
    return hashlib.sha256(canonical_json(names)).hexdigest()


def fetch_repository(source: HubSource, offline: bool) -> FetchedSource:
    """Bring a repository's snapshot into the cache; errors as ``fetch`` says."""
    cache = cache_directory() / "hub"
    # The hub's library cannot always tell a broken-off snapshot from a whole one.
    finished = cache / "finished" / quote(source.text, safe="")
    with explain_disk_errors(cache), locked(cache):
        if finished.is_file() and (known := Path(finished.read_text())).is_dir():
            return FetchedSource(known, sha256_of_folder(known), source.text)
        if offline:
            raise unreachable(source.text, "the network was not to be used")
        folder = _snapshot(source, cache)
        write_atomic(finished, str(folder))
    return FetchedSource(folder, sha256_of_folder(folder), source.text)


def fetch_config(source: HubSource) -> Path:
    """Bring a repository's config.json alone into the cache, some kilobytes, and return its path.

    Raises:
        SourceError: the repository names nothing, or has no config.json.
        NetworkError: it is not in the cache, and could not be downloaded.
    """
    cache = cache_directory() / "hub"
    with explain_disk_errors(cache), locked(cache):
        path = _snapshot(source, cache, ("config.json",)) / "config.json"
    if not path.is_file():
        raise SourceError(
            f"source {source.text} has no config.json (expected a repository with a model for "
            "transformers); download its GGUF file, and name that"
        )
    return path


def _snapshot(source: HubSource, cache: Path, patterns: tuple[str, ...] = HUB_FILES) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
        XetDownloadError,
    )

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False  # for this call only: a source that says hf: asks for it
    try:
        return Path(
            snapshot_download(
                source.repository,
                revision=source.revision,
                cache_dir=cache,
                allow_patterns=list(patterns),
            )
        )
    except (
        RepositoryNotFoundError,
        GatedRepoError,
        RevisionNotFoundError,
        HFValidationError,
    ) as error:
        raise SourceError(
            f"source {source.text} is not on the hub, or not open to you (set HF_TOKEN for "
            f"private and gated repositories): {str(error).splitlines()[0]}"
        ) from None
    except (
        HTTPError,
        XetDownloadError,
        RevisionResolutionError,
        LocalEntryNotFoundError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise unreachable(source.text, str(error).splitlines()[0]) from None
    finally:
        constants.HF_HUB_OFFLINE = was_offline
