"""The server's part in a round: it passes on what sites say, and ends with their sum.

    invite → receive … → advance (keys) → receive … → advance (shares) → receive … →
    advance (survivors) → receive … → advance (signatures) → receive … → advance → sum_chunks

``receive`` takes one site's message, or refuses it by name and changes nothing; a message
that comes again is taken as the same. ``advance`` goes on without the sites that did not
answer, as long as enough are left; when to stop waiting is the caller's choice. It has no
clock, no sockets and no randomness: the same calls give the same bytes, so a server that
was restarted can be brought back by its caller's journal of them.

A lying server is the sites' concern, not this module's: they check what they are sent.

Shapes: N values of an update, C values of a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FederationError, InputError, ProtocolError
from mutirao.federated.secure.agreement import check_advert, check_consent, check_distinct
from mutirao.federated.secure.masks import Mask, add_mask
from mutirao.federated.secure.messages import (
    Advert,
    Consent,
    Consents,
    Deal,
    Directory,
    MaskedChunk,
    Reveal,
    SealedShares,
    Shares,
    SiteMessage,
    Survivors,
    unpack_values,
)
from mutirao.federated.secure.terms import RoundTerms
from mutirao.federated.secure.unmasking import Transcript, check_reveal, remaining_masks

MIN_COHORT = 3


class Phase(IntEnum):
    """What the server waits for."""

    ADVERTS = 0
    DEALS = 1
    MASKED = 2
    CONSENTS = 3
    REVEALS = 4
    DONE = 5


_KINDS: Mapping[Phase, type[SiteMessage]] = {
    Phase.ADVERTS: Advert,
    Phase.DEALS: Deal,
    Phase.MASKED: MaskedChunk,
    Phase.CONSENTS: Consent,
    Phase.REVEALS: Reveal,
}
_DEEDS = {
    Phase.ADVERTS: "advertised keys",
    Phase.DEALS: "dealt shares",
    Phase.MASKED: "sent a whole masked update",
    Phase.CONSENTS: "signed the list of survivors",
    Phase.REVEALS: "revealed their shares",
}


class AggregationServer:
    """The server in one round.

    Args:
        terms: of the round.
        identities: public identity of each site, by name.
        min_cohort: fewest sites whose updates are added up; sites insist on theirs.
        masked: where packed chunks are kept, by site and chunk; a mapping over files keeps
            them out of memory.

    Raises:
        InputError: an identity is missing.
    """

    def __init__(
        self,
        terms: RoundTerms,
        identities: Mapping[str, bytes],
        *,
        min_cohort: int = MIN_COHORT,
        masked: MutableMapping[tuple[int, int], bytes] | None = None,
    ) -> None:
        if unknown := [name for name in terms.sites if name not in identities]:
            raise InputError(f"the identity of site {unknown[0]} is not known")
        self.terms = terms
        self.phase = Phase.ADVERTS
        self._identities = dict(identities)
        self._least = max(min_cohort, terms.threshold)
        self._masked: MutableMapping[tuple[int, int], bytes] = {} if masked is None else masked
        self._expected = tuple(range(len(terms.sites)))
        self._seen: dict[tuple[int, int], bytes] = {}
        self._adverts: dict[int, Advert] = {}
        self._deals: dict[int, Deal] = {}
        self._num_chunks: dict[int, int] = {}
        self._consents: dict[int, Consent] = {}
        self._reveals: dict[int, Reveal] = {}
        self._remaining: tuple[Mask, ...] = ()

    def invite(self) -> dict[str, bytes]:
        """Return the invitation for each site."""
        return dict.fromkeys(self.terms.sites, self.terms.to_bytes())

    def receive(self, sender: str, data: bytes) -> None:
        """Take one message.

        Args:
            sender: the site's name, as the transport has authenticated it.
            data: what it sent; not trusted.

        Raises:
            ProtocolError: the message is refused; names the site. Nothing was changed.
        """
        try:
            self._receive(self.terms.number_of(sender), data)
        except ProtocolError as error:
            raise ProtocolError(f"site {sender}: {error}") from None

    def answered(self) -> tuple[str, ...]:
        """Return the names of the sites that have done what this phase asks of them."""
        return tuple(self.terms.sites[number] for number in self._finished())

    def advance(self) -> dict[str, bytes]:
        """End this phase, and return what to send to each site that is still there.

        Returns:
            Messages by site name; none after the last phase.

        Raises:
            FederationError: too few sites have answered; one may wait for more.
            ProtocolError: a site dealt shares that fit nothing; names it.
        """
        if self.phase == Phase.DONE:
            raise FederationError("this round of secure aggregation is over; take its sum")
        members = self._finished()
        self._check_enough(members)
        step = {
            Phase.ADVERTS: self._send_directory,
            Phase.DEALS: self._send_shares,
            Phase.MASKED: self._send_survivors,
            Phase.CONSENTS: self._send_consents,
            Phase.REVEALS: self._unmask,
        }[self.phase]
        messages = step(members)
        self._expected, self._seen = members, {}
        self.phase = Phase(self.phase + 1)
        return {self.terms.sites[number]: data for number, data in messages.items()}

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of the sites whose updates are in the sum.

        Raises:
            FederationError: the round is not finished.
        """
        self._expect_done()
        return tuple(self.terms.sites[number] for number in self._survivors.survivors)

    def sum_chunks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the exact sum of the survivors' codes, a chunk at a time.

        Returns:
            Arrays of shape (C,), N values in all.

        Raises:
            FederationError: the round is not finished.
        """
        self._expect_done()
        return map(self._sum_chunk, range(self.terms.num_chunks))

    def _expect_done(self) -> None:
        if self.phase != Phase.DONE:
            raise FederationError("the sum is not known before the last phase of the round")

    def _receive(self, number: int, data: bytes) -> None:
        if self.phase == Phase.DONE:
            raise ProtocolError("the round is over")
        message = _KINDS[self.phase].from_bytes(data, self.terms)
        if message.sender != number:
            raise ProtocolError(f"it speaks for site {self.terms.sites[message.sender]}")
        if number not in self._expected:
            raise ProtocolError("it dropped out of this round before")
        slot = number, message.chunk if isinstance(message, MaskedChunk) else 0
        digest = hashlib.sha256(data).digest()
        if self._seen.get(slot, digest) != digest:
            raise ProtocolError("it sent two different messages for one step")
        if slot not in self._seen:
            self._take(message)
            self._seen[slot] = digest

    def _take(self, message: SiteMessage) -> None:
        """Check a message against the round so far, and keep it."""
        match message:
            case Advert():
                check_advert(message, self.terms, self._identities)
                check_distinct((*self._adverts.values(), message), self.terms)
                self._adverts[message.sender] = message
            case Deal():
                if tuple(item.peer for item in message.items) != self._directory.members:
                    raise ProtocolError("it dealt shares to other sites than the directory has")
                self._deals[message.sender] = message
            case MaskedChunk():
                self._masked[(message.sender, message.chunk)] = message.packed
                self._num_chunks[message.sender] = self._num_chunks.get(message.sender, 0) + 1
            case Consent():
                self._check_consent(message)
                self._consents[message.sender] = message
            case Reveal():
                check_reveal(message, self._transcript)
                self._reveals[message.sender] = message

    def _finished(self) -> tuple[int, ...]:
        num_chunks = self.terms.num_chunks
        whole = [number for number, count in self._num_chunks.items() if count == num_chunks]
        done: dict[Phase, Iterable[int]] = {
            Phase.ADVERTS: self._adverts,
            Phase.DEALS: self._deals,
            Phase.MASKED: whole,
            Phase.CONSENTS: self._consents,
            Phase.REVEALS: self._reveals,
            Phase.DONE: self._reveals,
        }
        return tuple(sorted(done[self.phase]))

    def _check_enough(self, members: tuple[int, ...]) -> None:
        least = self._least if self.phase <= Phase.MASKED else self.terms.threshold
        if len(members) < least:
            missing = tuple(number for number in self._expected if number not in members)
            raise FederationError(
                f"only {len(members)} of {len(self.terms.sites)} sites {_DEEDS[self.phase]} in "
                f"round {self.terms.round_number} (at least {least} are needed; missing: "
                f"{self.terms.names(missing)}); wait for them or begin a new round"
            )

    def _send_directory(self, members: tuple[int, ...]) -> dict[int, bytes]:
        self._directory = Directory(tuple(self._adverts[number] for number in members))
        data = self._directory.to_bytes(self.terms)
        self._context = hashlib.sha256(data).digest()
        return dict.fromkeys(members, data)

    def _send_shares(self, members: tuple[int, ...]) -> dict[int, bytes]:
        self._dealers = members
        dealt = {
            (dealer, item.peer): item for dealer in members for item in self._deals[dealer].items
        }
        return {
            recipient: Shares(
                recipient,
                tuple(_from_dealer(dealer, dealt[(dealer, recipient)]) for dealer in members),
            ).to_bytes(self.terms)
            for recipient in members
        }

    def _send_survivors(self, members: tuple[int, ...]) -> dict[int, bytes]:
        dropped = tuple(number for number in self._dealers if number not in members)
        self._survivors = Survivors(members, dropped)
        for slot in [slot for slot in self._masked if slot[0] in dropped]:
            del self._masked[slot]
        return dict.fromkeys(members, self._survivors.to_bytes(self.terms))

    def _send_consents(self, members: tuple[int, ...]) -> dict[int, bytes]:
        consents = Consents(self._survivors, tuple(self._consents[number] for number in members))
        return dict.fromkeys(members, consents.to_bytes(self.terms))

    def _unmask(self, members: tuple[int, ...]) -> dict[int, bytes]:
        self._remaining = tuple(remaining_masks(self._reveals, self._transcript))
        return {}

    def _check_consent(self, consent: Consent) -> None:
        check_consent(
            consent,
            self.terms,
            self._context,
            self._survivors,
            self._identities,
        )

    @property
    def _transcript(self) -> Transcript:
        return Transcript(self.terms, self._context, self._adverts, self._deals, self._survivors)

    def _sum_chunk(self, chunk: int) -> NDArray[np.int64]:
        start, end = self.terms.chunk_range(chunk)
        total: NDArray[Any] = np.zeros(end - start, self.terms.word)
        for number in self._survivors.survivors:
            total += unpack_values(self._masked[(number, chunk)], self.terms)
        for mask in self._remaining:
            add_mask(total, mask, start)
        return _centre(total, self.terms.modulus_bits)


def _from_dealer(dealer: int, item: SealedShares) -> SealedShares:
    """The same shares, labelled with their dealer in place of their recipient."""
    return SealedShares(dealer, item.sealed, item.seed_digest, item.key_digest)


def _centre(total: NDArray[Any], modulus_bits: int) -> NDArray[np.int64]:
    """Residues modulo 2**k as signed integers, from -2**(k-1) on: shifting copies the sign."""
    unused = 64 - modulus_bits
    shifted = total.astype(np.uint64) << np.uint64(unused)
    signed: NDArray[np.int64] = shifted.view(np.int64) >> np.int64(unused)
    return signed
