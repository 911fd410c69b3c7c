"""Who brings what: ``measures.json`` of a coordinator's folder, where that was measured.

    {"cross_site": {label: {site: loss}}, "leave_one_out": {site: {site: loss difference}}}

A label is a site's name or 'global'. A difference is the loss without the first site's updates
minus the loss with them, on the second site's held-out text: above zero, they helped. Whatever
else stands in the file is passed over, and so is each value that is no finite number, which a
note tells.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutirao.errors import ArtifactError

MEASURES_NAME = "measures.json"
GLOBAL = "global"
"""Label of the model that all trained together."""

Matrix = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measures:
    """Two matrices, by row and column; either may be empty."""

    cross_site: Matrix = field(default_factory=dict)
    """Loss of a model (row) on a site's held-out text (column), nats per token."""
    leave_one_out: Matrix = field(default_factory=dict)
    """Loss that a site's text (column) has more without a site (row), nats per token."""
    num_dropped: int = 0
    """Values that were no finite numbers."""

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
    cross_site, dropped = _read_matrix(document.get("cross_site"))
    leave_one_out, more = _read_matrix(document.get("leave_one_out"))
    return Measures(cross_site, leave_one_out, dropped + more)


def _read_matrix(rows: Any) -> tuple[Matrix, int]:
    """Return what of a value is a matrix of finite numbers, and how many others it holds."""
    matrix: Matrix = {}
    dropped = 0
    for label, row in sorted(rows.items()) if isinstance(rows, dict) else ():
        if not isinstance(row, dict):
            dropped += 1
            continue
        kept = {site: float(value) for site, value in row.items() if _is_number(value)}
        dropped += len(row) - len(kept)
        if kept:
            matrix[label] = kept
    return matrix, dropped


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
