"""A site's part in secure aggregation, kept on disk so that it outlives the process.

    secure/codes.npy      the update in integers; the session is bound to it
    secure/numbers.json   the numbers that go with it, and the state that it was trained from
    secure/session.bin    snapshot of the session, secret: written before each answer leaves

They lie in the round's folder of the journal. Once there is a snapshot, the round's update is
fixed: the same request again gets the same bytes, and a request for another update of the same
run and round is refused, for two updates under the same masks would give away their difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import ValidationError

from mutirao.artifact import canonical_json, write_atomic
from mutirao.config import Config
from mutirao.errors import InputError, ProtocolError, explain_disk_errors
from mutirao.federated.audit.record import Mask
from mutirao.federated.codec import Payload, Tensors
from mutirao.federated.messages import SecureStep
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import PUBLIC_KEY, Plan, Site
from mutirao.federated.secure.keys import Identity
from mutirao.federated.secure.site import SiteSession
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms, default_threshold
from mutirao.federated.site.journal import RunJournal
from mutirao.federated.site.policy import SitePolicy
from mutirao.federated.site.refusal import Refused

FOLDER = "secure"
TERMS = "terms"
ADVERT = "advert"
MESSAGE = "message"
CHUNK = "chunk/{}"


class KeptNumbers(Config):
    """What goes with the masked update."""

    state_sha256: str
    """Hash of the state that was trained from."""
    terms_sha256: str
    """Hash of the terms that the update was encoded for."""
    numbers: dict[str, Any]
    """Fields of the answer."""


class SecureRounds:
    """The secure sessions of one site; the one asked last is kept in memory."""

    def __init__(self, site: Site, key: Ed25519PrivateKey) -> None:
        self._identity = Identity(site.name, key)
        self._identities = _read_identities(site, self._identity)
        self._session: tuple[Path, SiteSession] | None = None

    def read_terms(self, plan: Plan, request: Parcel, num_values: int | None = None) -> RoundTerms:
        """Return the terms that came with a training request.

        Args:
            plan: what was agreed.
            request: the request.
            num_values: of the update, where that is known already.

        Raises:
            ProtocolError: there are none, or they are not of this plan, run and round.
        """
        secure = plan.federated.secure
        if secure is None or TERMS not in request.payloads:
            raise ProtocolError("a request for a masked update came without its terms")
        terms = RoundTerms.from_bytes(request.payloads[TERMS].tobytes())
        threshold = secure.threshold or default_threshold(len(terms.sites))
        largest = 2 ** (secure.value_bits - 1) - 1
        checks = {
            "run": (terms.run_id.hex(), request.run),
            "round": (terms.round_number, request.round),
            "threshold": (terms.threshold, threshold),
            "clip": (terms.fixed_point.clip, secure.clip),
            "largest code": (terms.fixed_point.largest_code, largest),
            "number of values": (terms.num_values, num_values or terms.num_values),
        }
        for what, (came, expected) in checks.items():
            if came != expected:
                raise ProtocolError(
                    f"the terms have {what} {came} (expected {expected}, by plan and request)"
                )
        return terms

    def cohort(self, policy: SitePolicy | None) -> CohortPolicy:
        """Return what this site insists on."""
        least = policy.rules.min_cohort if policy else 0
        return CohortPolicy(min_cohort=least) if least else CohortPolicy()

    def mask(self, terms: RoundTerms, policy: SitePolicy | None) -> Mask:
        """Return the protection of an update: the fewest sites whose sum can be read.

        Raises:
            ProtocolError: the terms are weaker than this site allows.
        """
        self.cohort(policy).check(terms, self._identities)
        return Mask(cohort_size=max(self.cohort(policy).min_cohort, terms.threshold))

    def begin(
        self,
        run: RunJournal,
        terms: RoundTerms,
        policy: SitePolicy | None,
        state_sha256: str,
        update: Tensors,
        numbers: Mapping[str, Any],
    ) -> tuple[bytes, dict[str, Any]]:
        """Fix the update of a round; return this site's keys and the numbers of the answer.

        Raises:
            ProtocolError: the terms are weaker than this site allows.
            UpdateError: the update does not fit the terms, or is not finite.
        """
        vector = [np.ravel(update[name]) for name in sorted(update)]
        encoded = terms.fixed_point.encode(np.concatenate(vector))
        told = {**numbers, "num_clipped": encoded.num_clipped}
        folder = run.round_folder(terms.round_number) / FOLDER
        with explain_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_codes(folder / "codes.npy", encoded.codes)
        kept = KeptNumbers(state_sha256=state_sha256, terms_sha256=terms.digest.hex(), numbers=told)
        write_atomic(folder / "numbers.json", canonical_json(kept.model_dump(mode="json")))
        session = SiteSession(
            self._identity,
            self._identities,
            terms.to_bytes(),
            _open_codes(folder),
            policy=self.cohort(policy),
        )
        self._keep(folder, session)
        return session.advertise(), told

    def kept(
        self, run: RunJournal, terms: RoundTerms, policy: SitePolicy | None, state_sha256: str
    ) -> tuple[bytes, dict[str, Any]] | None:
        """Return keys and numbers of a round whose update is fixed already, or None.

        Raises:
            Refused: the request is for another update than the one that is fixed.
        """
        folder = run.round_folder(terms.round_number) / FOLDER
        if not (folder / "session.bin").exists():
            return None
        try:
            kept = KeptNumbers.model_validate_json((folder / "numbers.json").read_bytes())
        except (OSError, ValidationError):
            kept = None
        if kept is None or (kept.state_sha256, kept.terms_sha256) != (
            state_sha256,
            terms.digest.hex(),
        ):
            raise Refused(
                "stale",
                f"round {terms.round_number} of this run has an update of this site already; only "
                "one can be masked in a round",
            )
        return self._open(run, terms.round_number, policy).advertise(), dict(kept.numbers)

    def terms_of(self, run: RunJournal, round_number: int, policy: SitePolicy | None) -> RoundTerms:
        """Return the terms of a round that has begun.

        Raises:
            ProtocolError: it has not.
        """
        return self._open(run, round_number, policy).terms

    def answer(
        self,
        run: RunJournal,
        round_number: int,
        policy: SitePolicy | None,
        step: SecureStep,
        message: bytes,
    ) -> dict[str, Payload]:
        """Return the payloads that answer one step, after the session was kept.

        Raises:
            ProtocolError: the message is refused, or the round has not begun.
        """
        session = self._open(run, round_number, policy)
        folder = run.round_folder(round_number) / FOLDER
        before = session.snapshot()
        parts: dict[str, bytes] = {}
        if step == "mask":
            chunks = session.mask_input(message)
            if session.snapshot() != before:
                self._keep(folder, session)
            parts = {CHUNK.format(number): chunk for number, chunk in enumerate(chunks)}
        else:
            act = {
                "share_keys": session.share_keys,
                "survivors": session.sign_survivors,
                "unmask": session.unmask,
            }[step]
            parts[MESSAGE] = act(message)
            if session.snapshot() != before:
                self._keep(folder, session)
        return {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}

    def _open(self, run: RunJournal, round_number: int, policy: SitePolicy | None) -> SiteSession:
        folder = run.round_folder(round_number) / FOLDER
        if self._session is not None and self._session[0] == folder:
            return self._session[1]
        try:
            snapshot = (folder / "session.bin").read_bytes()
        except OSError:
            raise ProtocolError(
                f"this site has no masked update for round {round_number} of this run"
            ) from None
        session = SiteSession.resume(
            self._identity,
            self._identities,
            snapshot,
            _open_codes(folder),
            policy=self.cohort(policy),
        )
        if session.terms.run_id.hex() != run.run_id:
            raise ProtocolError(f"round {round_number} of this run has the session of another run")
        self._session = folder, session
        return session

    def _keep(self, folder: Path, session: SiteSession) -> None:
        write_atomic(folder / "session.bin", session.snapshot())
        self._session = folder, session


def _read_identities(site: Site, own: Identity) -> dict[str, bytes]:
    for name, key in site.identities.items():
        if not PUBLIC_KEY.fullmatch(key):
            raise InputError(
                f"identities.{name}={key[:80]!r} is not accepted (expected the site's public "
                "key, 64 hexadecimal digits)"
            )
    others = {name: bytes.fromhex(key) for name, key in site.identities.items()}
    return {**others, site.name: own.public_bytes}


def _write_codes(path: Path, codes: NDArray[np.int64]) -> None:
    """Write codes as int32, which holds all that ``value_bits`` allows; atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with explain_disk_errors(path):
        with partial.open("wb") as file:
            np.save(file, codes.astype("<i4"), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _open_codes(folder: Path) -> NDArray[np.signedinteger[Any]]:
    try:
        codes: NDArray[np.signedinteger[Any]] = np.load(
            folder / "codes.npy", mmap_mode="r", allow_pickle=False
        )
    except (OSError, ValueError, EOFError) as error:
        raise ProtocolError(f"the masked update of this round is damaged: {error}") from None
    return codes
