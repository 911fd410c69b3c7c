"""The header of every message of secure aggregation, and a reader that trusts nothing.

A message is a header and then fields of a known size, little-endian; counts come first and
are bounded by the terms. There is no general serialization: what is received can name no
type, nest nothing and run nothing. Whatever is cut, too long, out of range or of another
round is refused in one sentence.

    bytes 0–3   b"MTSA"
    byte  4     version of the protocol
    byte  5     kind
    bytes 6–37  SHA-256 of the round's terms; zeros before the terms are known
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise

from mutirao.errors import ProtocolError

MAGIC = b"MTSA"
VERSION = 1
DIGEST_BYTES = 32
HEADER_BYTES = len(MAGIC) + 2 + DIGEST_BYTES
NO_DIGEST = bytes(DIGEST_BYTES)
MAX_CONTROL_BYTES = 2**20
"""Longest message but for masked values; with 1,000 sites the longest has 148 kB."""
INDEX_BYTES = 2


class Kind(IntEnum):
    """What a message is."""

    TERMS = 1
    ADVERT = 2
    DIRECTORY = 3
    DEAL = 4
    SHARES = 5
    MASKED_CHUNK = 6
    SURVIVORS = 7
    CONSENT = 8
    CONSENTS = 9
    REVEAL = 10
    SNAPSHOT = 11

    @property
    def label(self) -> str:
        """The kind in words, for messages to people."""
        return self.name.lower().replace("_", " ")


class Reader:
    """Takes fields from the front of one message."""

    def __init__(self, data: bytes, label: str) -> None:
        self._data = data
        self._label = label
        self._position = 0

    def take(self, num_bytes: int) -> bytes:
        """Return the next bytes.

        Raises:
            ProtocolError: fewer are left.
        """
        end = self._position + num_bytes
        if end > len(self._data):
            raise self.error(f"it ends {end - len(self._data)} bytes early")
        field = self._data[self._position : end]
        self._position = end
        return field

    def number(self, num_bytes: int) -> int:
        """Return the next unsigned integer."""
        return int.from_bytes(self.take(num_bytes), "little")

    def real(self) -> float:
        """Return the next float64; it may be infinite or not a number."""
        value: float = struct.unpack("<d", self.take(8))[0]
        return value

    def index(self, end: int) -> int:
        """Return the next index, below ``end``."""
        value = self.number(INDEX_BYTES)
        if value >= end:
            raise self.error(f"it names the site number {value} (expected 0 to {end - 1})")
        return value

    def count(self, most: int) -> int:
        """Return the next count, at most ``most``."""
        value = self.number(INDEX_BYTES)
        if value > most:
            raise self.error(f"it announces {value} entries (expected at most {most})")
        return value

    def indices(self, end: int) -> tuple[int, ...]:
        """Return a list of indices below ``end``, in rising order and so without doubles."""
        values = tuple(self.index(end) for _ in range(self.count(end)))
        self.check_rising(values)
        return values

    def check_rising(self, values: Sequence[int]) -> None:
        """Refuse a list of sites that is not in rising order.

        Raises:
            ProtocolError: a site comes twice or out of order.
        """
        if any(a >= b for a, b in pairwise(values)):
            raise self.error("it lists sites twice or out of order")

    @property
    def is_finished(self) -> bool:
        """Whether every byte was taken."""
        return self._position == len(self._data)

    def finish(self) -> None:
        """Refuse what follows the last field.

        Raises:
            ProtocolError: there is more.
        """
        if not self.is_finished:
            raise self.error(f"{len(self._data) - self._position} bytes follow its end")

    def error(self, what: str) -> ProtocolError:
        """Return the error that says what is wrong with this message."""
        return ProtocolError(f"the {self._label} message is malformed: {what}")


def write_header(kind: Kind, terms_digest: bytes = NO_DIGEST) -> bytes:
    """Return the first bytes of a message."""
    return MAGIC + bytes([VERSION, kind]) + terms_digest


def open_message(
    data: bytes, kind: Kind, terms_digest: bytes = NO_DIGEST, limit_bytes: int = MAX_CONTROL_BYTES
) -> Reader:
    """Check a message's size and header, and return a reader of what follows.

    Args:
        data: what was received; not trusted.
        kind: what it has to be now.
        terms_digest: of the round it has to belong to.
        limit_bytes: the longest it may be.

    Raises:
        ProtocolError: it is something else, or of another version or round.
    """
    reader = Reader(data, kind.label)
    if not isinstance(data, bytes):
        raise reader.error(f"it came as {type(data).__name__} (expected bytes)")
    if len(data) > limit_bytes:
        raise reader.error(f"it has {len(data)} bytes (expected at most {limit_bytes})")
    if reader.take(len(MAGIC)) != MAGIC:
        raise reader.error("it does not begin with the mark of secure aggregation")
    if (version := reader.number(1)) != VERSION:
        raise ProtocolError(
            f"a message speaks version {version} of secure aggregation (expected {VERSION}); "
            "install the same version of mutirao everywhere"
        )
    if (number := reader.number(1)) != kind:
        came = Kind(number).label if number in list(Kind) else f"number {number}"
        raise ProtocolError(f"a message of kind {came} came where {kind.label} was expected")
    if reader.take(DIGEST_BYTES) != terms_digest:
        raise ProtocolError(f"the {kind.label} message belongs to another run, round or terms")
    return reader


def pack_index(value: int) -> bytes:
    """Return an index or a count as it travels."""
    return value.to_bytes(INDEX_BYTES, "little")


def pack_indices(values: Sequence[int]) -> bytes:
    """Return a list of indices as it travels, its length first."""
    return pack_index(len(values)) + b"".join(pack_index(value) for value in values)
