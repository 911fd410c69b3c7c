"""The messages of secure aggregation: one frozen dataclass for each kind.

                 from     to      says
    Advert       site     server  my two public keys of this round, signed
    Directory    server   sites   everyone's adverts
    Deal         site     server  my shares, one encrypted pair for each site
    Shares       server   site    the pairs that were dealt to you
    MaskedChunk  site     server  a stretch of my masked update
    Survivors    server   sites   whose updates came, and whose did not
    Consent      site     server  my signature under that list
    Consents     server   sites   everyone's signatures
    Reveal       site     server  one share of each site's secrets, never both

Reading checks form only: sizes, ranges, order, round. Whether a message may be answered
is for ``site``, ``server`` and ``agreement`` to say. Sites are numbers, their places in
the terms.

Shapes: C values of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.secure.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES
from mutirao.federated.secure.sealing import SEALED_BYTES
from mutirao.federated.secure.shares import SHARE_BYTES
from mutirao.federated.secure.terms import RoundTerms
from mutirao.federated.secure.wire import (
    DIGEST_BYTES,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Kind,
    Reader,
    open_message,
    pack_index,
    pack_indices,
    write_header,
)

CHUNK_NUMBER_BYTES = 4


class Message:
    """What all kinds share: the header before the body, and nothing after it."""

    kind: ClassVar[Kind]

    def body(self) -> bytes:
        """Return what follows the header."""
        raise NotImplementedError

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        """Read what follows the header."""
        raise NotImplementedError

    @classmethod
    def limit_bytes(cls, terms: RoundTerms) -> int:
        """Return the longest that such a message may be."""
        return MAX_CONTROL_BYTES

    def to_bytes(self, terms: RoundTerms) -> bytes:
        """Return the message as it travels."""
        return write_header(self.kind, terms.digest) + self.body()

    @classmethod
    def from_bytes(cls, data: bytes, terms: RoundTerms) -> Self:
        """Read a message of this kind and round.

        Raises:
            ProtocolError: it is anything else.
        """
        reader = open_message(data, cls.kind, terms.digest, cls.limit_bytes(terms))
        message = cls.read(reader, terms)
        reader.finish()
        return message


class SiteMessage(Message):
    """A message that a site sends; it begins with the sender's number."""

    sender: int


@dataclass(frozen=True)
class Advert(SiteMessage):
    """A site's public keys of one round."""

    kind: ClassVar[Kind] = Kind.ADVERT
    sender: int
    """Whose they are."""
    seal_key: bytes
    """X25519: to encrypt shares for the site."""
    mask_key: bytes
    """X25519: to agree on pairwise masks."""
    signature: bytes
    """Of the site's identity, under terms, sender and keys."""

    def body(self) -> bytes:
        return pack_index(self.sender) + self.seal_key + self.mask_key + self.signature

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        return cls(
            sender=reader.index(len(terms.sites)),
            seal_key=reader.take(PUBLIC_KEY_BYTES),
            mask_key=reader.take(PUBLIC_KEY_BYTES),
            signature=reader.take(SIGNATURE_BYTES),
        )


@dataclass(frozen=True)
class Directory(Message):
    """The adverts of all who take part."""

    kind: ClassVar[Kind] = Kind.DIRECTORY
    adverts: tuple[Advert, ...]
    """In the order of their senders."""

    @property
    def members(self) -> tuple[int, ...]:
        """The numbers of those who take part."""
        return tuple(advert.sender for advert in self.adverts)

    def body(self) -> bytes:
        return pack_index(len(self.adverts)) + b"".join(each.body() for each in self.adverts)

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        count = reader.count(len(terms.sites))
        directory = cls(tuple(Advert.read(reader, terms) for _ in range(count)))
        reader.check_rising(directory.members)
        return directory


