"""Answers to the question for an update, and the check of them as they arrive.

Refused, with the site's name: what is malformed, was trained from another state, claims more
tokens than the plan has, or has tensors of other names or shapes, values that are not finite,
or too large a norm. What answers another request is refused too, but says nothing against the
site: somebody may have sent it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mutirao.errors import UpdateError
from mutirao.federated.aggregation.updates import check_update
from mutirao.federated.codec import Shapes
from mutirao.federated.coordinator.collect import StaleError
from mutirao.federated.coordinator.journal import SiteRound
from mutirao.federated.coordinator.next_low_rank import site_shapes
from mutirao.federated.coordinator.requests import Requests
from mutirao.federated.messages import UpdateAnswer, read_fields
from mutirao.federated.parcel import Parcel

Form = Literal["whole", "change"]


@dataclass(frozen=True)
class Accepted:
    """An accepted answer of a site, as far as the record needs it."""

    answer: UpdateAnswer
    """Its numbers."""
    bytes_sent: int
    """Size of the answer."""
    bytes_received: int
    """Size of the request."""
    sha256: str
    """Hash of the answer."""

    def record(
        self,
        *,
        norm: float | None = None,
        cosine: float | None = None,
        sha256: str | None = None,
        bytes_sent: int | None = None,
        bytes_received: int | None = None,
    ) -> SiteRound:
        """Return what the round's record says of the site.

        Args:
            norm: of the decoded update.
            cosine: of it to the mean.
            sha256: of the answer with the update, where it is another one.
            bytes_sent: of all answers of the round, where there are more.
            bytes_received: of all requests of the round, where there are more.
        """
        numbers = self.answer.model_dump(
            include={
                "num_tokens",
                "num_steps",
                "train_loss",
                "heldout_loss",
                "epsilon",
                "num_clipped",
                "seconds",
            }
        )
        return SiteRound(
            **numbers,
            bytes_sent=self.bytes_sent if bytes_sent is None else bytes_sent,
            bytes_received=self.bytes_received if bytes_received is None else bytes_received,
            update_sha256=sha256 or self.sha256,
            update_norm=norm,
            cosine_to_mean=cosine,
        )


class TrainStep:
    """The question for an update, and the check of its answer; also of a promise of one."""

    def __init__(
        self, requests: Requests, round_number: int, shapes: Shapes, *, terms: bytes | None = None
    ) -> None:
        self.accepted: dict[str, Accepted] = {}
        """What was accepted, by site."""
        self._requests = requests
        self._round = round_number
        self._shapes = shapes
        self._terms = terms
        self._config = requests.coordinator.plan.federated
        self._state_sha256 = requests.journal.replica_sha256(round_number - 1)
        self._holders = requests.holders(round_number - 1)

    def ask(self, site: str, needs_whole: bool) -> Parcel:
        """Return the request for a site: the change if it took part in its last turn."""
        is_holder = site in self._holders and not needs_whole
        return self._request(site, "change" if is_holder else "whole")

    def check(self, parcel: Parcel) -> None:
        """Check an update, or under secure aggregation the promise of one, and note it.

        Raises:
            StaleError: it answers another request.
            UpdateError: it is refused.
        """
        site, kind = parcel.sender, "update" if self._terms is None else "ready"
        if parcel.kind != kind:
            raise StaleError(f"site {site} sent {parcel.kind[:40]!r} (expected {kind!r})")
        answer = read_fields(UpdateAnswer, parcel)
        request = self._request_of(answer, site)
        if answer.state_sha256 != self._state_sha256:
            raise UpdateError(f"site {site} trained from another state than it was given")
        self._check_tokens(answer, site)
        if self._terms is None:
            check_update(
                parcel,
                site_shapes(self._shapes, answer.rank, self._config),
                self._config.upload,
                max_norm=self._config.max_update_norm,
            )
        self.accepted[site] = Accepted(answer, parcel.num_bytes, request.num_bytes, parcel.sha256)

    def _request(self, site: str, form: Form) -> Parcel:
        return self._requests.train(site, self._round, form, terms=self._terms)

    def _request_of(self, answer: UpdateAnswer, site: str) -> Parcel:
        """Return the request that an answer is to; after a restart it may be of either form."""
        forms: tuple[Form, ...] = ("whole",) if self._round == 1 else ("change", "whole")
        for form in forms:
            request = self._request(site, form)
            if request.sha256 == answer.request_sha256:
                return request
        raise StaleError(f"site {site} answered another request than that of round {self._round}")

    def _check_tokens(self, answer: UpdateAnswer, site: str) -> None:
        """Refuse a weight beyond the plan; under differential privacy nothing depends on it."""
        plan = self._requests.coordinator.plan
        most = plan.federated.tokens_per_round + 2 * plan.train.max_tokens_per_example
        if plan.federated.privacy is None and answer.num_tokens > most:
            raise UpdateError(
                f"site {site} claims {answer.num_tokens} tokens (the plan has at most {most})"
            )
