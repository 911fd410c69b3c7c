"""Verify a site's audit log: which record is the first that is wrong, and how.

Found are records that were altered, removed, put in another order, inserted, or signed with
another key; and an end that was cut off, against the head that the writer leaves beside the
log and against any receipt. What no check of the files alone can find: a log that its owner,
who has the key, writes anew, or whose end goes together with its head. Against that stands a
receipt that somebody else keeps. Nor does a log prove that nothing left past it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mutirao.errors import AuditError, InputError
from mutirao.federated.audit.record import (
    MAX_LINE_BYTES,
    NO_SHA256,
    AuditRecord,
    Head,
    Opening,
    Receipt,
    Release,
    describe_problem,
    has_valid_signature,
    parse_line,
    read_head,
)
from mutirao.federated.identity import parse_public_key, public_hex


@dataclass(frozen=True)
class Fault:
    """What is wrong with a log."""

    sequence: int | None
    """The first record that is wrong or missing; None where that cannot be known."""
    message: str
    """In one sentence."""


@dataclass
class Verification:
    """What a log holds, and whether it is whole."""

    path: Path
    """The log."""
    records: list[AuditRecord] = field(default_factory=list)
    """The good records before the first fault."""
    fault: Fault | None = None
    """The first fault, or None for a whole log."""
    notes: list[str] = field(default_factory=list)
    """What is no fault, but should be known."""
    public_key: str | None = None
    """The key that the log was checked with, in hexadecimal."""

    def require_whole(self) -> None:
        """Go on only with a whole log.

        Raises:
            AuditError: there is a fault.
        """
        if self.fault is not None:
            raise AuditError(f"audit log {self.path}: {self.fault.message}")


@dataclass(frozen=True)
class Totals:
    """Bytes that left a site."""

    per_day: dict[str, int]
    """By day, UTC by the site's clock, 'YYYY-MM-DD'."""
    per_run: dict[str, int]
    """By run."""
    per_kind: dict[str, int]
    """By kind of message."""

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return sum(self.per_kind.values())


def head_path(log: Path) -> Path:
    """Return where the head of a log is kept."""
    return log.parent / f"{log.name}.head.json"


def verify_log(
    path: Path, key: Ed25519PublicKey | None = None, receipts: Sequence[Path] = ()
) -> Verification:
    """Read a log from its first record on and find the first fault.

    Args:
        path: the log; its head is looked for beside it.
        key: the site's public key, known from elsewhere; None takes the one that the log
            itself names, which proves only that all of it was written with one key.
        receipts: heads or receipts that were kept elsewhere.

    Raises:
        InputError: the log or a receipt cannot be read.
        AuditError: a receipt's own signatures are wrong.
    """
    claims = [(str(receipt), _head_of(read_head(receipt))) for receipt in receipts]
    result = Verification(path)
    # The head first: records that are written meanwhile are then only more than it says.
    own_head = _read_own_head(result)
    head_fault = result.fault
    try:
        with path.open("rb") as file:
            _read_chain(result, file, key)
    except OSError as error:
        raise InputError(f"the audit log {path} cannot be read: {error.strerror}") from None
    if not result.records and result.fault is None:
        result.notes.append("it holds no record")
    if own_head is not None:
        claims.append((head_path(path).name, own_head))
    elif head_fault is None and len(result.records) > 1:
        head_fault = _missing_head(result, has_receipt=bool(receipts))
    faults = [_check_claim(result, name, head) for name, head in claims]
    # Of several faults the one at the lowest record is told.
    found = [each for each in (result.fault, *faults, head_fault) if each is not None]
    result.fault = min(found, key=_first_record, default=None)
    return result


def total_bytes(records: Iterable[AuditRecord]) -> Totals:
    """Add up what left, per day, per run and per kind of message."""
    per_day, per_run, per_kind = Counter[str](), Counter[str](), Counter[str]()
    for record in records:
        if isinstance(release := record.entry, Release):
            per_day[record.time[:10]] += release.payload_bytes
            per_run[release.run] += release.payload_bytes
            per_kind[release.kind] += release.payload_bytes
    return Totals(dict(per_day), dict(per_run), dict(per_kind))


def _first_record(fault: Fault) -> float:
    return float("inf") if fault.sequence is None else fault.sequence


def _head_of(found: Head | Receipt) -> Head:
    return found.head if isinstance(found, Receipt) else found


def _read_own_head(result: Verification) -> Head | None:
    """Return the head beside the log; a damaged one is a fault, a missing one not yet."""
    path = head_path(result.path)
    if not path.exists():
        return None
    try:
        return _head_of(read_head(path))
    except (InputError, AuditError) as error:
        result.fault = Fault(None, f"its head was altered: {error}")
        return None