@dataclass(frozen=True)
class SealedShares:
    """A dealer's two shares for one site, and the hashes that fix them."""

    peer: int
    """The recipient on the way to the server, the dealer on the way from it."""
    sealed: bytes
    """Both shares, encrypted for the recipient."""
    seed_digest: bytes
    """Of the share of the dealer's seed."""
    key_digest: bytes
    """Of the share of the dealer's private mask key."""

    def body(self) -> bytes:
        """Return the fields as they travel."""
        return pack_index(self.peer) + self.sealed + self.seed_digest + self.key_digest

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> SealedShares:
        """Read the fields."""
        return cls(
            peer=reader.index(len(terms.sites)),
            sealed=reader.take(SEALED_BYTES),
            seed_digest=reader.take(DIGEST_BYTES),
            key_digest=reader.take(DIGEST_BYTES),
        )


def _read_sealed(reader: Reader, terms: RoundTerms) -> tuple[SealedShares, ...]:
    count = reader.count(len(terms.sites))
    items = tuple(SealedShares.read(reader, terms) for _ in range(count))
    reader.check_rising([item.peer for item in items])
    return items


def _pack_sealed(items: tuple[SealedShares, ...]) -> bytes:
    return pack_index(len(items)) + b"".join(item.body() for item in items)


@dataclass(frozen=True)
class Deal(SiteMessage):
    """A dealer's shares for every site of the directory, itself included."""

    kind: ClassVar[Kind] = Kind.DEAL
    sender: int
    """The dealer."""
    seed_digest: bytes
    """Fixes the dealer's seed."""
    items: tuple[SealedShares, ...]
    """In the order of the recipients."""

    def body(self) -> bytes:
        return pack_index(self.sender) + self.seed_digest + _pack_sealed(self.items)

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        sender = reader.index(len(terms.sites))
        return cls(sender, reader.take(DIGEST_BYTES), _read_sealed(reader, terms))


@dataclass(frozen=True)
class Shares(Message):
    """What all dealers dealt to one site."""

    kind: ClassVar[Kind] = Kind.SHARES
    recipient: int
    """Whom they are for."""
    items: tuple[SealedShares, ...]
    """In the order of the dealers."""

    @property
    def dealers(self) -> tuple[int, ...]:
        """The numbers of those who dealt."""
        return tuple(item.peer for item in self.items)

    def body(self) -> bytes:
        return pack_index(self.recipient) + _pack_sealed(self.items)

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        return cls(reader.index(len(terms.sites)), _read_sealed(reader, terms))


@dataclass(frozen=True)
class MaskedChunk(SiteMessage):
    """A stretch of a site's masked update."""

    kind: ClassVar[Kind] = Kind.MASKED_CHUNK
    sender: int
    """Whose it is."""
    chunk: int
    """Which stretch, from 0."""
    packed: bytes
    """Its values, in as few whole bytes each as hold the modulus."""

    def body(self) -> bytes:
        return (
            pack_index(self.sender) + self.chunk.to_bytes(CHUNK_NUMBER_BYTES, "little")
        ) + self.packed

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        sender, chunk = reader.index(len(terms.sites)), reader.number(CHUNK_NUMBER_BYTES)
        if chunk >= terms.num_chunks:
            raise reader.error(f"it has chunk {chunk} (expected 0 to {terms.num_chunks - 1})")
        start, end = terms.chunk_range(chunk)
        packed = reader.take((end - start) * terms.value_bytes)
        if terms.modulus_bits % 8 and _largest_top_byte(packed, terms) >> terms.modulus_bits % 8:
            raise reader.error(f"it has values of more than {terms.modulus_bits} bits")
        return cls(sender, chunk, packed)

    @classmethod
    def limit_bytes(cls, terms: RoundTerms) -> int:
        """Return the size of a full chunk."""
        values_bytes = min(terms.chunk_values, terms.num_values) * terms.value_bytes
        return HEADER_BYTES + len(pack_index(0)) + CHUNK_NUMBER_BYTES + values_bytes


def _largest_top_byte(packed: bytes, terms: RoundTerms) -> int:
    return int(np.frombuffer(packed, np.uint8)[terms.value_bytes - 1 :: terms.value_bytes].max())


