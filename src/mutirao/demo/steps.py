"""Steps that need not be done twice.

A step makes one artifact from settings and parents. Beside the run a small record keeps
what it was made from; as long as that has not changed and the artifact is whole, the step
counts as done. Whatever stops a run, the next one goes on from here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from mutirao.artifact import canonical_json, open_artifact, read_manifest, write_atomic
from mutirao.errors import ArtifactError


@dataclass(frozen=True)
class Step:
    """One artifact to be made."""

    path: Path
    """Where the artifact will stand."""
    make: Callable[[], None]
    """Makes it, atomically."""
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """What it depends on besides its parents."""
    parents: tuple[Path, ...] = ()
    """Artifacts that it is made from."""


def is_done(step: Step, records: Path) -> bool:
    """Say whether the artifact is there, whole, and made from what it would be made from now.

    Args:
        step: the step.
        records: the run's folder of step records.
    """
    try:
        record = json.loads(_record_path(step, records).read_bytes())
        manifest = open_artifact(step.path)
        return bool(record == {"key": _key(step), "artifact": manifest.sha256})
    except (OSError, ValueError, ArtifactError):
        return False


def do_step(step: Step, records: Path) -> None:
    """Make the artifact and keep the record of what it was made from."""
    key = _key(step)
    step.make()
    record = {"key": key, "artifact": read_manifest(step.path).sha256}
    write_atomic(_record_path(step, records), json.dumps(record))


def made_paths(records: Path) -> list[Path]:
    """Return where the artifacts of all recorded steps stand."""
    made = []
    for path in sorted(records.glob("*.json")):
        group, _, name = path.stem.partition("-")
        if name:
            made.append(records.parent / group / name)
    return made


def _key(step: Step) -> str:
    parents = [read_manifest(parent).sha256 for parent in step.parents]
    content = {"settings": dict(step.settings), "parents": parents}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _record_path(step: Step, records: Path) -> Path:
    return records / f"{'-'.join(step.path.relative_to(records.parent).parts)}.json"