def _missing_head(result: Verification, *, has_receipt: bool) -> Fault | None:
    """A head is there from the first record on; only a log of one may miss it, by a crash."""
    told = f"its head, {head_path(result.path).name}, is not beside it"
    if has_receipt:
        result.notes.append(f"{told}; records after the receipt's may be missing at the end")
        return None
    return Fault(None, f"{told}, so records may be missing at its end")


def _check_claim(result: Verification, name: str, head: Head) -> Fault | None:
    """Compare a head with the good records."""
    records = result.records
    if result.public_key not in (None, head.public_key):
        return Fault(None, f"{name} is signed with another key, {head.public_key}")
    if head.sequence <= len(records):
        record = records[head.sequence - 1]
        if record.sha256 == head.record_sha256:
            return None
        return Fault(head.sequence, f"record {head.sequence} is not the one that {name} names")
    if result.fault is not None and result.fault.sequence is not None:
        return None  # the log is broken before the head's record
    first = len(records) + 1
    return Fault(
        first,
        f"the log was cut after record {len(records)}: record {first} is missing, and {name} "
        f"says that there were {head.sequence}",
    )


def _read_chain(result: Verification, file: BinaryIO, key: Ed25519PublicKey | None) -> None:
    """Fill in the good records and the key, up to the first fault."""
    result.fault = None
    result.public_key = public_hex(key) if key else None
    previous = NO_SHA256
    while line := file.readline(MAX_LINE_BYTES + 1):
        number = len(result.records) + 1
        if len(line) > MAX_LINE_BYTES:
            result.fault = Fault(number, f"record {number} was altered: its line is too long")
            return
        if not line.endswith(b"\n"):
            result.notes.append(
                f"the last line is unfinished ({len(line)} bytes): a process died while it wrote "
                "the record, before anything could leave; the next record will tell"
            )
            return
        try:
            record = parse_line(line[:-1])
        except ValueError as error:
            result.fault = _bad_line(file, number, previous, key, describe_problem(error))
            return
        if key is None and isinstance(record.entry, Opening):
            key = parse_public_key(record.entry.public_key)
            result.public_key = record.entry.public_key
            result.notes.append(
                "checked with the key that the log itself names: give the site's public key, "
                "known from elsewhere, to know whose log it is"
            )
        result.fault = _check_record(result, record, previous, key, file)
        if result.fault is not None:
            return
        result.records.append(record)
        previous = record.sha256


def _check_record(
    result: Verification,
    record: AuditRecord,
    previous: str,
    key: Ed25519PublicKey | None,
    file: BinaryIO,
) -> Fault | None:
    """Return what is wrong with the next record, if anything is."""
    number = len(result.records) + 1
    if key is None:
        return Fault(1, "record 1 is missing: the log does not begin with whose it is")
    if not has_valid_signature(record, key):
        if number == 1 and isinstance(record.entry, Opening):
            named = record.entry.public_key
            if named != public_hex(key) and has_valid_signature(record, parse_public_key(named)):
                return Fault(1, f"record 1 is signed with another key, {named}")
        what = "its content and its signature do not belong together"
        return _bad_line(file, number, previous, key, what)
    if record.sequence != number:
        return _out_of_place(result, record, key, file)
    if record.previous_sha256 != previous:
        return Fault(
            number, f"record {number} does not follow record {number - 1}: it is of another log"
        )
    if isinstance(record.entry, Opening) != (number == 1):
        return Fault(number, f"record {number} is out of place: a log is opened once, at its start")
    return None


def _bad_line(
    file: BinaryIO, number: int, previous: str, key: Ed25519PublicKey | None, what: str
) -> Fault:
    """Say whether a line that is no good record stands in place of one or before it."""
    later = _find_later(file, number, key)
    if later is not None and later.previous_sha256 == previous:
        return Fault(number, f"a line was inserted before record {number}: {what}")
    return Fault(number, f"record {number} was altered: {what}")


def _out_of_place(
    result: Verification, record: AuditRecord, key: Ed25519PublicKey, file: BinaryIO
) -> Fault:
    """Say what happened where a good record stands that has another number."""
    number, found = len(result.records) + 1, record.sequence
    if found < number:
        return Fault(
            number,
            f"record {number} is not in its place: record {found} was inserted there once more",
        )
    if _find_later(file, number, key) is not None:
        return Fault(number, f"the order was changed: record {found} stands before {number}")
    missing = f"record {number} was removed"
    if found > number + 1:
        missing = f"records {number} to {found - 1} were removed"
    return Fault(number, f"{missing}: after record {number - 1} comes {found}")


def _find_later(file: BinaryIO, number: int, key: Ed25519PublicKey | None) -> AuditRecord | None:
    """Return the good record of a number from the rest of the file, or None."""
    while key is not None and (line := file.readline(MAX_LINE_BYTES + 1)):
        try:
            record = parse_line(line.removesuffix(b"\n"))
        except ValueError:
            continue
        if record.sequence == number and has_valid_signature(record, key):
            return record
    return None
