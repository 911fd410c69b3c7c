"""A site leaves: what the run would be without it.

    replay_without    approximate, in seconds: the kept updates of all rounds are folded once
                      more, without the site's. But the others' updates were made from states
                      that the site had helped to make, so something of it may be left in them
    prepare_without   exact: a new run that goes on from the last state before the site's first
                      round, with the other sites alone; its rounds are trained anew by
                      ``run_rounds``. Nothing of the site's updates has ever touched it

Neither reaches what sites or others have kept of the old states. Not under secure aggregation:
no single update was seen, so only the exact way is there.
"""

from __future__ import annotations

import math
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutirao.artifact import write_atomic
from mutirao.errors import InputError, explain_disk_errors
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.aggregation.fold import Directions, combine
from mutirao.federated.aggregation.low_rank_rounds import LOW_RANK_RULES
from mutirao.federated.aggregation.updates import sum_products
from mutirao.federated.coordinator.adapter import START_FOLDER
from mutirao.federated.coordinator.journal import (
    COORDINATOR_NAME,
    CoordinatorJournal,
    RoundRecord,
)
from mutirao.federated.coordinator.next_state import write_next_state
from mutirao.federated.coordinator.rounds import IDENTITY_FOLDER, open_updates
from mutirao.federated.plan import Coordinator, FederatedConfig
from mutirao.federated.secure.terms import RUN_ID_BYTES


@dataclass(frozen=True)
class Replay:
    """A replayed run."""

    work: Path
    """Its folder, of the form of a coordinator's; ``write_result`` makes an adapter of it."""
    rounds_with_site: tuple[int, ...]
    """Rounds in which the site's update was left out."""
    distance: float
    """L2 norm of the difference of the last global states, with and without the site."""
    relative_distance: float
    """The same, relative to how far the real run has moved from the start; 0 where nothing has."""


def replay_without(coordinator: Coordinator, site: str, out: Path) -> Replay:
    """Fold all kept rounds once more without one site; approximate, see above.

    Args:
        coordinator: of the run.
        site: who leaves.
        out: new folder of the replayed states.

    Raises:
        InputError: the site took part in no round, was alone in one, or the run hides or cannot
            replay single updates; or the folder exists.
        ArtifactError: a state or an update is missing or damaged.
    """
    journal = CoordinatorJournal(coordinator.work)
    records = journal.records()
    config = coordinator.plan.federated
    if config.secure is not None or config.aggregation in LOW_RANK_RULES:
        what = "secure aggregation" if config.secure else f"aggregation={config.aggregation}"
        raise InputError(f"a run with {what} cannot be replayed; use prepare_without")
    _check_site(records, site)
    _check_new(out)
    target = CoordinatorJournal(out)
    _copy(coordinator.work, out, f"state/{0:03d}", START_FOLDER)
    for record in records:
        replayed = _replay_round(coordinator, journal, target, record, site)
        target.append(replayed, num_kept=config.num_states)
    distance, moved = _distances(journal, target, len(records))
    return Replay(
        work=out,
        rounds_with_site=tuple(record.round for record in records if site in record.sites),
        distance=distance,
        relative_distance=distance / moved if moved > 0 else 0.0,
    )


def _replay_round(
    coordinator: Coordinator,
    journal: CoordinatorJournal,
    target: CoordinatorJournal,
    record: RoundRecord,
    left_out: str,
) -> RoundRecord:
    config = coordinator.plan.federated
    sites = {name: each for name, each in record.sites.items() if name != left_out}
    if not sites:
        raise InputError(
            f"round {record.round} was made by site {left_out} alone, so nothing is left to "
            "replay; use prepare_without"
        )
    tokens = {name: float(each.num_tokens) for name, each in sites.items()}
    shapes = target.open_state(record.round - 1, "global").shapes
    updates = open_updates(journal, record.round, shapes, coordinator, tokens)
    directions = Directions(updates)
    mean = combine(updates, config.aggregation, num_faulty=config.num_faulty)
    state = write_next_state(target, record.round, config, mean, directions=directions)
    cosines = directions.cosines
    return record.model_copy(
        update={
            "sites": {
                name: each.model_copy(update={"cosine_to_mean": cosines[name]})
                for name, each in sites.items()
            },
            "global_sha256": state.global_sha256,
            "replica_sha256": state.replica_sha256,
        }
    )


def _distances(
    journal: CoordinatorJournal, target: CoordinatorJournal, number: int
) -> tuple[float, float]:
    """Return how far both runs' last states are apart, and how far the real one has moved."""
    start, real = journal.open_state(0, "global"), journal.open_state(number, "global")
    other = target.open_state(number, "global")
    apart = moved = 0.0
    for name in real.names:
        values = real.read(name).astype(np.float64)
        difference, way = values - other.read(name), values - start.read(name)
        apart += sum_products(difference, difference)
        moved += sum_products(way, way)
    return math.sqrt(apart), math.sqrt(moved)


def prepare_without(coordinator: Coordinator, site: str, out: Path) -> Coordinator:
    """Make a new run that goes on from before a site's first round, without it; exact.

    Args:
        coordinator: of the run.
        site: who leaves.
        out: new folder of the new run.

    Returns:
        The new coordinator, kept in its folder too; ``run_rounds`` trains what is missing, with
        turns from the beginning of a cycle. It has the old one's key, so sites need no new one.

    Raises:
        InputError: the site took part in no round, the others are too few for the plan, or the
            folder exists.
    """
    journal = CoordinatorJournal(coordinator.work)
    records = journal.records()
    first = _check_site(records, site)
    sites = {name: key for name, key in coordinator.sites.items() if name != site}
    if not sites:
        raise InputError(f"site {site} is the only one of the run; nobody is left to train")
    check_plan(coordinator.plan, len(sites))
    _check_new(out)
    kept = _last_whole(journal, coordinator.plan.federated, first)
    numbers = range(kept + 1)
    _copy(coordinator.work, out, START_FOLDER, IDENTITY_FOLDER)
    _copy(coordinator.work, out, *(f"state/{number:03d}" for number in numbers))
    _copy(coordinator.work, out, *(f"rounds/{number:03d}" for number in numbers))
    CoordinatorJournal(out).write_records(records[:kept])
    made = coordinator.model_copy(
        update={"sites": sites, "work": out, "run_id": secrets.token_hex(RUN_ID_BYTES)}
    )
    write_atomic(out / COORDINATOR_NAME, made.model_dump_json(indent=1))
    return made


def _last_whole(journal: CoordinatorJournal, config: FederatedConfig, first: int) -> int:
    """Return the last round before another from which a run can go on with other sites.

    It ends a cycle, since groups are cut anew and nobody shall have two turns in one; and the
    states that later changes lead from are there.
    """
    for number in range(first - 1, 0, -1):
        later = range(number + 1, number + 2 * config.turns)
        bases = {number, *(config.basis(each) for each in later)}
        if number % config.turns == 0 and all(
            journal.has_state(each) for each in bases if each <= number
        ):
            return number
    return 0


def _check_site(records: list[RoundRecord], site: str) -> int:
    """Return the first round that a site took part in."""
    first = next((record.round for record in records if site in record.sites), None)
    if first is None:
        known = sorted({name for record in records for name in record.sites})
        raise InputError(
            f"site {site!r} took part in no round (those who did: {', '.join(known) or 'nobody'})"
        )
    return first


def _check_new(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder")


def _copy(source: Path, target: Path, *names: str) -> None:
    """Copy what is there of some folders."""
    with explain_disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (source / name).is_dir():
                shutil.copytree(source / name, target / name, dirs_exist_ok=True)
