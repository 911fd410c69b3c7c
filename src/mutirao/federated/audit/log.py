"""A site's own log of everything that leaves it: append-only, chained by hash, signed.

A record is on the disk before its payload may leave; so after a crash the log can tell of
something that did not leave in the end, never the other way round. Appending takes a lock on
the file (flock), so that the records of several processes follow each other. A line that a
dying process left unfinished is moved to a file beside the log, ``LOG.torn-…``, and the next
record says so. Where the log cannot be continued, nothing may leave.

The lock and the order of writes are those of a local file system; network file systems are
not supported. What a verified log proves, and what not, stands in ``audit_check``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mutirao.artifact import write_atomic
from mutirao.errors import AuditError, explain_disk_errors
from mutirao.federated.audit.check import head_path, verify_log
from mutirao.federated.audit.record import (
    NO_SHA256,
    AuditRecord,
    Head,
    Opening,
    Release,
    TornLine,
    has_valid_signature,
    make_head,
    parse_line,
    read_head,
    record_line,
    sign_record,
)
from mutirao.federated.identity import public_hex

LOG_NAME = "audit.jsonl"
PENDING = ".pending"
_READ_BYTES = 65_536

Check = Callable[[Sequence[AuditRecord]], None]


class AuditLog:
    """A site's log, open for appending; any number of processes may have it open."""

    def __init__(self, path: Path, key: Ed25519PrivateKey, *, site: str) -> None:
        self.path = path
        self.site = site
        self._key = key

    def append(self, release: Release, *, check: Check | None = None) -> AuditRecord:
        """Write down what is about to leave; it may leave when this has returned.

        Args:
            release: what leaves, and to whom.
            check: called with all records so far, under the lock; what it raises keeps the
                payload from leaving and from the log. The whole log is verified for it, which
                takes about 0.2 ms a record (16 tensor names each, one core, 2026-11).

        Raises:
            AuditError: the log was altered or cut, or is another site's; nothing may leave.
            DiskFullError: no room; nothing may leave.
        """
        with explain_disk_errors(self.path), self._locked() as file:
            last = self._recover(file)
            if check is not None:
                check(self._verified_records())
            return self._write(file, last, release)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file closes, or we die
            yield file

    def _verified_records(self) -> list[AuditRecord]:
        verification = verify_log(self.path, self._key.public_key())
        verification.require_whole()
        return verification.records

    def _recover(self, file: BinaryIO) -> AuditRecord:
        """Return the last record, with all put in order that a crash left behind."""
        line, rest = _read_end(file)
        last = self._parse_own(line) if line else None
        self._check_head(last)
        if rest and (finished := self._continuation(last, rest)) is not None:
            _write_all(file.fileno(), b"\n")  # only the line end was missing
            os.fsync(file.fileno())
            self._write_head(last := finished)
        elif rest:
            self._keep_aside(file, rest)
        if last is None:
            opening = Opening(site=self.site, public_key=public_hex(self._key))
            last = self._write(file, None, opening)
            _fsync_folder(self.path.parent)
        for pending in self._pending():
            last = self._tell_torn(file, last, pending)
        return last

    def _parse_own(self, line: bytes) -> AuditRecord:
        try:
            record = parse_line(line)
        except ValueError:
            record = None
        if record is None or not has_valid_signature(record, self._key.public_key()):
            self._refuse("its last record was altered, or is not signed with this site's key")
        return record

    def _continuation(self, last: AuditRecord | None, rest: bytes) -> AuditRecord | None:
        """Return the record of an unfinished line, if it is whole and in its place."""
        try:
            record = self._parse_own(rest)
        except AuditError:
            return None
        sequence, previous = (last.sequence, last.sha256) if last else (0, NO_SHA256)
        follows = (record.sequence, record.previous_sha256) == (sequence + 1, previous)
        return record if follows else None

    def _check_head(self, last: AuditRecord | None) -> None:
        """Refuse to go on after a cut; bring a head up to date that a crash left behind."""
        path = head_path(self.path)
        num_records = last.sequence if last else 0
        if not path.exists():
            if num_records > 1:
                self._refuse(f"its head, {path.name}, is missing, so its end may be, too")
            if last is not None:  # killed between the first record and its head
                self._write_head(last)
            return
        head = read_head(path)
        if not isinstance(head, Head) or head.public_key != public_hex(self._key):
            self._refuse(f"its head, {path.name}, is not signed with this site's key alone")
        elif head.sequence > num_records:
            self._refuse(
                f"it was cut after record {num_records}; its head says that there were "
                f"{head.sequence}"
            )
        elif last is not None and head.sequence < num_records:
            self._write_head(last)
        elif last is not None and head.record_sha256 != last.sha256:
            self._refuse("its last record is not the one that its head names")

    def _refuse(self, why: str) -> NoReturn:
        raise AuditError(
            f"audit log {self.path}: {why}; nothing leaves this site until that is cleared up: "
            "see mutirao federate audit"
        )

    def _keep_aside(self, file: BinaryIO, rest: bytes) -> None:
        """Move an unfinished line to a file that waits for its record."""
        name = f"{self.path.name}.torn-{hashlib.sha256(rest).hexdigest()[:16]}{PENDING}"
        write_atomic(self.path.with_name(name), rest)
        os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - len(rest))
        os.fsync(file.fileno())

    def _pending(self) -> list[Path]:
        start = f"{self.path.name}.torn-"
        names = (path for path in self.path.parent.iterdir() if path.name.startswith(start))
        return sorted(path for path in names if path.name.endswith(PENDING))

    def _tell_torn(self, file: BinaryIO, last: AuditRecord, pending: Path) -> AuditRecord:
        """Write the record of a line that was kept aside, which ends its waiting."""
        content = pending.read_bytes()
        kept = pending.with_name(pending.name.removesuffix(PENDING))
        entry = TornLine(
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            kept_in=kept.name,
        )
        record = self._write(file, last, entry)
        pending.replace(kept)  # killed before this, the next append tells of it once more
        return record

    def _write(
        self, file: BinaryIO, last: AuditRecord | None, entry: Release | Opening | TornLine
    ) -> AuditRecord:
        """Append one record and the head that names it, both on the disk on return."""
        unsigned = AuditRecord(
            sequence=last.sequence + 1 if last else 1,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            previous_sha256=last.sha256 if last else NO_SHA256,
            entry=entry,
            signature="0" * 128,
        )
        record = sign_record(self._key, unsigned)
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            _write_all(file.fileno(), record_line(record) + b"\n")
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):  # what cannot be undone now, the next append puts aside
                os.ftruncate(file.fileno(), size_bytes)
            raise
        self._write_head(record)
        return record

    def _write_head(self, record: AuditRecord) -> None:
        write_atomic(head_path(self.path), make_head(self._key, record).model_dump_json())


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_end(file: BinaryIO) -> tuple[bytes, bytes]:
    """Return the last finished line, without its line end, and what stands after it."""
    size_bytes = file.seek(0, os.SEEK_END)
    window = _READ_BYTES
    while True:
        start = max(0, size_bytes - window)
        file.seek(start)
        lines = file.read(size_bytes - start).split(b"\n")
        if start == 0 or len(lines) > 2:
            return (lines[-2] if len(lines) > 1 else b""), lines[-1]
        window *= 2


def _fsync_folder(folder: Path) -> None:
    """Make the name of a new file outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
