"""Reads a coordinator's work folder into a summary: rounds, refusals, plan, sizes.

The rounds come from the coordinator's own journal, which checks them. The plan and the sites'
keys come from ``coordinator.json``, which whoever started the run leaves in the folder, the
number of trained values from the header of a kept state. What is not there is noted.

Beside the bytes stands what synchronous data parallel training would have moved: in each
optimizer step each site sends the gradient of every trained value and receives their mean, both
in bfloat16, so 2 bytes a value each way. What a ring or a tree of machines adds to that is left
out, on the other side what a transport adds, and answers that were refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutirao.config import load_json
from mutirao.errors import InputError
from mutirao.federated.coordinator.journal import (
    COORDINATOR_NAME,
    CoordinatorJournal,
    RoundRecord,
    SiteRound,
)
from mutirao.federated.plan import Coordinator, Plan
from mutirao.report.federation.measures import Measures, read_measures
from mutirao.report.summary import to_plain

BYTES_PER_VALUE = 2
"""Of bfloat16."""


@dataclass(frozen=True)
class Traffic:
    """What one site moved in the rounds that its updates are in."""

    bytes_sent: int
    """From the site."""
    bytes_received: int
    """To the site."""
    num_steps: int
    """Optimizer steps."""
    synchronous_bytes: int | None
    """What synchronous training would have moved, both ways; None where sizes are unknown."""

    @property
    def num_bytes(self) -> int:
        """Both ways."""
        return self.bytes_sent + self.bytes_received

    @property
    def saving(self) -> float | None:
        """How many times fewer bytes moved than in synchronous training."""
        if not self.synchronous_bytes or not self.num_bytes:
            return None
        return self.synchronous_bytes / self.num_bytes


@dataclass(frozen=True)
class RefusalLine:
    """Something that was refused, and why."""

    time: str
    """UTC by the coordinator's clock."""
    round: int
    site: str
    """In whose name it came."""
    sentence: str


@dataclass(frozen=True)
class FederationSummary:
    """Everything that is known of a federation."""

    work: str
    state: str
    """'running', 'finished', 'failed', or 'unknown'."""
    message: str
    """Why it failed."""
    sites: tuple[str, ...]
    """All that were to take part, as far as that is known."""
    rounds: tuple[RoundRecord, ...]
    refusals: tuple[RefusalLine, ...]
    coordinator: Coordinator | None
    num_values: int | None
    """Trained values."""
    num_tensors: int | None
    """Tensors that they are in."""
    measures: Measures | None
    missing: tuple[str, ...]
    """What the folder does not have, each in a few words."""

    @property
    def plan(self) -> Plan | None:
        """What was agreed."""
        return self.coordinator.plan if self.coordinator else None

    @property
    def num_rounds(self) -> int:
        """Rounds that were agreed, or at least those that are done."""
        return self.plan.federated.num_rounds if self.plan else len(self.rounds)

    def rows(self, site: str) -> list[tuple[RoundRecord, SiteRound]]:
        """Return the rounds that a site's update is in."""
        return [(each, each.sites[site]) for each in self.rounds if site in each.sites]

    def traffic(self, site: str) -> Traffic:
        """Return what a site moved."""
        return self._add_up(row for _, row in self.rows(site))

    @property
    def total_traffic(self) -> Traffic:
        """All sites and rounds together."""
        return self._add_up(row for each in self.rounds for row in each.sites.values())

    @property
    def first_bytes(self) -> int:
        """Bytes to all sites in the first round, which brings the start whole."""
        return sum(row.bytes_received for each in self.rounds[:1] for row in each.sites.values())

    def epsilon(self, site: str) -> float | None:
        """Return what a site has spent, None without differential privacy."""
        spent = [row.epsilon for _, row in self.rows(site) if row.epsilon is not None]
        return spent[-1] if spent else None

    def mean_cosine(self, site: str) -> float | None:
        """Return the mean cosine of a site's updates to the rounds' means."""
        known = [
            row.cosine_to_mean
            for _, row in self.rows(site)
            if row.cosine_to_mean is not None and math.isfinite(row.cosine_to_mean)
        ]
        return math.fsum(known) / len(known) if known else None

    def to_json(self) -> str:
        """Return everything as one JSON object; a number that is not finite becomes null."""
        whole = to_plain({**asdict(self), "plan_sha256": self.plan.sha256 if self.plan else None})
        whole["traffic"] = {site: asdict(self.traffic(site)) for site in self.sites}
        return json.dumps(whole, indent=2, ensure_ascii=False, default=str)

    def _add_up(self, rows: Iterable[SiteRound]) -> Traffic:
        listed = list(rows)
        steps = sum(row.num_steps for row in listed)
        values = self.num_values
        return Traffic(
            bytes_sent=sum(row.bytes_sent for row in listed),
            bytes_received=sum(row.bytes_received for row in listed),
            num_steps=steps,
            synchronous_bytes=None if values is None else 2 * BYTES_PER_VALUE * values * steps,
        )


def is_federation(folder: Path) -> bool:
    """Whether a folder is a coordinator's work folder."""
    return any((folder / name).is_file() for name in ("status.json", COORDINATOR_NAME))


def read_federation(work: Path) -> FederationSummary:
    """Read a coordinator's work folder, at any time of the run.

    Raises:
        InputError: it is no such folder.
        ArtifactError: a file of it is damaged.
        RecipeError: ``coordinator.json`` is damaged, or of another version.
    """
    if not is_federation(work):
        raise InputError(
            f"{work} is not a coordinator's folder: it has neither status.json nor "
            f"{COORDINATOR_NAME}; name the folder that the coordinator works in"
        )
    journal = CoordinatorJournal(work)
    records = tuple(journal.records())
    path = work / COORDINATOR_NAME
    coordinator = load_json(Coordinator, path) if path.exists() else None
    num_values, num_tensors = _sizes(journal)
    measures = read_measures(work)
    status = journal.read_status()
    names = {*(coordinator.sites if coordinator else ())}
    names.update(site for each in records for site in (*each.sites, *each.missing))
    checks = [
        (bool(status), "where the run stands (status.json)"),
        (bool(records), "finished rounds (rounds.json)"),
        (coordinator is not None, f"the plan and the sites' keys ({COORDINATOR_NAME})"),
        (num_values is not None, "a state, which tells how much is trained (state)"),
        (measures is not None, "who brings what (measures.json)"),
    ]
    return FederationSummary(
        work=str(work),
        state=str(status.get("state", "unknown")),
        message=str(status.get("message", "")),
        sites=tuple(sorted(names)),
        rounds=records,
        refusals=tuple(_refusal(row) for row in journal.refusals()),
        coordinator=coordinator,
        num_values=num_values,
        num_tensors=num_tensors,
        measures=measures,
        missing=tuple(what for is_there, what in checks if not is_there),
    )


def _sizes(journal: CoordinatorJournal) -> tuple[int | None, int | None]:
    """Return trained values and tensors, from the first state that is kept."""
    for path in sorted(journal.folder.glob("state/*/global.safetensors")):
        if path.parent.name.isdecimal():
            shapes = journal.open_state(int(path.parent.name), "global").shapes
            return sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    return None, None


def _refusal(row: dict[str, Any]) -> RefusalLine:
    number = row.get("round")
    return RefusalLine(
        time=str(row.get("time", "")),
        round=number if isinstance(number, int) else 0,
        site=str(row.get("site", "")),
        sentence=str(row.get("sentence", "")),
    )
