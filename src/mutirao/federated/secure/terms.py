"""What everyone agrees on before a round of secure aggregation, and what a site insists on.

The terms come from the server with its invitation. Their hash is in every later message
and under every signature, so that nothing can be carried from one round, run or cohort
into another. A site checks them against its own policy and against the identities in its
own file; it takes neither from the server.

Shapes: N values of an update, C values of a chunk.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import Field

from mutirao.config import Config
from mutirao.errors import InputError, ProtocolError
from mutirao.federated.plan import SITE_NAME
from mutirao.federated.secure.fixed_point import MAX_MODULUS_BITS, FixedPoint
from mutirao.federated.secure.wire import Kind, Reader, open_message, pack_index, write_header

RUN_ID_BYTES = 32
MAX_SITES = 1_000
"""Assumption: far above any consortium; bounds the quadratic number of shares."""
MAX_CHUNK_VALUES = 2**22
DEFAULT_CHUNK_VALUES = 2**18
"""At most 2 MiB of 64-bit values; below Flower's 5 MB pieces."""
MAX_VALUES = 2**35
"""One ChaCha20 key gives 2**32 blocks of 64 bytes (RFC 8439): 2**35 values of 8 bytes."""


def default_threshold(num_sites: int) -> int:
    """Return more than two thirds of the sites: safe if the server and a third of them collude.

    Two different lists of survivors cannot both gather ``threshold`` signatures, as long as
    2 · threshold > sites + colluding sites: each honest site signs once.
    """
    return 2 * num_sites // 3 + 1


