"""One step of a round: ask the sites, take one answer at a time, decide when to go on.

A site that is lost is asked again, with the same bytes, when it can be reached. Only what a
site has signed in answer to this very request can put it out of the round; anything else that
comes in its name may be somebody else's, is refused and logged, and the site is asked again a
few times. Nothing that arrives is kept but by the step's own ``accept``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.coordinator.events import (
    AnswerArrived,
    Event,
    SiteAsked,
    SiteLost,
    SiteRefused,
    StepStarted,
)
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.messages import Refusal, printable, read_fields
from mutirao.federated.network import Lost, Network
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator

POLL_S = 0.5
"""Longest wait for one answer, after which it is looked who can be reached again."""
RETRY_S = 5.0
"""A lost site is not asked again before; assumption: a process needs so long to start."""
MAX_FALSE_ANSWERS = 3
"""So many answers in a site's name that are not to the request, and it is not asked again."""


class StaleError(UpdateError):
    """An answer belongs to another request; says nothing against who is named as its sender."""


@dataclass(frozen=True)
class Step:
    """What is asked of which sites, and what makes it enough."""

    name: str
    """What is asked, for people."""
    round: int
    """The round."""
    sites: tuple[str, ...]
    """Who is asked, sorted."""
    ask: Callable[[str, bool], Parcel]
    """Gives a site's request; the flag says that it needs the whole state."""
    accept: Callable[[Parcel], None]
    """Checks and keeps a signed answer; raises StaleError if it is to another request, another
    FederationError if it is refused."""
    least: int = 0
    """Fewest answers to go on with at the deadline; 0 for all."""
    waits_for_lost: bool = True
    """Whether to wait to the deadline for sites that are lost, though enough have answered."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Answers from before a restart: hash by site."""


@dataclass
class _Progress:
    """How far a step has come."""

    deadline: float
    answered: dict[str, str]
    asked: dict[str, str] = field(default_factory=dict)
    """Hash of the request that each waiting site has."""
    out: dict[str, str] = field(default_factory=dict)
    """Sites that will not answer any more, and why."""
    retry_at: dict[str, float] = field(default_factory=dict)
    needs_whole: set[str] = field(default_factory=set)
    num_false: dict[str, int] = field(default_factory=dict)


