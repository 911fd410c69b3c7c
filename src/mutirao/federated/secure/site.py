"""A site's part in a round: five answers in a fixed order, for one update only.

    advertise          my keys                    ← the invitation, at construction
    share_keys         my secrets, in shares      ← the directory
    mask_input         my masked update           ← the shares dealt to me
    sign_survivors     my signature               ← whose updates came
    unmask             one share of each site     ← everyone's signatures

The update is fixed before the first key is made. Everything secret is derived from 32
random bytes and from what the server said, so the same question gets the same bytes; a
different question for a step that was answered is refused. So a site that dies can go on
from a snapshot, and never masks a second update with the same keys.

After a refusal the session stands where it stood; whether to go on is the caller's choice.

Shapes: N values of the update.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from mutirao.errors import ProtocolError, UpdateError
from mutirao.federated.secure.agreement import (
    check_consent,
    check_directory,
    check_enough,
    sign_advert,
    sign_consent,
)
from mutirao.federated.secure.derivation import KEY_BYTES, derive_key
from mutirao.federated.secure.keys import Identity, RoundKey
from mutirao.federated.secure.masks import Mask, add_mask, key_stream, pair_mask, self_mask
from mutirao.federated.secure.messages import (
    Consents,
    Deal,
    Directory,
    MaskedChunk,
    Reveal,
    SealedShares,
    Shares,
    Survivors,
    pack_values,
)
from mutirao.federated.secure.payload import Integers, Payload
from mutirao.federated.secure.sealing import (
    SharePair,
    key_share_digest,
    seal,
    seal_key,
    seed_digest,
    seed_share_digest,
    unseal,
)
from mutirao.federated.secure.shares import split_secret
from mutirao.federated.secure.terms import CohortPolicy, RoundTerms
from mutirao.federated.secure.wire import (
    DIGEST_BYTES,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Kind,
    open_message,
    write_header,
)

_STEPS = ("the directory", "the shares", "the survivors", "the signatures")
_LENGTH_BYTES = 4
_MAX_SNAPSHOT_BYTES = 6 * MAX_CONTROL_BYTES


@dataclass(frozen=True)
class _Answered:
    """A question of the server and what the site said."""

    request: bytes
    reply: bytes


class SiteSession:
    """One site in one round.

    Args:
        identity: the site's own.
        identities: public identity of each site, by name, from the site's own file.
        invitation: the server's terms; not trusted.
        codes: (N,) signed integers, the update; may be a memory map, must not change.
        policy: what the site insists on.
        secret: 32 random bytes; only ``resume`` gives them.

    Raises:
        ProtocolError: the terms are malformed, or weaker than the policy allows.
        UpdateError: the update has another size or type, or a value beyond the clip.
    """

    def __init__(
        self,
        identity: Identity,
        identities: Mapping[str, bytes],
        invitation: bytes,
        codes: Integers,
        *,
        policy: CohortPolicy | None = None,
        secret: bytes | None = None,
    ) -> None:
        self.terms = RoundTerms.from_bytes(invitation)
        self.number = self.terms.number_of(identity.name)
        self._policy = policy or CohortPolicy()
        self._policy.check(self.terms, identities)
        self._least = max(self._policy.min_cohort, self.terms.threshold)
        self._identity, self._identities = identity, dict(identities)
        self._payload = Payload(codes, self.terms)
        self._secret = secrets.token_bytes(KEY_BYTES) if secret is None else secret
        self._seal_key = self._derive_round_key(b"seal key")
        self._mask_key = self._derive_round_key(b"mask key")
        self._answered: list[_Answered] = []

    @property
    def payload_digest(self) -> bytes:
        """SHA-256 that fixes the update of this session."""
        return self._payload.digest

    def advertise(self) -> bytes:
        """Return this site's signed keys: the answer to the invitation."""
        advert = sign_advert(self._identity, self.terms, self._seal_key, self._mask_key)
        return advert.to_bytes(self.terms)

    def share_keys(self, request: bytes) -> bytes:
        """Return this site's secrets in encrypted shares: the answer to the directory.

        Raises:
            ProtocolError: the directory is malformed, too short, or has keys that are not
                signed, not this round's, or not distinct; the site is named.
        """
        return self._answer(0, request, self._share_keys)

    def mask_input(self, request: bytes) -> Iterator[bytes]:
        """Yield the masked update, chunk by chunk: the answer to the shares.

        Raises:
            ProtocolError: the shares are malformed, too few, altered, or not what their
                dealer announced; the site is named. Raised before the first chunk.
        """
        self._answer(1, request, self._accept_shares)
        return (self.masked_chunk(chunk) for chunk in range(self.terms.num_chunks))

    def masked_chunk(self, chunk: int) -> bytes:
        """Return one chunk of the masked update, once more if need be.

        Raises:
            ProtocolError: the shares did not come yet.
            UpdateError: the update was changed since the session began.
        """
        self._expect(1)
        total = self._payload.residues(chunk)
        for mask in self._masks:
            add_mask(total, mask, self.terms.chunk_range(chunk)[0])
        total &= self.terms.word.type(2**self.terms.modulus_bits - 1)
        packed = pack_values(total, self.terms)
        return MaskedChunk(self.number, chunk, packed).to_bytes(self.terms)

    def sign_survivors(self, request: bytes) -> bytes:
        """Return this site's signature under the list of survivors.

        Raises:
            ProtocolError: the list is malformed, too short, overlaps with those who
                dropped, leaves someone out, or leaves this site out.
        """
        return self._answer(2, request, self._sign_survivors)

    def unmask(self, request: bytes) -> bytes:
        """Return one share of each site's secrets: the answer to everyone's signatures.

        Raises:
            ProtocolError: the list is not the one this site signed, or too few others did.
        """
        return self._answer(3, request, self._unmask)

    def snapshot(self) -> bytes:
        """Return what the site has to keep, secret, before each answer leaves it."""
        header = write_header(Kind.SNAPSHOT, self.terms.digest)
        requests = [self.terms.to_bytes(), *(answered.request for answered in self._answered)]
        return (header + self._secret + self.payload_digest) + b"".join(
            len(request).to_bytes(_LENGTH_BYTES, "little") + request for request in requests
        )

    @classmethod
    def resume(
        cls,
        identity: Identity,
        identities: Mapping[str, bytes],
        snapshot: bytes,
        codes: Integers,
        *,
        policy: CohortPolicy | None = None,
    ) -> SiteSession:
        """Go on from a snapshot, by answering once more what was asked.

        Raises:
            ProtocolError: the snapshot is damaged, or its terms or requests are refused.
            UpdateError: this is not the update that the session began with.
        """
        digest = snapshot[HEADER_BYTES - DIGEST_BYTES : HEADER_BYTES]
        reader = open_message(snapshot, Kind.SNAPSHOT, digest, _MAX_SNAPSHOT_BYTES)
        secret, payload_digest = reader.take(KEY_BYTES), reader.take(DIGEST_BYTES)
        requests = []
        while not reader.is_finished:
            requests.append(reader.take(reader.number(_LENGTH_BYTES)))
        if not 1 <= len(requests) <= 1 + len(_STEPS):
            raise reader.error(f"it has {len(requests)} requests (expected 1 to 5)")
        session = cls(identity, identities, requests[0], codes, policy=policy, secret=secret)
        if session.terms.digest != digest:
            raise reader.error("its terms are not those it was made for")
        if session.payload_digest != payload_digest:
            raise UpdateError(
                f"site {identity.name} has another update than the one that round "
                f"{session.terms.round_number} began with; it cannot be masked with the same keys"
            )
        steps = session.share_keys, session.mask_input, session.sign_survivors, session.unmask
        for step, request in zip(steps, requests[1:], strict=False):
            step(request)
        return session

    def _answer(self, step: int, request: bytes, make: Callable[[bytes], bytes]) -> bytes:
        """Answer a question once; the same again gets the same bytes, another is refused."""
        if step < len(self._answered):
            answered = self._answered[step]
            if answered.request != request:
                raise ProtocolError(
                    f"the server sent {_STEPS[step]} of round {self.terms.round_number} a second "
                    "time and differently; the first answer stands"
                )
            return answered.reply
        self._expect(step - 1)
        reply = make(request)
        self._answered.append(_Answered(request, reply))
        return reply

    def _expect(self, step: int) -> None:
        if len(self._answered) <= step:
            raise ProtocolError(
                f"the server did not send {_STEPS[len(self._answered)]} yet, which comes first"
            )

    def _derive_round_key(self, label: bytes) -> RoundKey:
        context = self.terms.digest, self._identity.public_bytes
        return RoundKey(derive_key(self._secret, label, *context))

    def _share_keys(self, request: bytes) -> bytes:
        terms = self.terms
        directory = Directory.from_bytes(request, terms)
        check_enough(directory.members, terms, self._least, "are in the directory")
        check_directory(directory, terms, self._identities)
        adverts = {advert.sender: advert for advert in directory.adverts}
        own = adverts.get(self.number)
        if own is None or own.to_bytes(terms) != self.advertise():
            raise ProtocolError("the directory does not have this site's own keys")
        self._adverts, self._context = adverts, hashlib.sha256(request).digest()
        self._seed = derive_key(self._secret, b"seed", self._context)
        pairs = self._split_secrets()
        items = tuple(self._seal(recipient, pairs[recipient]) for recipient in directory.members)
        announced = seed_digest(self._seed, self._context, self.number)
        return Deal(self.number, announced, items).to_bytes(terms)

    def _split_secrets(self) -> list[SharePair]:
        """Return the pair of shares for each site, by number."""
        num_sites, threshold = len(self.terms.sites), self.terms.threshold
        shares = []
        for label, value in ((b"seed", self._seed), (b"key", self._mask_key.private_bytes)):
            key = derive_key(self._secret, b"polynomial", label, self._context)
            random = partial(key_stream, key, 0)
            shares.append(
                split_secret(value, threshold=threshold, num_shares=num_sites, random_bytes=random)
            )
        return [SharePair(*both) for both in zip(*shares, strict=True)]

    def _seal(self, recipient: int, pair: SharePair) -> SealedShares:
        context, dealer = self._context, self.number
        shared = self._agree(self._seal_key, self._adverts[recipient].seal_key, recipient)
        return SealedShares(
            peer=recipient,
            sealed=seal(pair, seal_key(shared, context, dealer, recipient)),
            seed_digest=seed_share_digest(pair.seed_share, context, dealer, recipient),
            key_digest=key_share_digest(pair.key_share, context, dealer, recipient),
        )

    def _agree(self, own: RoundKey, public: bytes, peer: int) -> bytes:
        return own.agree(public, self.terms.sites[peer])

    def _accept_shares(self, request: bytes) -> bytes:
        shares = Shares.from_bytes(request, self.terms)
        if shares.recipient != self.number:
            raise ProtocolError("the shares are for another site")
        self._check_members(shares.dealers, tuple(self._adverts), "dealt shares")
        self._pairs = {item.peer: self._unseal(item) for item in shares.items}
        self._dealers = shares.dealers
        self._masks = self._make_masks()
        return b""  # the masked update is made chunk by chunk

    def _check_members(self, members: tuple[int, ...], known: tuple[int, ...], what: str) -> None:
        """Check that a list has enough sites, this one, and none that was not there before."""
        check_enough(members, self.terms, self._least, what)
        if not set(members) <= set(known):
            added = tuple(member for member in members if member not in known)
            raise ProtocolError(
                f"the server says that {self.terms.names(added)} {what}, whom it left out before"
            )
        if self.number not in members:
            raise ProtocolError(
                f"this site is not among those that {what}; it reveals nothing more in this round"
            )

    def _unseal(self, item: SealedShares) -> SharePair:
        dealer, context = item.peer, self._context
        name = self.terms.sites[dealer]
        shared = self._agree(self._seal_key, self._adverts[dealer].seal_key, dealer)
        pair = unseal(item.sealed, seal_key(shared, context, dealer, self.number), name)
        announced = item.seed_digest, item.key_digest
        if announced != (
            seed_share_digest(pair.seed_share, context, dealer, self.number),
            key_share_digest(pair.key_share, context, dealer, self.number),
        ):
            raise ProtocolError(f"site {name} announced other shares than it dealt to this site")
        return pair

    def _make_masks(self) -> tuple[Mask, ...]:
        masks = [self_mask(self._seed, self._context)]
        for peer in self._dealers:
            if peer != self.number:
                shared = self._agree(self._mask_key, self._adverts[peer].mask_key, peer)
                masks.append(pair_mask(shared, self._context, self.number, peer))
        return tuple(masks)

    def _sign_survivors(self, request: bytes) -> bytes:
        survivors = Survivors.from_bytes(request, self.terms)
        both = set(survivors.survivors) & set(survivors.dropped)
        if both:
            raise ProtocolError(
                f"the server lists {self.terms.names(tuple(sorted(both)))} as survivor and as "
                "dropped; revealing both shares would unmask an update"
            )
        self._check_members(survivors.survivors, self._dealers, "sent their updates")
        if {*survivors.survivors, *survivors.dropped} != {*self._dealers}:
            raise ProtocolError("survivors and dropped together are not those who dealt shares")
        self._survivors = survivors
        return sign_consent(self._identity, self.terms, self._context, survivors).to_bytes(
            self.terms
        )

    def _unmask(self, request: bytes) -> bytes:
        terms, signed = self.terms, self._survivors
        consents = Consents.from_bytes(request, terms)
        if consents.survivors != signed:
            raise ProtocolError("the server shows another list of survivors than this site signed")
        signers = tuple(consent.sender for consent in consents.consents)
        check_enough(signers, terms, terms.threshold, "signed the list of survivors")
        if not set(signers) <= set(signed.survivors):
            raise ProtocolError("the list of survivors is signed by sites that are not on it")
        for consent in consents.consents:
            check_consent(consent, terms, self._context, signed, self._identities)
        return Reveal(
            sender=self.number,
            seed_shares=tuple((owner, self._pairs[owner].seed_share) for owner in signed.survivors),
            key_shares=tuple((owner, self._pairs[owner].key_share) for owner in signed.dropped),
        ).to_bytes(terms)
