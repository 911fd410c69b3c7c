"""What happens in a run, told as it happens: for progress in a terminal, and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from mutirao.federated.coordinator.journal import RoundRecord


@dataclass(frozen=True)
class RoundStarted:
    """A round begins, or goes on after a restart."""

    round: int
    """Its number."""
    num_rounds: int
    """Rounds of the run."""
    sites: tuple[str, ...]
    """Who takes part."""
    kept: tuple[str, ...]
    """Whose update is there already from before a restart."""


@dataclass(frozen=True)
class StepStarted:
    """A step of a round begins: 'train', one of secure aggregation's, 'evaluate' or 'finish'."""

    round: int
    """The round."""
    step: str
    """The step."""
    waiting: tuple[str, ...]
    """Whose answers are awaited."""


@dataclass(frozen=True)
class SiteAsked:
    """A request went to a site."""

    round: int
    """The round."""
    site: str
    """Who was asked."""
    step: str
    """For what."""
    num_bytes: int
    """Size of the request."""


@dataclass(frozen=True)
class AnswerArrived:
    """An answer came, was checked and is kept."""

    round: int
    """The round."""
    site: str
    """Who answered."""
    step: str
    """To what."""
    num_bytes: int
    """Size of the answer."""
    waiting: tuple[str, ...]
    """Whose answers are still awaited."""


@dataclass(frozen=True)
class SiteLost:
    """A request will not be answered; the site is asked again when it can be reached."""

    round: int
    """The round."""
    site: str
    """Who."""
    sentence: str
    """Why."""


@dataclass(frozen=True)
class SiteRefused:
    """Something that came was refused, or a site refused what was asked."""

    round: int
    """The round."""
    site: str
    """In whose name it came; where the signature is wrong, somebody else may have sent it."""
    sentence: str
    """Why."""


@dataclass(frozen=True)
class RoundFinished:
    """A round is in the journal and counts."""

    record: RoundRecord
    """Its record."""


Event = (
    RoundStarted | StepStarted | SiteAsked | AnswerArrived | SiteLost | SiteRefused | RoundFinished
)