class Collector:
    """Asks and collects, for all steps of a run."""

    def __init__(
        self,
        coordinator: Coordinator,
        network: Network,
        journal: CoordinatorJournal,
        *,
        on_event: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._network = network
        self._journal = journal
        self._tell = on_event
        self._clock = clock
        self._told: tuple[int, str, tuple[str, ...]] | None = None

    def wait_for_sites(self, least: int) -> None:
        """Wait until enough sites can be reached.

        Raises:
            FederationError: too few can within ``connect_timeout_s``.
        """
        names = set(self._coordinator.sites)
        timeout_s = self._coordinator.plan.federated.connect_timeout_s
        deadline = self._clock() + timeout_s
        while len(there := names & self._network.reachable()) < least:
            if self._clock() >= deadline:
                raise FederationError(
                    f"{len(there)} of {len(names)} sites connected within {timeout_s:.0f} s (at "
                    f"least {least} are needed; missing: {', '.join(sorted(names - there))}); look "
                    "at their logs, then run the same command again"
                )
            answer = self._network.receive(min(POLL_S, max(0.0, deadline - self._clock())))
            if isinstance(answer, Parcel):
                self._refuse(0, answer.sender, "it came before anything was asked")

    def collect(self, step: Step, timeout_s: float, *, is_needed: bool = True) -> list[str]:
        """Ask, and take answers until all are there or it is time to go on.

        Args:
            step: what is asked.
            timeout_s: longest wait.
            is_needed: whether too few answers end the run.

        Returns:
            Who has answered, sorted.

        Raises:
            FederationError: too few have, or can; names the others and why.
        """
        progress = _Progress(self._clock() + timeout_s, dict(step.kept))
        waiting = self._waiting(step, progress)
        if waiting:
            self._tell(StepStarted(step.round, step.name, waiting))
        while waiting := self._waiting(step, progress):
            if is_needed:
                self._check_possible(step, progress)
            self._ask_reachable(step, progress, waiting)
            now = self._clock()
            if now >= progress.deadline or self._is_enough(step, progress):
                break
            self._write_status(step, waiting)
            answer = self._network.receive(min(POLL_S, progress.deadline - now))
            self._take(step, progress, answer)
        if is_needed:
            self._check_enough(step, progress)
        return sorted(progress.answered)

    def _waiting(self, step: Step, progress: _Progress) -> tuple[str, ...]:
        return tuple(
            site
            for site in step.sites
            if site not in progress.answered and site not in progress.out
        )

    def _is_enough(self, step: Step, progress: _Progress) -> bool:
        """Whether nobody is at work any more, and nobody else is worth waiting for."""
        enough = len(progress.answered) >= (step.least or len(step.sites))
        return not step.waits_for_lost and not progress.asked and enough

    def _ask_reachable(self, step: Step, progress: _Progress, waiting: tuple[str, ...]) -> None:
        now = self._clock()
        wanted = [
            site
            for site in waiting
            if site not in progress.asked and progress.retry_at.get(site, now) <= now
        ]
        reachable = self._network.reachable() if wanted else set()
        for site in wanted:
            if site in reachable:
                request = step.ask(site, site in progress.needs_whole)
                progress.asked[site] = request.sha256
                self._network.send(site, request)
                self._tell(SiteAsked(step.round, site, step.name, request.num_bytes))

    def _take(self, step: Step, progress: _Progress, answer: Parcel | Lost | None) -> None:
        if answer is None:
            return
        if isinstance(answer, Lost):
            if progress.asked.pop(answer.site, None) is not None:
                progress.retry_at[answer.site] = self._clock() + RETRY_S
                self._tell(SiteLost(step.round, answer.site, printable(answer.sentence)))
            return
        site = answer.sender
        try:
            self._check_sender(step, progress, answer)
            if progress.answered.get(site) == answer.sha256:
                return  # the same once more: it was asked twice
            if site in progress.answered or site in progress.out:
                raise StaleError(f"site {site} sent one more answer in this step")
            if answer.kind == "refusal":
                self._take_refusal(step, progress, answer)
                return
            step.accept(answer)
        except StaleError as error:
            self._refuse(step.round, site, str(error))
            self._count_false(progress, site)
        except FederationError as error:
            self._refuse(step.round, site, str(error))
            self._put_out(progress, site, str(error))
        else:
            progress.answered[site] = answer.sha256
            progress.asked.pop(site, None)
            waiting = self._waiting(step, progress)
            self._tell(AnswerArrived(step.round, site, step.name, answer.num_bytes, waiting))

    def _check_sender(self, step: Step, progress: _Progress, answer: Parcel) -> None:
        """Refuse what nobody of this step has signed for this run and round."""
        site = answer.sender
        if site not in self._coordinator.sites:
            raise StaleError(
                f"an answer came in the name of {printable(site)[:64]!r} (expected one of "
                f"{', '.join(sorted(self._coordinator.sites))})"
            )
        if not answer.is_signed_by(self._coordinator.sites[site]):
            raise StaleError(
                f"an answer in the name of site {site} is not signed with that site's key"
            )
        if site not in step.sites:
            raise StaleError(
                f"site {site} answered, but was not asked: it dropped out of this round before, or "
                "it is not its turn"
            )
        if answer.run != self._coordinator.run_id:
            raise StaleError(f"site {site} sent an answer of another run")
        if answer.round != step.round:
            raise StaleError(
                f"site {site} answered for round {answer.round} (expected {step.round})"
            )

    def _take_refusal(self, step: Step, progress: _Progress, answer: Parcel) -> None:
        refusal, site = read_fields(Refusal, answer), answer.sender
        if refusal.request_sha256 != progress.asked.get(site):
            raise StaleError(f"site {site} refused another request than it has")
        if refusal.reason == "needs_state" and site not in progress.needs_whole:
            progress.needs_whole.add(site)
            progress.asked.pop(site)
            return
        raise UpdateError(f"site {site} refused ({refusal.reason}): {printable(refusal.sentence)}")

    def _count_false(self, progress: _Progress, site: str) -> None:
        """Ask a site again whose answer may have been taken for another's; not for ever."""
        if site in progress.asked:
            progress.num_false[site] = progress.num_false.get(site, 0) + 1
            if progress.num_false[site] < MAX_FALSE_ANSWERS:
                del progress.asked[site]
                progress.retry_at[site] = self._clock() + RETRY_S

    def _put_out(self, progress: _Progress, site: str, sentence: str) -> None:
        progress.out[site] = sentence
        progress.asked.pop(site, None)

    def _refuse(self, round_number: int, site: str, sentence: str) -> None:
        name, sentence = printable(site)[:64], printable(sentence)
        self._journal.log_refusal(round_number, name, sentence)
        self._tell(SiteRefused(round_number, name, sentence))

    def _check_possible(self, step: Step, progress: _Progress) -> None:
        """End at once where those who are left cannot be enough."""
        if len(step.sites) - len(progress.out) < (step.least or len(step.sites)):
            raise self._too_few(step, progress, "can still answer")

    def _check_enough(self, step: Step, progress: _Progress) -> None:
        if len(progress.answered) < (step.least or len(step.sites)):
            raise self._too_few(step, progress, "answered in time")

    def _too_few(self, step: Step, progress: _Progress, what: str) -> FederationError:
        reasons = "; ".join(progress.out[site] for site in sorted(progress.out))
        missing = ", ".join(self._waiting(step, progress)) or "nobody else"
        count = len(progress.answered)
        if what == "can still answer":
            count = len(step.sites) - len(progress.out)
        return FederationError(
            f"round {step.round}, {step.name}: {count} of {len(step.sites)} sites {what} (at least "
            f"{step.least or len(step.sites)} are needed; waiting for: {missing}"
            f"{'; ' + reasons if reasons else ''}); finished rounds are kept: look at the sites' "
            "logs, then run the same command again"
        )

    def _write_status(self, step: Step, waiting: tuple[str, ...]) -> None:
        key = (step.round, step.name, waiting)
        if key != self._told:
            self._told = key
            self._journal.write_status(
                "running", round_number=step.round, phase=step.name, waiting=waiting
            )