def pack_values(values: NDArray[Any], terms: RoundTerms) -> bytes:
    """Cut words to as few whole bytes as hold the modulus.

    Args:
        values: (C,) words of ``terms.word``, below the modulus.
        terms: of the round.
    """
    octets = values.view(np.uint8).reshape(values.size, values.dtype.itemsize)
    return octets[:, : terms.value_bytes].tobytes()


def unpack_values(packed: bytes, terms: RoundTerms) -> NDArray[Any]:
    """Return the words that ``pack_values`` cut.

    Args:
        packed: C values of ``terms.value_bytes`` bytes.
        terms: of the round.

    Returns:
        (C,) words of ``terms.word``.
    """
    octets = np.frombuffer(packed, np.uint8).reshape(-1, terms.value_bytes)
    words = np.zeros((octets.shape[0], terms.word.itemsize), np.uint8)
    words[:, : terms.value_bytes] = octets
    return words.reshape(-1).view(terms.word)


@dataclass(frozen=True)
class Survivors(Message):
    """Whose masked updates came whole, and who dealt shares but sent none."""

    kind: ClassVar[Kind] = Kind.SURVIVORS
    survivors: tuple[int, ...]
    """Those whose updates will be added up."""
    dropped: tuple[int, ...]
    """Those whose pairwise masks have to be taken off."""

    def body(self) -> bytes:
        return pack_indices(self.survivors) + pack_indices(self.dropped)

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        return cls(reader.indices(len(terms.sites)), reader.indices(len(terms.sites)))


@dataclass(frozen=True)
class Consent(SiteMessage):
    """A site's signature under the list of survivors."""

    kind: ClassVar[Kind] = Kind.CONSENT
    sender: int
    """Whose it is."""
    signature: bytes
    """Of the site's identity; what it covers is in ``agreement``."""

    def body(self) -> bytes:
        return pack_index(self.sender) + self.signature

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        return cls(reader.index(len(terms.sites)), reader.take(SIGNATURE_BYTES))


@dataclass(frozen=True)
class Consents(Message):
    """The list of survivors once more, with the signatures under it."""

    kind: ClassVar[Kind] = Kind.CONSENTS
    survivors: Survivors
    """What was signed."""
    consents: tuple[Consent, ...]
    """In the order of the signers."""

    def body(self) -> bytes:
        signatures = b"".join(consent.body() for consent in self.consents)
        return self.survivors.body() + pack_index(len(self.consents)) + signatures

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        survivors = Survivors.read(reader, terms)
        count = reader.count(len(terms.sites))
        consents = tuple(Consent.read(reader, terms) for _ in range(count))
        reader.check_rising([consent.sender for consent in consents])
        return cls(survivors, consents)


@dataclass(frozen=True)
class Reveal(SiteMessage):
    """A site's shares: of the seeds of survivors, of the mask keys of those who dropped."""

    kind: ClassVar[Kind] = Kind.REVEAL
    sender: int
    """Whose answer it is."""
    seed_shares: tuple[tuple[int, bytes], ...]
    """Pairs of a survivor and the share of its seed."""
    key_shares: tuple[tuple[int, bytes], ...]
    """Pairs of one who dropped and the share of its private mask key."""

    def body(self) -> bytes:
        return pack_index(self.sender) + b"".join(
            pack_index(len(shares)) + b"".join(pack_index(owner) + share for owner, share in shares)
            for shares in (self.seed_shares, self.key_shares)
        )

    @classmethod
    def read(cls, reader: Reader, terms: RoundTerms) -> Self:
        sender = reader.index(len(terms.sites))
        return cls(sender, _read_owned(reader, terms), _read_owned(reader, terms))


def _read_owned(reader: Reader, terms: RoundTerms) -> tuple[tuple[int, bytes], ...]:
    count = reader.count(len(terms.sites))
    shares = tuple((reader.index(len(terms.sites)), reader.take(SHARE_BYTES)) for _ in range(count))
    reader.check_rising([owner for owner, _ in shares])
    return shares
