"""Artifacts: folders that say what they hold, where it came from, and whether it is whole.

Beside each artifact stands ``manifest.json``. It names every file with its size and sha256,
the resolved recipe, the seed, the code version, the measured numbers, and the parents by
hash; following parents gives a model's whole lineage. Artifacts are written in a folder
beside their target and renamed into place, so a killed process leaves nothing half-written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from mutirao import __version__
from mutirao.config import Config
from mutirao.errors import ArtifactError, explain_disk_errors

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


class FileEntry(Config):
    """One file of an artifact."""

    size_bytes: int
    """Size in bytes."""
    sha256: str
    """Hexadecimal sha256 of the content."""


class Parent(Config):
    """An artifact or a pinned file that this one was made from."""

    sha256: str
    """The parent's artifact hash, or the sha256 of a source file."""
    path: str | None = None
    """Where the parent stood, relative to this artifact's folder; None for a source."""
    source: str | None = None
    """The source text, where the parent came from outside."""


class Manifest(Config):
    """What an artifact is; see the module's docstring."""

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    kind: str
    """What the artifact is: 'model', 'adapter', 'data', 'evaluation', …"""
    created_at: str
    """UTC time of writing, ISO 8601; not part of the artifact's hash."""
    code_version: str = __version__
    """Version of Mutirão that wrote it."""
    seed: int | None = None
    """Random seed, where one was used."""
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    """The resolved configuration of the step that wrote it."""
    parents: dict[str, Parent] = Field(default_factory=dict)
    """What it was made from, by role."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """Every file, by path relative to the folder."""
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    """Measured numbers."""

    @property
    def sha256(self) -> str:
        """The artifact's hash: of all that is said here but times and measured numbers."""
        content = self.model_dump(mode="json", exclude={"created_at", "metrics"})
        return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def is_plain_name(name: str) -> bool:
    """Whether a relative name with '/' stays inside the folder it is joined to."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\0" not in name


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file beside its target, flush it to disk, and rename it into place.

    Raises:
        DiskFullError: no room; the target is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are readable by nobody else, whatever the user's umask says.
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with name.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


class ArtifactWriter:
    """The unfinished artifact inside ``write_artifact``: a folder, and what to say of it."""

    def __init__(self, path: Path, final_path: Path) -> None:
        self.path = path
        """Write the files here."""
        self.metrics: dict[str, JsonValue] = {}
        """Measured numbers, for the manifest."""
        self.parents: dict[str, Parent] = {}
        self._final_path = final_path

    def add_parent(self, role: str, artifact_path: Path) -> None:
        """Record another artifact, by hash, as what this one was made from."""
        manifest = read_manifest(artifact_path)
        relative = os.path.relpath(artifact_path, self._final_path)
        self.parents[role] = Parent(sha256=manifest.sha256, path=relative)

    def add_source(self, role: str, source: str, sha256: str) -> None:
        """Record a pinned source from outside as what this artifact was made from."""
        self.parents[role] = Parent(sha256=sha256, source=source)


@contextmanager
def write_artifact(
    path: Path,
    kind: str,
    *,
    recipe: Mapping[str, JsonValue] | None = None,
    seed: int | None = None,
) -> Iterator[ArtifactWriter]:
    """Write an artifact atomically: all of it appears at ``path``, or nothing does.

    Args:
        path: final folder; an older artifact there is replaced only on success.
        kind: what it is; see ``Manifest.kind``.
        recipe: resolved configuration of the step.
        seed: random seed, where one was used.

    Yields:
        A writer whose ``path`` is an empty folder to fill.

    Raises:
        DiskFullError: no room; ``path`` is as it was.
    """
    path = path.resolve()
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        )
        try:
            partial.chmod(0o755)
            writer = ArtifactWriter(partial, path)
            yield writer
            manifest = Manifest(
                kind=kind,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                seed=seed,
                recipe=dict(recipe or {}),
                parents=writer.parents,
                files=_list_files(partial),
                metrics=writer.metrics,
            )
            write_atomic(partial / MANIFEST_NAME, manifest.model_dump_json(indent=2))
            _replace_directory(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_manifest(path: Path) -> Manifest:
    """Read an artifact's manifest without checking its files.

    Raises:
        ArtifactError: no manifest, not readable, or of another schema version.
    """
    manifest_path = path / MANIFEST_NAME
    try:
        document = json.loads(manifest_path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is not a finished artifact: it has no {MANIFEST_NAME}; "
            "run the step that makes it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{manifest_path} cannot be read: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{manifest_path} has schema version {version!r} (this version of Mutirão reads "
            f"{SCHEMA_VERSION}); make the artifact again"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ArtifactError(f"{manifest_path} is damaged at {where!r}") from None


def open_artifact(path: Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest and check every file against it.

    Args:
        path: the artifact's folder.
        kind: the kind that is expected, or None for any.

    Raises:
        ArtifactError: a file is missing, truncated or altered, or the kind is another.
    """
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind!r} (expected {kind!r})")
    for name, entry in manifest.files.items():
        if not is_plain_name(name):
            raise ArtifactError(f"{path} is damaged: its manifest names a file {name[:80]!r}")
        file_path = path / name
        if not os.path.isfile(file_path):  # unlike Path's, False for a name that is too long
            raise ArtifactError(f"{path} is damaged: {name} is missing; make the artifact again")
        size_bytes = file_path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise ArtifactError(
                f"{path} is damaged: {name} has {size_bytes} bytes (its manifest says "
                f"{entry.size_bytes}); make the artifact again"
            )
        if sha256_of_file(file_path) != entry.sha256:
            raise ArtifactError(
                f"{path} was altered: {name} differs from its manifest; make the artifact again"
            )
    return manifest


def lineage(path: Path) -> list[tuple[int, str, Parent | None, Manifest | None]]:
    """Follow an artifact's parents to its sources, depth first.

    Returns:
        Rows of (depth, role, parent link, manifest); the first row is the artifact itself.
        The manifest is None for a source, and for a parent that is no longer there or is
        no longer the one that was used.
    """
    rows: list[tuple[int, str, Parent | None, Manifest | None]] = []

    def visit(folder: Path, depth: int, role: str, link: Parent | None) -> None:
        try:
            manifest = read_manifest(folder)
        except ArtifactError:
            manifest = None
        if manifest is not None and link is not None and manifest.sha256 != link.sha256:
            manifest = None
        rows.append((depth, role, link, manifest))
        if manifest is None:
            return
        for parent_role, parent in manifest.parents.items():
            if parent.path is None:
                rows.append((depth + 1, parent_role, parent, None))
            else:
                visit((folder / parent.path).resolve(), depth + 1, parent_role, parent)

    visit(path.resolve(), 0, path.name, None)
    return rows


def _list_files(folder: Path) -> dict[str, FileEntry]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): FileEntry(
            size_bytes=file.stat().st_size, sha256=sha256_of_file(file)
        )
        for file in files
        if file != folder / MANIFEST_NAME
    }


def _replace_directory(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; an older ``target`` is moved aside first, then removed."""
    if not target.exists():
        os.rename(source, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, aside / target.name)
    os.rename(source, target)
    shutil.rmtree(aside, ignore_errors=True)