@dataclass(frozen=True)
class RoundTerms:
    """One round of secure aggregation.

    Raises:
        InputError: a value is out of range, or the sum could overflow.
    """

    run_id: bytes
    """32 random bytes that name the run."""
    round_number: int
    """From 1."""
    sites: tuple[str, ...]
    """Names of the invited, sorted; a site's number is its place here."""
    threshold: int
    """Sites that must stay to the end; as many shares bring a secret back."""
    modulus_bits: int
    """k: integers are added modulo 2**k, 2 to 64."""
    num_values: int
    """N, values of an update."""
    fixed_point: FixedPoint
    """How floats become integers."""
    chunk_values: int = DEFAULT_CHUNK_VALUES
    """C, values that travel in one message."""

    def __post_init__(self) -> None:
        self._check_sites()
        if len(self.run_id) != RUN_ID_BYTES:
            raise InputError(f"run_id has {len(self.run_id)} bytes (expected {RUN_ID_BYTES})")
        num_sites = len(self.sites)
        _check_range("round_number", self.round_number, 1, 2**32 - 1)
        _check_range("threshold", self.threshold, 2, num_sites)
        _check_range("modulus_bits", self.modulus_bits, 2, MAX_MODULUS_BITS)
        _check_range("num_values", self.num_values, 1, MAX_VALUES)
        _check_range("chunk_values", self.chunk_values, 1, MAX_CHUNK_VALUES)
        _check_range("number of chunks", self.num_chunks, 1, 2**32 - 1)
        self.fixed_point.check_headroom(num_sites, self.modulus_bits)

    def _check_sites(self) -> None:
        _check_range("number of sites", len(self.sites), 2, MAX_SITES)
        if (bad := next((s for s in self.sites if not SITE_NAME.fullmatch(s)), None)) is not None:
            raise InputError(f"site name {bad!r} (expected letters, digits, dot, dash, underscore)")
        if list(self.sites) != sorted(set(self.sites)):
            raise InputError("the terms list sites twice or unsorted (expected each once, sorted)")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the terms as they travel."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """Unsigned type in which masks are drawn and values added."""
        return np.dtype("<u4") if self.modulus_bits <= 32 else np.dtype("<u8")

    @property
    def value_bytes(self) -> int:
        """Bytes of one masked value on the wire."""
        return -(-self.modulus_bits // 8)

    @property
    def num_chunks(self) -> int:
        """Messages in which one masked update travels."""
        return -(-self.num_values // self.chunk_values)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Return where a chunk begins and ends, in values."""
        start = chunk * self.chunk_values
        return start, min(start + self.chunk_values, self.num_values)

    def number_of(self, name: str) -> int:
        """Return a site's number.

        Raises:
            ProtocolError: the terms do not name it.
        """
        if name not in self.sites:
            raise ProtocolError(f"site {name} is not among the sites of this round")
        return self.sites.index(name)

    def names(self, numbers: tuple[int, ...]) -> str:
        """Return sites' names in one line, for messages to people."""
        return ", ".join(self.sites[number] for number in numbers) or "none"

    def to_bytes(self) -> bytes:
        """Return the invitation as it travels."""
        fixed = struct.pack(
            "<IHBQIdd",
            self.round_number,
            self.threshold,
            self.modulus_bits,
            self.num_values,
            self.chunk_values,
            self.fixed_point.clip,
            self.fixed_point.scale,
        )
        names = b"".join(bytes([len(name)]) + name.encode() for name in self.sites)
        return write_header(Kind.TERMS) + self.run_id + fixed + pack_index(len(self.sites)) + names

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundTerms:
        """Read an invitation.

        Raises:
            ProtocolError: it is malformed, or its terms are not acceptable to anyone.
        """
        reader = open_message(data, Kind.TERMS)
        try:
            terms = cls._read(reader)
        except InputError as error:
            raise reader.error(str(error)) from None
        reader.finish()
        return terms

    @classmethod
    def _read(cls, reader: Reader) -> RoundTerms:
        run_id, round_number = reader.take(RUN_ID_BYTES), reader.number(4)
        threshold, modulus_bits = reader.number(2), reader.number(1)
        num_values, chunk_values = reader.number(8), reader.number(4)
        fixed_point = FixedPoint(clip=reader.real(), scale=reader.real())
        names = [reader.take(reader.number(1)) for _ in range(reader.count(MAX_SITES))]
        return cls(
            run_id=run_id,
            round_number=round_number,
            sites=tuple(name.decode("ascii", errors="backslashreplace") for name in names),
            threshold=threshold,
            modulus_bits=modulus_bits,
            num_values=num_values,
            fixed_point=fixed_point,
            chunk_values=chunk_values,
        )


class CohortPolicy(Config):
    """What a site insists on, whatever the server proposes; kept in the site's own file."""

    min_cohort: int = Field(default=3, ge=2)
    """Fewest sites whose updates are added up. With 2, each learns the other's from the sum."""
    max_colluding: int = Field(default=1, ge=0)
    """Sites that may work together with a lying server without seeing more than the sum."""

    def check(self, terms: RoundTerms, identities: Mapping[str, bytes]) -> None:
        """Refuse terms under which this site's update would not be hidden well enough.

        Args:
            terms: the server's.
            identities: public identity of each site that this site knows, by name.

        Raises:
            ProtocolError: an unknown site, too small a cohort or too low a threshold.
        """
        num_sites = len(terms.sites)
        if unknown := [name for name in terms.sites if name not in identities]:
            raise ProtocolError(
                f"the terms name site {unknown[0]}, whose identity is not known here; add its "
                "public key, obtained from the site itself, or leave it out"
            )
        if num_sites < self.min_cohort:
            raise ProtocolError(
                f"the terms name {num_sites} sites (expected at least min_cohort={self.min_cohort})"
            )
        if 2 * terms.threshold <= num_sites + self.max_colluding:
            needed = (num_sites + self.max_colluding) // 2 + 1
            raise ProtocolError(
                f"the terms set the threshold {terms.threshold} for {num_sites} sites; with "
                f"max_colluding={self.max_colluding} it must be at least {needed}"
            )


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InputError(f"{name}={value} (expected {least} to {most})")
