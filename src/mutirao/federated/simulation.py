"""A federation in one process: all sites in turns, with the parcels that would travel.

Nothing is faked but the way: sites sign, encode, mask and journal as they would alone, and the
coordinator checks and folds as it would over a network. Hundreds of sites work one after
another, so memory holds one model however many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from mutirao.errors import InputError, MutiraoError
from mutirao.federated.coordinator.events import Event
from mutirao.federated.coordinator.journal import RoundRecord, keep_coordinator
from mutirao.federated.coordinator.rounds import IDENTITY_FOLDER, run_rounds
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.network import Lost
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator, Plan, Site

Worker = Callable[[Parcel], Parcel]
"""A site: answers a request."""


class SimulatedNetwork:
    """Sites in this process; each works when its answer is waited for."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = dict(workers)
        self._queue: dict[str, Parcel] = {}

    def reachable(self) -> set[str]:
        """Return the names of all sites."""
        return set(self._workers)

    def send(self, site: str, request: Parcel) -> None:
        """Put a request at the end of the queue, in place of an earlier one to the same site."""
        self._queue.pop(site, None)
        self._queue[site] = request

    def receive(self, timeout_s: float) -> Parcel | Lost | None:
        """Let the next site work, however long that takes, and return what it answers."""
        if not self._queue:
            time.sleep(timeout_s)
            return None
        site = next(iter(self._queue))
        request = self._queue.pop(site)
        try:
            return self._workers[site](request)
        except MutiraoError as error:
            return Lost(site, str(error))


def simulate(
    plan: Plan,
    sites: Sequence[Site],
    work: Path,
    on_event: Callable[[Event], None] | None = None,
) -> list[RoundRecord]:
    """Run a federation on this machine, or go on with it.

    Args:
        plan: what is agreed.
        sites: all sites; keys are made in their folders, and they trust each other's.
        work: the coordinator's folder, which has the start.
        on_event: hears what happens.

    Returns:
        The records of all rounds.

    Raises:
        InputError: the folder belongs to another plan or other sites, or has no start.
        FederationError: a site failed; finished rounds are kept.
    """
    coordinator = open_coordinator(plan, sites, work)
    network = SimulatedNetwork(site_workers(sites, coordinator))
    return run_rounds(coordinator, network, on_event=on_event)


def site_workers(sites: Sequence[Site], coordinator: Coordinator) -> dict[str, Worker]:
    """Return what answers for each site; they share one model."""
    from mutirao.federated.site.models import ModelCache
    from mutirao.federated.site.worker import SiteWorker

    models = ModelCache()

    def answer(site: Site, request: Parcel) -> Parcel:
        # Made for each request: what it needs of earlier ones is in its journal.
        return SiteWorker(site, public_models=models).answer(request)

    return {site.name: partial(answer, introduce(site, coordinator)) for site in sites}


def open_coordinator(plan: Plan, sites: Sequence[Site], work: Path) -> Coordinator:
    """Return the coordinator of a run with these sites, made and kept on first use.

    Raises:
        InputError: the folder belongs to another plan or other sites.
    """
    keys = {site.name: public_hex(open_identity(site.work / "identity")) for site in sites}
    if len(keys) != len(sites):
        raise InputError("two sites have the same name; give each its own")
    return keep_coordinator(plan, keys, work)


def introduce(site: Site, coordinator: Coordinator) -> Site:
    """Return a site that takes requests of this coordinator alone and knows all the others."""
    key = public_hex(open_identity(coordinator.work / IDENTITY_FOLDER))
    return site.model_copy(
        update={
            "coordinator_key": site.coordinator_key or key,
            "identities": site.identities or dict(coordinator.sites),
        }
    )
