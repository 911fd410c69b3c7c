"""What one line of a site's audit log is: its fields, its one form in bytes, its signature.

A record is one line of canonical JSON: sorted keys, no spaces, UTF-8. It holds the sha256 of
the line before it, and the signature of the site's Ed25519 key (RFC 8032) over its other
fields; so the hash of a line covers its signature, and the hash of the last line all lines.
Any other form of the same content is refused, which leaves nothing to alter unnoticed.
``audit_log`` writes records, ``audit_check`` verifies them.

The head says how long the log is and ends in which hash, signed by the site. A receipt is a
head that the coordinator signed as well, having kept it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from mutirao import __version__
from mutirao.artifact import canonical_json
from mutirao.config import Config
from mutirao.errors import AuditError, InputError
from mutirao.federated.identity import parse_public_key, public_hex

NO_SHA256 = "0" * 64
"""What the first record holds for the record before it."""
ERROR_KIND = "error"
"""Kind of a message that says why there is no update."""
MAX_LINE_BYTES = 16_777_216
"""Longest line that is read: 16 MiB, the names of some 200,000 tensors (assumption)."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern="^[0-9a-f]{128}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]

# A signature of one purpose must not pass for one of another.
_RECORD_PURPOSE = b"mutirao audit record 1\0"
_HEAD_PURPOSE = b"mutirao audit head 1\0"
_RECEIPT_PURPOSE = b"mutirao audit receipt 1\0"
_NOT_CANONICAL = ("not in canonical form",)
_TOO_DEEP = ("nested too deep",)


class Mask(Config):
    """Secure aggregation: the payload alone is noise to who receives it."""

    cohort_size: int = Field(ge=1)
    """Sites whose sum is all that can be read."""


class Noise(Config):
    """Differential privacy of what the payload was computed from."""

    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    """Standard deviation of the noise over the clipping norm; 0 is no privacy."""
    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    """L2 norm to which each record's gradient was clipped."""
    epsilon: float = Field(ge=0, allow_inf_nan=False)
    """Spent in this run so far, this round included."""
    delta: float = Field(gt=0, lt=1)
    """Probability with which epsilon may fail."""


class Request(Config):
    """What is to leave a site, as far as that is known before the work is done."""

    run: str = Field(max_length=200)
    """The training it belongs to."""
    round: int | None = Field(ge=0)
    """Round of that run; None where the request did not say."""
    recipient: str = Field(max_length=200)
    """Who gets it."""
    recipient_key: PublicKey | None = None
    """The recipient's public key; None where the connection proves none."""
    recipe_sha256: Sha256 | None = None
    """Hash of the plan that was sent; None where it could not be read."""
    bundle_sha256: Sha256 | None = None
    """Hash of the app bundle that asked; None where Flower does not tell it."""
    kind: str = Field(max_length=200)
    """Kind of message: 'adapter update', ERROR_KIND, …"""
    content: str = Field(default="", max_length=2_000)
    """What is in it, for people."""
    tensors: tuple[str, ...] = ()
    """Names of the model's tensors in it; empty where there are none, or not known yet."""
    codec: str = Field(max_length=200)
    """How tensors are encoded."""
    mask: Mask | None = None
    """Secure aggregation; None for a payload in clear."""
    noise: Noise | None = None
    """Differential privacy; None for a payload without noise."""


class Release(Request):
    """A payload that is about to leave: a request, and the bytes that came of it."""

    event: Literal["release"] = "release"
    """Kind of record."""
    payload_bytes: int = Field(ge=0)
    """Bytes of the payload."""
    payload_sha256: Sha256
    """Hash of the payload."""
    policy_sha256: Sha256 | None = None
    """Hash of the site's policy file that allowed it; None where none was asked."""


class Opening(Config):
    """The first record: whose log this is."""

    event: Literal["opening"] = "opening"
    """Kind of record."""
    site: str
    """The site's name."""
    public_key: PublicKey
    """The key that all records are signed with."""


class TornLine(Config):
    """A line that a dying process left unfinished was moved to a file of its own."""

    event: Literal["torn line"] = "torn line"
    """Kind of record."""
    num_bytes: int = Field(ge=1)
    """Bytes of the unfinished line."""
    sha256: Sha256
    """Their hash."""
    kept_in: str
    """Name of the file, beside the log."""


class AuditRecord(Config):
    """One line of the log."""

    format: Literal[1] = 1
    """Version of this layout."""
    sequence: int = Field(ge=1)
    """Number, from 1, without gaps."""
    time: Time
    """UTC by the site's clock, ISO 8601, in seconds."""
    previous_sha256: Sha256
    """Hash of the line before, without its line end; zeros in the first record."""
    entry: Annotated[Release | Opening | TornLine, Field(discriminator="event")]
    """What happened."""
    code_version: str = __version__
    """Version of Mutirão that wrote it."""
    signature: Signature
    """By the site's key, over all other fields."""

    @property
    def sha256(self) -> str:
        """Hash of the record's line."""
        return hashlib.sha256(record_line(self)).hexdigest()


