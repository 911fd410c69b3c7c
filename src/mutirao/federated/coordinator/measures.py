"""After training: how well each site's text is predicted, by what, and who contributed.

Three questions, each asked as ``evaluate`` of all sites:

    global       the final state on each site's held-out text
    without X    the final state as it would be had site X not been in the last round: its kept
                 updates are folded once more without X. How much higher the loss is, over all
                 held-out text, is X's contribution to that round
    alone X      what X's own last update leads to, on every site's text: a column of the
                 cross-site matrix; only when asked for

What this reveals: a site's answer is one number for each question, about its held-out text,
without noise; so nothing is asked under differential privacy. 'alone X' hands X's own update to
all other sites, and 'without X' lets them compute it from the difference; under secure
aggregation neither can be asked. Contributions are of one round, from few tokens, and small
differences mean nothing; they are no basis for payment.

States travel as changes of the final state, in the plan's download codec, so what is measured
is that change as decoded.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.artifact import write_atomic
from mutirao.config import Config
from mutirao.errors import InputError
from mutirao.federated.aggregation.compatibility import check_plan
from mutirao.federated.aggregation.fold import combine
from mutirao.federated.aggregation.low_rank_rounds import LOW_RANK_RULES
from mutirao.federated.codec import count_payload_bytes, decode_tensor, encode_tensor
from mutirao.federated.coordinator.collect import Collector, StaleError, Step
from mutirao.federated.coordinator.events import Event
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord
from mutirao.federated.coordinator.next_state import change_seed, write_next_state
from mutirao.federated.coordinator.requests import Requests
from mutirao.federated.coordinator.rounds import IDENTITY_FOLDER, open_updates
from mutirao.federated.coordinator.state_files import StateFile, writing
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import (
    EvaluateRequest,
    LossesAnswer,
    StateFields,
    read_fields,
    tensor_payloads,
)
from mutirao.federated.network import Network
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator
from mutirao.federated.site.replica import add_change, update_hash

GLOBAL = "global"
MEASURES_NAME = "measures.json"
_FOLDER = "measures"
ReadTensor = Callable[[str], NDArray[np.float32]]


class SiteLoss(Config):
    """One answer."""

    loss: float
    """Nats per token."""
    num_tokens: int
    """Tokens scored."""


class Measures(Config):
    """What was measured after a round."""

    round: int
    """The last round."""
    losses: dict[str, dict[str, SiteLoss]]
    """By what was measured ('global', 'without X', 'alone X'), then by whose text it was."""
    contributions: dict[str, float]
    """For each site of the last round: loss without it minus loss with it, nats per token over
    all held-out text of the sites that answered both; empty where it was not asked."""


def measure(
    coordinator: Coordinator,
    network: Network,
    *,
    max_tokens: int | None = None,
    contributions: bool = True,
    cross_site: bool = False,
    on_event: Callable[[Event], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Measures:
    """Ask all sites, and keep the answers as ``measures.json`` in the coordinator's folder.

    Args:
        coordinator: of a run that is finished.
        network: the sites; one that does not answer is left out.
        max_tokens: held-out tokens at each site; None for the plan's ``monitor_tokens``.
        contributions: whether to leave out each site in turn.
        cross_site: whether to show each site's own update to all the others.
        on_event: hears what happens.
        clock: seconds that pass.

    Raises:
        InputError: the run has no finished round, or the plan does not allow the question.
        ArtifactError: the journal is damaged.
    """
    journal = CoordinatorJournal(coordinator.work)
    records = journal.records()
    tokens = coordinator.plan.federated.monitor_tokens if max_tokens is None else max_tokens
    _check(coordinator, records, tokens, is_plain=contributions or cross_site)
    last = sorted(records[-1].sites)
    contributions = contributions and len(last) > 1
    if contributions:
        _check_left(coordinator, len(last) - 1)
    asking = _Asking(coordinator, network, journal, records[-1], tokens, on_event, clock)
    losses = {GLOBAL: asking.ask_global()}
    try:
        if contributions:
            losses |= {f"without {site}": asking.ask_without(site) for site in last}
        if cross_site:
            losses |= {f"alone {site}": asking.ask_alone(site) for site in last}
    finally:
        shutil.rmtree(coordinator.work / _FOLDER, ignore_errors=True)
    measures = Measures(
        round=records[-1].round,
        losses=losses,
        contributions={
            site: _difference(losses[label], losses[GLOBAL])
            for site in last
            if (label := f"without {site}") in losses and losses[label].keys() & losses[GLOBAL]
        },
    )
    write_atomic(coordinator.work / MEASURES_NAME, measures.model_dump_json(indent=1))
    return measures


def _check(
    coordinator: Coordinator, records: list[RoundRecord], tokens: int, *, is_plain: bool
) -> None:
    config = coordinator.plan.federated
    if not records:
        raise InputError("no round is finished yet; there is nothing to measure")
    if tokens < 1:
        raise InputError(f"max_tokens={tokens} is not accepted (expected at least 1)")
    if config.privacy is not None:
        raise InputError(
            "losses on held-out text have no noise, so they are not asked for under "
            "federated.privacy"
        )
    if is_plain and config.secure is not None:
        raise InputError(
            "contributions and the cross-site matrix need single updates, which secure "
            "aggregation hides; ask with contributions=False and cross_site=False"
        )
    if is_plain and config.aggregation in LOW_RANK_RULES:
        raise InputError(
            f"contributions and the cross-site matrix are not built for "
            f"aggregation={config.aggregation}; ask with contributions=False and cross_site=False"
        )


def _check_left(coordinator: Coordinator, num_sites: int) -> None:
    """Refuse to leave one out where the rule needs all."""
    config = coordinator.plan.federated.model_copy(update={"quorum": 0})
    try:
        check_plan(coordinator.plan.model_copy(update={"federated": config}), num_sites)
    except InputError as error:
        raise InputError(f"no site can be left out of the last round: {error}") from None


def _difference(without: dict[str, SiteLoss], whole: dict[str, SiteLoss]) -> float:
    both = sorted(without.keys() & whole.keys())
    total = sum(whole[site].num_tokens for site in both)
    return sum(
        (without[site].loss - whole[site].loss) * whole[site].num_tokens / total for site in both
    )


class _Asking:
    """The questions after one run."""

    def __init__(
        self,
        coordinator: Coordinator,
        network: Network,
        journal: CoordinatorJournal,
        record: RoundRecord,
        max_tokens: int,
        on_event: Callable[[Event], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self._coordinator = coordinator
        self._config = coordinator.plan.federated
        self._journal = journal
        self._record = record
        self._max_tokens = max_tokens
        hear = on_event or (lambda event: None)
        self._collector = Collector(coordinator, network, journal, on_event=hear, clock=clock)
        key = open_identity(coordinator.work / IDENTITY_FOLDER)
        self._requests = Requests(coordinator, journal, key)
        self._replica = journal.open_state(record.round, "replica")

    def ask_global(self) -> dict[str, SiteLoss]:
        """Measure the final state."""
        held = StateFields(form="none", state_sha256=self._record.replica_sha256)
        return self._ask(GLOBAL, self._request(GLOBAL, held, {}))

    def ask_without(self, site: str) -> dict[str, SiteLoss]:
        """Measure the final state as it would be without one site in the last round."""
        number = self._record.round
        tokens = {name: float(each.num_tokens) for name, each in self._record.sites.items()}
        shapes = self._replica.shapes
        updates = open_updates(self._journal, number, shapes, self._coordinator, tokens)
        mean = combine(
            updates.without(site), self._config.aggregation, num_faulty=self._config.num_faulty
        )
        scratch = CoordinatorJournal(self._coordinator.work / _FOLDER)
        write_next_state(scratch, number, self._config, mean, source=self._journal)
        return self._ask_change(f"without {site}", scratch.open_state(number, "replica").read)

    def ask_alone(self, site: str) -> dict[str, SiteLoss]:
        """Measure what one site's own last update leads to."""
        number, shapes = self._record.round, self._replica.shapes
        before = self._journal.open_state(number - 1, "replica")
        updates = open_updates(self._journal, number, shapes, self._coordinator, {site: 1.0})

        def read(name: str) -> NDArray[np.float32]:
            update = {name: updates.decode(site, name)}
            return add_change({name: before.read(name)}, update)[name]

        return self._ask_change(f"alone {site}", read)

    def _ask_change(self, label: str, read: ReadTensor) -> dict[str, SiteLoss]:
        path = self._coordinator.work / _FOLDER / "change.safetensors"
        sha256 = self._write_change(path, read)
        state = StateFields(
            form="change", based_on=self._record.replica_sha256, state_sha256=sha256
        )
        file = StateFile(path)
        payloads = tensor_payloads({name: file.map_bytes(name) for name in file.names})
        return self._ask(label, self._request(label, state, payloads))

    def _write_change(self, path: Path, read: ReadTensor) -> str:
        """Write what leads from the final state to another; return the hash of where it leads."""
        codec, digest = self._config.download, hashlib.sha256()
        sizes = {n: (count_payload_bytes(s, codec),) for n, s in self._replica.shapes.items()}
        with writing(path, sizes, "U8") as file:
            for name in self._replica.names:
                replica = self._replica.read(name)
                seed = change_seed(self._record.round)
                payload = encode_tensor(name, read(name) - replica, codec, seed=seed)
                decoded = decode_tensor(name, payload, replica.shape, codec)
                update_hash(digest, name, add_change({name: replica}, {name: decoded})[name])
                file.write(name, payload)
        return digest.hexdigest()

    def _request(
        self, label: str, state: StateFields, payloads: dict[str, NDArray[np.uint8]]
    ) -> Parcel:
        fields = EvaluateRequest(
            plan=self._coordinator.plan, label=label, state=state, max_tokens=self._max_tokens
        )
        return self._requests.sign("evaluate", self._record.round, fields, payloads)

    def _ask(self, label: str, request: Parcel) -> dict[str, SiteLoss]:
        """Ask all sites the same, and return what those who answered say."""
        losses: dict[str, SiteLoss] = {}

        def accept(parcel: Parcel) -> None:
            answer = read_fields(LossesAnswer, parcel) if parcel.kind == "losses" else None
            if answer is None or answer.request_sha256 != request.sha256 or answer.label != label:
                raise StaleError(f"site {parcel.sender} answered another question than {label!r}")
            losses[parcel.sender] = SiteLoss(loss=answer.loss, num_tokens=answer.num_tokens)

        sites = tuple(sorted(self._coordinator.sites))
        step = Step(
            f"evaluate {label}",
            self._record.round,
            sites,
            lambda site, needs_whole: request,
            accept,
            least=1,
        )
        self._collector.collect(step, self._config.round_timeout_s, is_needed=False)
        return dict(sorted(losses.items()))
