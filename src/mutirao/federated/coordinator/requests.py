"""What the coordinator asks for: signed requests that are the same after a restart.

A state travels whole in a site's first turn and to whoever has lost it, as a change to others. Both
lie in files beside the state, so that a request's payloads are views of them and take no
memory. Everything in a request follows from the plan, the journal and the coordinator's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from mutirao.config import Config
from mutirao.errors import ArtifactError
from mutirao.federated.codec import CodecConfig, count_payload_bytes, encode_tensor
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.next_low_rank import sent_ranks
from mutirao.federated.coordinator.state_files import StateFile, writing
from mutirao.federated.messages import (
    FinishRequest,
    SecureRequest,
    SecureStep,
    StateFields,
    TrainRequest,
    tensor_payloads,
)
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Coordinator

Payloads = Mapping[str, NDArray[np.uint8]]
_HALF = np.uint32(0xFFFF)


class Requests:
    """Makes the requests of one run."""

    def __init__(
        self, coordinator: Coordinator, journal: CoordinatorJournal, key: Ed25519PrivateKey
    ) -> None:
        self.coordinator = coordinator
        self.journal = journal
        self._key = key
        self._config = coordinator.plan.federated
        self._kept: dict[tuple[str, int, str, int], Parcel] = {}
        self._counted: tuple[int, dict[str, int]] | None = None

    def train(
        self,
        site: str,
        round_number: int,
        form: Literal["whole", "change"],
        *,
        terms: bytes | None = None,
    ) -> Parcel:
        """Ask a site for an update from the state after the round before."""
        last_counted = self._last_counted(site, before=round_number)
        key = ("train", round_number, form, last_counted)
        if key not in self._kept:
            state, payloads = self.state(round_number - 1, form)
            plan = self.coordinator.plan
            fields = TrainRequest(plan=plan, state=state, last_counted=last_counted)
            extra = {} if terms is None else {"terms": np.frombuffer(terms, np.uint8)}
            self._keep(key, self.sign("train", round_number, fields, {**payloads, **extra}))
        return self._kept[key]

    def finish(self, num_rounds: int, form: Literal["whole", "change"]) -> Parcel:
        """Hand out the final state."""
        key = ("finish", num_rounds, form, 0)
        if key not in self._kept:
            state, payloads = self.state(num_rounds, form)
            fields = FinishRequest(plan=self.coordinator.plan, state=state)
            self._keep(key, self.sign("finish", num_rounds, fields, payloads))
        return self._kept[key]

    def secure(self, round_number: int, step: SecureStep, message: bytes) -> Parcel:
        """Pass on a message of secure aggregation."""
        fields = SecureRequest(plan=self.coordinator.plan, step=step)
        payloads = {"message": np.frombuffer(message, np.uint8)}
        return self.sign("secure", round_number, fields, payloads)

    def sign(self, kind: str, round_number: int, fields: Config, payloads: Payloads) -> Parcel:
        """Return a signed request."""
        parcel = Parcel(
            kind=kind,
            run=self.coordinator.run_id,
            round=round_number,
            sender=COORDINATOR,
            fields=fields.model_dump(mode="json"),
            payloads=payloads,
        )
        return parcel.signed(self._key)

    def holders(self, number: int) -> set[str]:
        """Return who was given the state that the change to a state is based on."""
        given = self._config.basis(number) + 1  # the round in which it was sent
        records = self.journal.records()[given - 1 : given] if number >= self._config.turns else []
        return {site for each in records for site in each.sites}

    def _keep(self, key: tuple[str, int, str, int], parcel: Parcel) -> None:
        """Keep a request of this round, and forget those of others."""
        self._kept = {other: kept for other, kept in self._kept.items() if other[1] == key[1]}
        self._kept[key] = parcel

    def _last_counted(self, site: str, *, before: int) -> int:
        """Return the last round before another that has a site's update; 0 for none."""
        if self._counted is None or self._counted[0] != before:
            records = self.journal.records()[: before - 1]
            self._counted = (before, {name: each.round for each in records for name in each.sites})
        return self._counted[1].get(site, 0)

    def state(
        self, number: int, form: Literal["whole", "change"]
    ) -> tuple[StateFields, dict[str, NDArray[np.uint8]]]:
        """Return a state as it travels: what is said of it, and its payloads.

        Raises:
            ArtifactError: the journal is damaged.
        """
        wanted = self.journal.replica_sha256(number)
        is_whole = form == "whole" or not self.journal.state_path(number, "change").exists()
        ranks = sent_ranks(self.journal, number, whole=is_whole)
        if is_whole:
            file = write_whole(self.journal, number)
            fields = StateFields(form="whole", state_sha256=wanted, ranks=ranks)
        else:
            file = self.journal.open_state(number, "change")
            before = self.journal.replica_sha256(self._config.basis(number))
            fields = StateFields(form="change", based_on=before, state_sha256=wanted, ranks=ranks)
        return fields, tensor_payloads({name: file.map_bytes(name) for name in file.names})


def write_whole(journal: CoordinatorJournal, number: int) -> StateFile:
    """Write what the sites hold after a round as it travels whole; in bf16 if that loses nothing.

    Which of the two it is, the header of each payload says.

    Raises:
        ArtifactError: the replica is damaged.
    """
    replica = journal.open_state(number, "replica")
    shapes = replica.shapes
    is_half = all(_fits_bfloat16(replica.read(name)) for name in replica.names)
    codec = CodecConfig(format="bf16" if is_half else "fp32")
    sizes = {name: (count_payload_bytes(shape, codec),) for name, shape in shapes.items()}
    path = journal.state_path(number, "whole")
    try:
        if StateFile(path).shapes == sizes:
            return StateFile(path)
    except ArtifactError:
        pass  # not there yet, or cut: it is made from the replica
    with writing(path, sizes, "U8") as file:
        for name in replica.names:
            file.write(name, encode_tensor(name, replica.read(name), codec))
    return StateFile(path)


def _fits_bfloat16(values: NDArray[np.float32]) -> bool:
    return not (values.view(np.uint32) & _HALF).any()
