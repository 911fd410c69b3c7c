"""An artifact's ancestors as rows of a tree, each told in full once.

``artifact.lineage`` follows every parent, so what many artifacts were made from (the base
model, a silo's data) comes again and again; here a second mention is only a pointer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mutirao.artifact import lineage

State = Literal["artifact", "source", "repeated", "lost"]


@dataclass(frozen=True)
class Ancestor:
    """One row of the tree."""

    depth: int
    """0 for the artifact itself."""
    role: str
    """What it was to its child."""
    kind: str
    """'model', 'adapter', 'data', …, or 'source'."""
    sha256: str
    state: State
    """'lost': no longer there, or no longer the one that was used."""
    source: str = ""
    """The source text, for a source."""
    code_version: str = ""


def trace(path: Path | None) -> tuple[Ancestor, ...]:
    """Return an artifact and its ancestors, depth first; empty for None."""
    if path is None:
        return ()
    rows: list[Ancestor] = []
    seen: set[str] = set()
    skipped_below: int | None = None
    for depth, role, link, manifest in lineage(path):
        if skipped_below is not None and depth > skipped_below:
            continue
        skipped_below = None
        if manifest is not None:
            sha256, kind, version = manifest.sha256, manifest.kind, manifest.code_version
            state: State = "repeated" if sha256 in seen else "artifact"
            if state == "repeated":
                skipped_below = depth
            seen.add(sha256)
            rows.append(Ancestor(depth, role, kind, sha256, state, code_version=version))
        elif link is not None:
            is_source = link.path is None
            rows.append(
                Ancestor(
                    depth,
                    role,
                    "source" if is_source else "artifact",
                    link.sha256,
                    "source" if is_source else "lost",
                    source=link.source or "",
                )
            )
    return tuple(rows)
