"""Who brings what: ``measures.json`` of a coordinator's folder, where that was measured.

``federated.coordinator.measures`` writes it after the last round: losses by what was measured
('global', 'without X', 'alone X') and by whose text it was. Here they become two matrices. The
reader is forgiving, as the file may come from another version: what it does not know it passes
over, and so each loss that is no finite number, which a note tells.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from mutirao.errors import ArtifactError
from mutirao.federated.coordinator.measures import GLOBAL, MEASURES_NAME

ALONE, WITHOUT = "alone ", "without "
"""How labels begin, before a site's name."""

Matrix = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measures:
    """Two matrices, by row and column; either may be empty."""

    round: int | None = None
    """The round after which it was measured."""
    cross_site: Matrix = field(default_factory=dict)
    """Loss of the global model, or of what a site's last update alone leads to (row), on a
    site's held-out text (column), nats per token."""
    leave_one_out: Matrix = field(default_factory=dict)
    """Loss that a site's text (column) has more where a site (row) is left out of the last
    round, nats per token; above zero, its update helped."""
    contributions: dict[str, float] = field(default_factory=dict)
    """The same over all held-out text, by site."""
    num_dropped: int = 0
    """Losses that were no finite numbers."""

    @property
    def columns(self) -> list[str]:
        """Sites whose text was measured on."""
        rows = (*self.cross_site.values(), *self.leave_one_out.values())
        return sorted({site for row in rows for site in row})


def read_measures(work: Path) -> Measures | None:
    """Read the measures of a coordinator's folder; None where there are none.

    Raises:
        ArtifactError: the file is not a JSON object.
    """
    path = work / MEASURES_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} is damaged; measure again, or remove it")
    losses, dropped = _read_losses(document.get("losses"))
    whole = losses.get(GLOBAL, {})
    alone = {label: row for label, row in losses.items() if label.startswith(ALONE)}
    told = document.get("contributions")
    number = document.get("round")
    return Measures(
        round=number if isinstance(number, int) else None,
        cross_site={
            **({GLOBAL: whole} if whole else {}),
            **{label.removeprefix(ALONE): row for label, row in alone.items()},
        },
        leave_one_out={
            label.removeprefix(WITHOUT): {
                site: loss - whole[site] for site, loss in row.items() if site in whole
            }
            for label, row in losses.items()
            if label.startswith(WITHOUT)
        },
        contributions={
            site: float(value)
            for site, value in (told if isinstance(told, dict) else {}).items()
            if _is_number(value)
        },
        num_dropped=dropped,
    )


def _read_losses(rows: Any) -> tuple[Matrix, int]:
    """Return the finite losses by what was measured and where, and how many others there are."""
    matrix: Matrix = {}
    dropped = 0
    for label, row in sorted(rows.items()) if isinstance(rows, dict) else ():
        answers = row if isinstance(row, dict) else {}
        values = {
            site: each.get("loss") if isinstance(each, dict) else None
            for site, each in sorted(answers.items())
        }
        kept = {site: float(value) for site, value in values.items() if _is_number(value)}
        dropped += len(values) - len(kept)
        if kept:
            matrix[label] = kept
    return matrix, dropped


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
