"""The server's last step: from the sites' shares to the masks that are still in the sum.

In the sum over the survivors, pairwise masks among them cancel. What stays is each
survivor's self mask, known from its seed, and each survivor's pairwise mask with each site
that dropped, known from the private key of the latter. Every share is compared with the
hash that its dealer announced, every secret with what the dealer announced or advertised:
a sum is exact, or refused with the name of who lied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mutirao.errors import ProtocolError
from mutirao.federated.secure.keys import RoundKey
from mutirao.federated.secure.masks import Mask, pair_mask, self_mask
from mutirao.federated.secure.messages import Advert, Deal, Reveal, Survivors
from mutirao.federated.secure.sealing import key_share_digest, seed_digest, seed_share_digest
from mutirao.federated.secure.shares import recover_secret
from mutirao.federated.secure.terms import RoundTerms


@dataclass(frozen=True)
class Transcript:
    """What the server knows of a round when it unmasks."""

    terms: RoundTerms
    """Of the round."""
    context: bytes
    """Hash of the directory."""
    adverts: Mapping[int, Advert]
    """Public keys, by site."""
    deals: Mapping[int, Deal]
    """What each site announced of its secrets, by site."""
    survivors: Survivors
    """Whose updates are in the sum, and who dropped."""


def check_reveal(reveal: Reveal, transcript: Transcript) -> None:
    """Refuse shares that were not asked for, or are not those that were dealt.

    Raises:
        ProtocolError: says what is wrong with the sender's answer.
    """
    survivors, holder, context = transcript.survivors, reveal.sender, transcript.context
    owners = tuple(owner for owner, _ in reveal.seed_shares)
    dropped = tuple(owner for owner, _ in reveal.key_shares)
    if (owners, dropped) != (survivors.survivors, survivors.dropped):
        raise ProtocolError("it reveals shares of other sites than it was asked for")
    for owner, share in reveal.seed_shares:
        announced = _announced(transcript.deals[owner], holder)[0]
        if seed_share_digest(share, context, owner, holder) != announced:
            raise ProtocolError(
                f"its share for {transcript.terms.sites[owner]} is not the real one"
            )
    for owner, share in reveal.key_shares:
        announced = _announced(transcript.deals[owner], holder)[1]
        if key_share_digest(share, context, owner, holder) != announced:
            raise ProtocolError(
                f"its share for {transcript.terms.sites[owner]} is not the real one"
            )


def remaining_masks(reveals: Mapping[int, Reveal], transcript: Transcript) -> Iterator[Mask]:
    """Yield what has to be added to the survivors' masked sum to unmask it.

    Args:
        reveals: checked answers by site; ``threshold`` of them or more.
        transcript: of the round.

    Raises:
        ProtocolError: a site dealt shares that do not fit what it announced; names it.
    """
    chosen = sorted(reveals)[: transcript.terms.threshold]
    seed_shares = {holder: dict(reveals[holder].seed_shares) for holder in chosen}
    key_shares = {holder: dict(reveals[holder].key_shares) for holder in chosen}
    for owner in transcript.survivors.survivors:
        seed = _recover(
            {holder: seed_shares[holder][owner] for holder in chosen}, owner, transcript
        )
        if seed_digest(seed, transcript.context, owner) != transcript.deals[owner].seed_digest:
            raise _bad_dealer(owner, transcript)
        yield self_mask(seed, transcript.context).opposite
    for owner in transcript.survivors.dropped:
        private = _recover(
            {holder: key_shares[holder][owner] for holder in chosen}, owner, transcript
        )
        key = RoundKey(private)
        if key.public_bytes != transcript.adverts[owner].mask_key:
            raise _bad_dealer(owner, transcript)
        yield from _masks_with(owner, key, transcript)


def _masks_with(dropped: int, key: RoundKey, transcript: Transcript) -> Iterator[Mask]:
    for survivor in transcript.survivors.survivors:
        name = transcript.terms.sites[survivor]
        shared = key.agree(transcript.adverts[survivor].mask_key, name)
        yield pair_mask(shared, transcript.context, survivor, dropped).opposite


def _announced(deal: Deal, holder: int) -> tuple[bytes, bytes]:
    item = next(item for item in deal.items if item.peer == holder)
    return item.seed_digest, item.key_digest


def _recover(shares: Mapping[int, bytes], owner: int, transcript: Transcript) -> bytes:
    try:
        return recover_secret(shares)
    except ProtocolError:
        raise _bad_dealer(owner, transcript) from None


def _bad_dealer(owner: int, transcript: Transcript) -> ProtocolError:
    return ProtocolError(
        f"site {transcript.terms.sites[owner]} dealt shares that do not fit what it announced; "
        "the sum of this round is lost: leave that site out and begin a new round"
    )
