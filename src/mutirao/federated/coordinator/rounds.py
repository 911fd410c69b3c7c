"""The coordinator's run: round after round, from wherever the journal stands.

In each round the sites whose turn it is, which may be all, are asked for an update from the state
that they hold alike. Each update is checked when it arrives and kept as a file; when all are
there, or enough of them at the deadline, they are folded into the next state, and the round's
record makes it count. A killed coordinator begins a round where it stood: updates that are there
are not asked for again. The same updates give the same states, whenever and in whatever order
they came.

Refused by name, logged, and not counted: what is wrongly signed, of another run, round or
request, malformed, of other tensors, not finite, or too large. Which plans run at all is said
in ``aggregation.compatibility``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mutirao.errors import ArtifactError, InputError, MutiraoError, UpdateError
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.aggregation.fold import Directions, RoundUpdates, combine
from mutirao.federated.aggregation.low_rank_rounds import LOW_RANK_RULES, check_low_rank
from mutirao.federated.aggregation.updates import (
    ParcelFile,
    decoder,
    read_parcel,
    write_parcel,
)
from mutirao.federated.codec import Shapes
from mutirao.federated.coordinator.answers import Accepted, TrainStep
from mutirao.federated.coordinator.collect import Collector, StaleError, Step
from mutirao.federated.coordinator.events import Event, RoundFinished, RoundStarted
from mutirao.federated.coordinator.journal import (
    CoordinatorJournal,
    RoundRecord,
    hash_state,
)
from mutirao.federated.coordinator.next_low_rank import (
    trained_shapes,
    write_next_low_rank,
)
from mutirao.federated.coordinator.next_state import write_next_state
from mutirao.federated.coordinator.requests import Requests
from mutirao.federated.coordinator.secure_round import SecureRound, remove_messages
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import DoneAnswer, read_fields
from mutirao.federated.network import Network
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator

IDENTITY_FOLDER = "identity"


def run_rounds(
    coordinator: Coordinator,
    network: Network,
    *,
    on_event: Callable[[Event], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[RoundRecord]:
    """Run all rounds that the journal does not hold yet, and hand out the final state.

    Args:
        coordinator: what is agreed, with whom, and where it is kept.
        network: the sites.
        on_event: hears what happens; what it raises ends the run.
        clock: seconds that pass.

    Returns:
        The records of all rounds.

    Raises:
        InputError: the plan is not sound, there is no start, or another process runs it.
        FederationError: too few sites answered; finished rounds are kept.
        ArtifactError: the journal is damaged.
    """
    journal = CoordinatorJournal(coordinator.work)
    if _is_finished(journal, coordinator):
        return journal.records()
    with journal.locked():
        return _run_locked(coordinator, network, journal, on_event or _ignore, clock)


def _run_locked(
    coordinator: Coordinator,
    network: Network,
    journal: CoordinatorJournal,
    on_event: Callable[[Event], None],
    clock: Callable[[], float],
) -> list[RoundRecord]:
    journal.write_status("running")
    try:
        check_plan(coordinator.plan, len(coordinator.sites))
        check_low_rank(coordinator.plan.federated)
        _check_journal(journal)
        _Run(coordinator, network, journal, on_event, clock).run()
    except MutiraoError as error:
        journal.write_status("failed", str(error))
        raise
    except Exception as error:
        journal.write_status("failed", f"the coordinator stopped: {type(error).__name__}: {error}")
        raise
    journal.write_status("finished", round_number=coordinator.plan.federated.num_rounds)
    return journal.records()


def _ignore(event: Event) -> None:
    """Hear nothing."""


def _is_finished(journal: CoordinatorJournal, coordinator: Coordinator) -> bool:
    num_rounds = coordinator.plan.federated.num_rounds
    is_told = journal.read_status().get("state") == "finished"
    return is_told and len(journal.records()) >= num_rounds


def _check_journal(journal: CoordinatorJournal) -> None:
    """Refuse a journal without a start, or whose last state is not the recorded one."""
    if not journal.has_start():
        raise InputError(
            f"{journal.folder} has no start; write one with coordinator.adapter.write_start"
        )
    records = journal.records()
    if not records:
        return
    last = records[-1]
    for part, recorded in (("global", last.global_sha256), ("replica", last.replica_sha256)):
        if hash_state(journal.open_state(last.round, part)) != recorded:
            raise ArtifactError(
                f"the journal {journal.state_path(last.round, part)} is not the state that round "
                f"{last.round} recorded; restore it, or begin a new run in another folder"
            )


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        coordinator: Coordinator,
        network: Network,
        journal: CoordinatorJournal,
        on_event: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._coordinator = coordinator
        self._config = coordinator.plan.federated
        self._journal = journal
        self._tell = on_event
        self._clock = clock
        self._sites = tuple(sorted(coordinator.sites))
        self._collector = Collector(coordinator, network, journal, on_event=on_event, clock=clock)
        key = open_identity(coordinator.work / IDENTITY_FOLDER)
        self._requests = Requests(coordinator, journal, key)

    def run(self) -> None:
        self._collector.wait_for_sites(self._config.quorum or len(self._sites))
        first = len(self._journal.records()) + 1
        for number in range(first, self._config.num_rounds + 1):
            self._run_round(number)
        self._finish()

    def _run_round(self, number: int) -> None:
        started = self._clock()
        if self._config.secure is None:
            record = self._run_plain(number)
        else:
            record = SecureRound(self._requests, self._collector, number, on_event=self._tell).run()
        record = record.model_copy(
            update={
                "seconds": self._clock() - started,
                "missing": tuple(site for site in self._group(number) if site not in record.sites),
                "refused": tuple(sorted(self._journal.refused_sites(number) & {*self._sites})),
            }
        )
        self._journal.append(record, num_kept=self._config.num_states)
        remove_messages(self._journal, before=number + 1)
        self._tell(RoundFinished(record))

    def _run_plain(self, number: int) -> RoundRecord:
        shapes = trained_shapes(self._journal, number - 1, self._config)
        train = TrainStep(self._requests, number, shapes)
        kept = self._kept_updates(number, train)
        group = self._group(number)
        self._tell(RoundStarted(number, self._config.num_rounds, group, tuple(kept)))

        def accept(parcel: Parcel) -> None:
            train.check(parcel)
            write_parcel(self._journal.update_path(number, parcel.sender), parcel)

        least = self._config.quorum
        step = Step("train", number, group, train.ask, accept, least=least, kept=kept)
        settled = self._journal.read_cohort(number)
        if settled is not None and kept.keys() >= {*settled}:
            answered = settled
        else:
            answered = self._collector.collect(step, self._config.round_timeout_s)
            self._journal.write_cohort(number, answered)
        accepted = {site: train.accepted[site] for site in answered}
        return self._fold(number, shapes, accepted)

    def _fold(self, number: int, shapes: Shapes, accepted: dict[str, Accepted]) -> RoundRecord:
        weights = {site: float(each.answer.num_tokens) for site, each in accepted.items()}
        if self._config.aggregation in LOW_RANK_RULES:
            return self._fold_low_rank(number, accepted, weights)
        updates = open_updates(self._journal, number, shapes, self._coordinator, weights)
        directions = Directions(updates)
        mean = combine(updates, self._config.aggregation, num_faulty=self._config.num_faulty)
        state = write_next_state(self._journal, number, self._config, mean, directions=directions)
        norms, cosines = directions.norms, directions.cosines
        return RoundRecord(
            round=number,
            seconds=0.0,
            sites={
                site: each.record(norm=norms[site], cosine=cosines[site])
                for site, each in sorted(accepted.items())
            },
            global_sha256=state.global_sha256,
            replica_sha256=state.replica_sha256,
        )

    def _fold_low_rank(
        self, number: int, accepted: dict[str, Accepted], num_tokens: dict[str, float]
    ) -> RoundRecord:
        files = {site: ParcelFile(self._journal.update_path(number, site)) for site in accepted}
        is_equal = self._config.weighting == "equal"
        weights = dict.fromkeys(num_tokens, 1.0) if is_equal else num_tokens
        plan = self._coordinator.plan
        state = write_next_low_rank(self._journal, number, plan, files, weights)
        return RoundRecord(
            round=number,
            seconds=0.0,
            sites={site: each.record() for site, each in sorted(accepted.items())},
            global_sha256=state.global_sha256,
            replica_sha256=state.replica_sha256,
        )

    def _kept_updates(self, number: int, train: TrainStep) -> dict[str, str]:
        """Return the hashes of sound updates from before a restart; others are removed."""
        kept = {}
        for site in self._group(number):
            path = self._journal.update_path(number, site)
            if not path.exists():
                continue
            parcel = read_parcel(path)
            try:
                if parcel is None or not self._is_own(parcel, site, number):
                    raise UpdateError(f"the kept update {path} is damaged")
                train.check(parcel)
                kept[site] = parcel.sha256
            except UpdateError as error:
                self._journal.log_refusal(number, site, str(error))
                path.unlink()
        return kept

    def _group(self, number: int) -> tuple[str, ...]:
        return self._config.group(self._sites, number)

    def _is_own(self, parcel: Parcel, site: str, number: int) -> bool:
        is_named = (parcel.sender, parcel.run, parcel.round) == (
            site,
            self._coordinator.run_id,
            number,
        )
        return is_named and parcel.is_signed_by(self._coordinator.sites[site])

    def _finish(self) -> None:
        """Hand out the final state; a site that cannot be reached now goes without it."""
        number = self._config.num_rounds
        holders = self._requests.holders(number)

        def request(site: str, needs_whole: bool) -> Parcel:
            is_holder = site in holders and not needs_whole
            return self._requests.finish(number, "change" if is_holder else "whole")

        def accept(parcel: Parcel) -> None:
            answer = read_fields(DoneAnswer, parcel) if parcel.kind == "done" else None
            asked = {request(parcel.sender, whole).sha256 for whole in (False, True)}
            if answer is None or answer.request_sha256 not in asked:
                raise StaleError(f"site {parcel.sender} answered another request than the last")

        step = Step("finish", number, self._sites, request, accept, least=1)
        self._collector.collect(step, self._config.connect_timeout_s, is_needed=False)


def open_updates(
    journal: CoordinatorJournal,
    number: int,
    shapes: Shapes,
    coordinator: Coordinator,
    num_tokens: dict[str, float],
) -> RoundUpdates:
    """Return the kept updates of a round, ready to be folded.

    Args:
        journal: keeps them.
        number: of the round.
        shapes: of the trained tensors.
        coordinator: has the plan.
        num_tokens: training tokens of each site that counts, by name.

    Raises:
        ArtifactError: an update is missing or damaged.
    """
    config = coordinator.plan.federated
    files = {site: ParcelFile(journal.update_path(number, site)) for site in num_tokens}
    weights = num_tokens if config.weighting == "tokens" else dict.fromkeys(num_tokens, 1.0)
    decode = decoder(files, shapes, config.upload)
    return RoundUpdates(shapes, weights, decode, scratch=journal.round_folder(number))
