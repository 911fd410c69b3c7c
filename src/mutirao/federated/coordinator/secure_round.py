"""A round under secure aggregation: the coordinator learns the sum of the updates alone.

    train        the terms, with the state     → each site's keys, when it has trained
    share_keys   everyone's keys               → shares of its secrets, sealed
    mask         the shares dealt to it        → its masked update, in chunks
    survivors    whose masked updates came     → its signature under that list
    unmask       everyone's signatures         → one share of each site's secrets

What comes is kept as it came, a folder for each step, and who has passed a step is settled in a
file before anything is sent of the next. The protocol's server has no randomness, so a killed
coordinator goes on by giving it the kept messages once more. Masked updates stay in their
files; one chunk of one site is in memory at a time. When the round counts, all of this is
removed: only the sum was ever to be known.

Until the masked updates are in, as many sites are needed as ``federated.quorum`` says, and at
least the threshold; each step has ``round_timeout_s``. From then on the threshold is enough and
nobody who is lost is waited for. A site that drops out in between is not in the sum.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.artifact import write_atomic
from mutirao.errors import ArtifactError, UpdateError
from mutirao.federated.aggregation.fold import Mean
from mutirao.federated.aggregation.updates import ParcelFile, read_parcel, write_parcel
from mutirao.federated.codec import Shapes
from mutirao.federated.coordinator.answers import TrainStep
from mutirao.federated.coordinator.collect import Collector, StaleError, Step
from mutirao.federated.coordinator.events import Event, RoundStarted
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord, SiteRound
from mutirao.federated.coordinator.next_state import write_next_state
from mutirao.federated.coordinator.requests import Requests
from mutirao.federated.messages import SecureAnswer, SecureStep, read_fields
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator
from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.federated.secure.messages import MaskedChunk
from mutirao.federated.secure.server import MIN_COHORT, AggregationServer
from mutirao.federated.secure.terms import RoundTerms, default_threshold

STEPS: tuple[SecureStep, ...] = ("share_keys", "mask", "survivors", "unmask")
"""The steps after 'train'."""
_SETTLED = "members.json"
_SUM = "sum.int64"
_TERMS = "terms"


def round_terms(coordinator: Coordinator, round_number: int, shapes: Shapes) -> RoundTerms:
    """Return the terms of a round: they follow from the plan, the sites and the tensors.

    Raises:
        InputError: they could not be kept, for example because a sum could overflow.
    """
    secure = coordinator.plan.federated.secure
    assert secure is not None
    sites = tuple(sorted(coordinator.sites))
    largest_code = 2 ** (secure.value_bits - 1) - 1
    fixed_point = FixedPoint(clip=secure.clip, scale=largest_code / secure.clip)
    return RoundTerms(
        run_id=bytes.fromhex(coordinator.run_id),
        round_number=round_number,
        sites=sites,
        threshold=secure.threshold or default_threshold(len(sites)),
        modulus_bits=fixed_point.bits_needed(len(sites)),
        num_values=sum(prod(shape) for shape in shapes.values()),
        fixed_point=fixed_point,
    )


class KeptChunks(MutableMapping[tuple[int, int], bytes]):
    """Masked chunks by site and number, which lie in the kept answers and are read from there."""

    def __init__(self, folder: Path, terms: RoundTerms) -> None:
        self._folder, self._terms = folder, terms
        self._slots: set[tuple[int, int]] = set()
        self._files: dict[int, ParcelFile] = {}

    def __setitem__(self, slot: tuple[int, int], packed: bytes) -> None:
        self._slots.add(slot)  # the answer that it came with is kept when all of it is sound

    def __getitem__(self, slot: tuple[int, int]) -> bytes:
        if slot not in self._slots:
            raise KeyError(slot)
        number, chunk = slot
        if number not in self._files:
            name = self._terms.sites[number]
            self._files[number] = ParcelFile(self._folder / f"{name}.parcel")
        payload = self._files[number].payload(f"chunk/{chunk}")
        return MaskedChunk.from_bytes(payload.tobytes(), self._terms).packed

    def __delitem__(self, slot: tuple[int, int]) -> None:
        self._slots.remove(slot)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class SecureRound:
    """One round; ``run`` plays it, or goes on with it."""

    def __init__(
        self,
        requests: Requests,
        collector: Collector,
        round_number: int,
        *,
        on_event: Callable[[Event], None],
    ) -> None:
        self._requests = requests
        self._coordinator = requests.coordinator
        self._config = self._coordinator.plan.federated
        self._journal = requests.journal
        self._collector = collector
        self._number = round_number
        self._tell = on_event
        self._folder = self._journal.secure_folder(round_number)
        self._shapes = self._journal.open_state(round_number - 1, "global").shapes
        self._terms = round_terms(self._coordinator, round_number, self._shapes)
        keys = {name: bytes.fromhex(key) for name, key in self._coordinator.sites.items()}
        chunks = KeptChunks(self._step_folder("mask"), self._terms)
        self._server = AggregationServer(self._terms, keys, masked=chunks)
        self._train = TrainStep(requests, round_number, self._shapes, terms=self._terms.to_bytes())
        self._asked: dict[str, Parcel] = {}
        self._bytes_sent = dict.fromkeys(self._terms.sites, 0)
        self._bytes_received = dict.fromkeys(self._terms.sites, 0)
        self._hashes: dict[str, str] = {}

    def run(self) -> RoundRecord:
        """Play the round up to the next state.

        Raises:
            FederationError: too few sites stayed; what has come is kept, and the round goes on
                when the run is started again.
            ProtocolError: a site dealt shares that fit nothing; names it.
            ArtifactError: what was kept of the round is damaged.
        """
        remove_messages(self._journal, before=self._number)
        self._check_terms()
        kept = self._keep("train", self._accept_ready, self._terms.sites)
        num_rounds = self._config.num_rounds
        self._tell(RoundStarted(self._number, num_rounds, self._terms.sites, tuple(sorted(kept))))
        self._play("train", self._terms.sites, self._train.ask, self._accept_ready, kept)
        messages = self._server.advance()
        for step in STEPS:
            self._play_step(step, messages)
            messages = self._server.advance()
        mean = self._write_sum()
        state = write_next_state(self._journal, self._number, self._config, mean)
        return RoundRecord(
            round=self._number,
            seconds=0.0,
            sites={site: self._record(site) for site in self._server.summed},
            global_sha256=state.global_sha256,
            replica_sha256=state.replica_sha256,
            is_secure=True,
        )

    def _record(self, site: str) -> SiteRound:
        return self._train.accepted[site].record(
            sha256=self._hashes[site],
            bytes_sent=self._bytes_sent[site],
            bytes_received=self._bytes_received[site],
        )

    def _play_step(self, step: SecureStep, messages: dict[str, bytes]) -> None:
        """Pass on the server's messages, and take the answers."""
        self._asked = {
            site: self._requests.secure(self._number, step, message)
            for site, message in messages.items()
        }

        def accept(parcel: Parcel) -> None:
            self._accept_answer(step, parcel)

        sites = tuple(sorted(messages))
        kept = self._keep(step, accept, sites)
        self._play(step, sites, lambda site, _: self._asked[site], accept, kept)

    def _play(
        self,
        name: str,
        sites: tuple[str, ...],
        ask: Callable[[str, bool], Parcel],
        accept: Callable[[Parcel], None],
        kept: dict[str, str],
    ) -> None:
        """Collect the answers of one step, if it is not settled yet who has passed it."""
        if self._settled(name) is not None:
            return

        def take(parcel: Parcel) -> None:
            accept(parcel)
            write_parcel(self._step_folder(name) / f"{parcel.sender}.parcel", parcel)
            self._count(parcel)

        is_late = name in ("survivors", "unmask")
        least = self._terms.threshold if is_late else self._least
        step = Step(
            name, self._number, sites, ask, take, least, waits_for_lost=not is_late, kept=kept
        )
        answered = self._collector.collect(step, self._config.round_timeout_s)
        write_atomic(self._step_folder(name) / _SETTLED, json.dumps(answered))

    @property
    def _least(self) -> int:
        """Fewest sites before the masked updates are in; 0 for all of them."""
        quorum = self._config.quorum
        return max(quorum, self._terms.threshold, MIN_COHORT) if quorum else 0

    def _keep(
        self, name: str, accept: Callable[[Parcel], None], sites: tuple[str, ...]
    ) -> dict[str, str]:
        """Give the server a step's kept answers; return their hashes, by site.

        Raises:
            ArtifactError: one is damaged that has been counted on already.
        """
        settled = self._settled(name)
        kept = {}
        for site in sites if settled is None else settled:
            path = self._step_folder(name) / f"{site}.parcel"
            parcel = read_parcel(path) if path.exists() else None
            if parcel is not None:
                accept(parcel)
                self._count(parcel)
                kept[site] = parcel.sha256
            elif settled is not None:
                raise ArtifactError(
                    f"the kept message {path} of secure aggregation is damaged; the round cannot "
                    "go on without it: restore it, or begin a new run"
                )
        return kept

    def _accept_ready(self, parcel: Parcel) -> None:
        self._train.check(parcel)
        self._check_payloads(parcel, ("advert",))
        self._server.receive(parcel.sender, parcel.payloads["advert"].tobytes())

    def _accept_answer(self, step: SecureStep, parcel: Parcel) -> None:
        site = parcel.sender
        if parcel.kind != "secure":
            raise StaleError(f"site {site} sent {parcel.kind[:40]!r} (expected 'secure')")
        answer = read_fields(SecureAnswer, parcel)
        if answer.request_sha256 != self._asked[site].sha256 or answer.step != step:
            raise StaleError(f"site {site} answered another request than that of step {step}")
        names: tuple[str, ...] = ("message",)
        if step == "mask":
            names = tuple(f"chunk/{number}" for number in range(self._terms.num_chunks))
        self._check_payloads(parcel, names)
        for name in names:
            self._server.receive(site, parcel.payloads[name].tobytes())
        if step == "mask":
            self._hashes[site] = parcel.sha256

    def _check_payloads(self, parcel: Parcel, names: tuple[str, ...]) -> None:
        if parcel.payloads.keys() != {*names}:
            raise UpdateError(
                f"site {parcel.sender} sent {len(parcel.payloads)} payloads (expected "
                f"{len(names)}: {names[0]}{' and on' if len(names) > 1 else ''})"
            )

    def _count(self, answer: Parcel) -> None:
        """Add up what travelled, for the record."""
        site = answer.sender
        asked = self._asked.get(site)
        received = self._train.accepted[site].bytes_received if asked is None else asked.num_bytes
        self._bytes_sent[site] += answer.num_bytes
        self._bytes_received[site] += received

    def _check_terms(self) -> None:
        """Keep the terms, or make sure that they are those of before a restart."""
        path = self._folder / _TERMS
        terms = self._terms.to_bytes()
        if not path.exists():
            write_atomic(path, terms)
        elif path.read_bytes() != terms:
            raise ArtifactError(
                f"round {self._number} began with other terms than now ({path}); the sites of a "
                "run must stay the same: begin a new run"
            )

    def _settled(self, name: str) -> list[str] | None:
        path = self._step_folder(name) / _SETTLED
        if not path.exists():
            return None
        try:
            return [str(site) for site in json.loads(path.read_bytes())]
        except (ValueError, TypeError):
            raise ArtifactError(
                f"{path} is damaged; the round cannot go on without it: restore it, or begin a "
                "new run"
            ) from None

    def _step_folder(self, name: str) -> Path:
        return self._folder / f"{('train', *STEPS).index(name)}-{name}"

    def _write_sum(self) -> Mean:
        """Write the sum to a file, chunk by chunk; return what gives one tensor of the mean."""
        path = self._folder / _SUM
        with path.open("wb") as file:
            for codes in self._server.sum_chunks():
                file.write(codes.astype("<i8").data)
        starts, start = {}, 0
        for name in sorted(self._shapes):
            starts[name] = start
            start += prod(self._shapes[name])
        num_sites = len(self._server.summed)

        def mean(name: str) -> NDArray[np.float64]:
            shape = self._shapes[name]
            codes = np.fromfile(path, "<i8", prod(shape), offset=8 * starts[name])
            values = self._terms.fixed_point.decode(codes.astype(np.int64, copy=False))
            return (values / num_sites).reshape(shape)

        return mean


def remove_messages(journal: CoordinatorJournal, *, before: int) -> None:
    """Remove what was kept of secure aggregation in earlier rounds, which count."""
    for number in range(1, before):
        shutil.rmtree(journal.secure_folder(number), ignore_errors=True)