class Head(Config):
    """How far the log goes, signed by the site."""

    format: Literal[1] = 1
    """Version of this layout."""
    public_key: PublicKey
    """The site's key."""
    sequence: int = Field(ge=1)
    """Number of the last record."""
    record_sha256: Sha256
    """Hash of the last record's line."""
    time: Time
    """Time of the last record."""
    signature: Signature
    """By the site's key, over all other fields."""


class Receipt(Config):
    """A head that somebody else signed too, most often the coordinator, who keeps it."""

    head: Head
    """What was signed."""
    witness_key: PublicKey
    """Public key of who signed."""
    witness_signature: Signature
    """Over ``receipt_bytes(head)``."""


M = TypeVar("M", AuditRecord, Head)


def record_line(record: AuditRecord) -> bytes:
    """Return a record's line, without its line end."""
    return canonical_json(record.model_dump(mode="json"))


def parse_line(line: bytes) -> AuditRecord:
    """Return the record of a line, which is not verified here.

    Raises:
        ValueError: it is not a record, or not in its one form.
    """
    try:
        record = AuditRecord.model_validate(json.loads(line))
    except RecursionError:
        raise ValueError(*_TOO_DEEP) from None
    if record_line(record) != line:
        raise ValueError(*_NOT_CANONICAL)
    return record


def sign_record(key: Ed25519PrivateKey, unsigned: AuditRecord) -> AuditRecord:
    """Return a record with the site's signature in place of the one it has."""
    return _sign(key, unsigned, _RECORD_PURPOSE)


def has_valid_signature(record: AuditRecord, key: Ed25519PublicKey) -> bool:
    """Whether a record was signed with this key as it is."""
    return _is_signed(record, key, _RECORD_PURPOSE)


def make_head(key: Ed25519PrivateKey, record: AuditRecord) -> Head:
    """Return the signed head of a log that ends in a record."""
    unsigned = Head(
        public_key=public_hex(key),
        sequence=record.sequence,
        record_sha256=record.sha256,
        time=record.time,
        signature="0" * 128,
    )
    return _sign(key, unsigned, _HEAD_PURPOSE)


def receipt_bytes(head: Head) -> bytes:
    """Return the bytes that a coordinator signs to say that it has seen, and kept, a head."""
    return _RECEIPT_PURPOSE + canonical_json(head.model_dump(mode="json"))


def countersign(head: Head, key: Ed25519PrivateKey) -> Receipt:
    """Return a head with the signature of somebody who keeps it.

    Raises:
        AuditError: the head is not signed by the site that it names.
    """
    check_head(head)
    signature = key.sign(receipt_bytes(head)).hex()
    return Receipt(head=head, witness_key=public_hex(key), witness_signature=signature)


def check_head(head: Head) -> None:
    """Check a head's own signature.

    Raises:
        AuditError: it is not by the key that the head names.
    """
    if not _is_signed(head, parse_public_key(head.public_key), _HEAD_PURPOSE):
        raise AuditError(f"the head of record {head.sequence} is not signed by the key it names")


def check_receipt(receipt: Receipt) -> None:
    """Check both signatures of a receipt; whose key the witness's is, the reader must know.

    Raises:
        AuditError: one of them is wrong.
    """
    check_head(receipt.head)
    witness = parse_public_key(receipt.witness_key)
    if not _verifies(witness, receipt.witness_signature, receipt_bytes(receipt.head)):
        raise AuditError(
            f"the receipt of record {receipt.head.sequence} is not signed by the witness it names"
        )


def read_head(path: Path) -> Head | Receipt:
    """Read a head or a receipt, and check its signatures.

    Raises:
        InputError: the file is missing, or is neither.
        AuditError: a signature is wrong.
    """
    try:
        document = json.loads(path.read_bytes())
        is_receipt = isinstance(document, dict) and "head" in document
        found = (Receipt if is_receipt else Head).model_validate(document)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not the head of an audit log, nor a receipt of one") from None
    if isinstance(found, Receipt):
        check_receipt(found)
    else:
        check_head(found)
    return found


def describe_problem(error: ValueError) -> str:
    """Return in a few words why a line is not a record; what the line says comes escaped."""
    if isinstance(error, ValidationError):
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        return f"its field {where[:80]!r} is wrong" if where else "it is not a JSON object"
    return f"it is {error}" if error.args in (_NOT_CANONICAL, _TOO_DEEP) else "it is not JSON"


def _sign(key: Ed25519PrivateKey, unsigned: M, purpose: bytes) -> M:
    signature = key.sign(_signed_bytes(unsigned, purpose)).hex()
    return unsigned.model_copy(update={"signature": signature})


def _is_signed(signed: AuditRecord | Head, key: Ed25519PublicKey, purpose: bytes) -> bool:
    return _verifies(key, signed.signature, _signed_bytes(signed, purpose))


def _signed_bytes(signed: AuditRecord | Head, purpose: bytes) -> bytes:
    return purpose + canonical_json(signed.model_dump(mode="json", exclude={"signature"}))


def _verifies(key: Ed25519PublicKey, signature: str, message: bytes) -> bool:
    try:
        key.verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        return False
    return True
