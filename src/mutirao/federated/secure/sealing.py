"""A site's two shares of a peer's secrets, encrypted so that the server cannot read them.

ChaCha20-Poly1305 (RFC 8439) under a key that dealer and recipient agree on for this one
message; as the key is used once, the nonce is zero. The dealer also publishes a hash of
each share: the recipient checks them on arrival, the server when a share is revealed, so
that whoever lied can be named. A share is a uniform number of 256 bits, so its hash tells
nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mutirao.errors import ProtocolError
from mutirao.federated.secure.derivation import commit, derive_key
from mutirao.federated.secure.shares import SHARE_BYTES
from mutirao.federated.secure.wire import pack_index

SEALED_BYTES = 2 * SHARE_BYTES + 16
_NONCE = bytes(12)


@dataclass(frozen=True)
class SharePair:
    """What one site holds of another's secrets; it gives away at most one of the two."""

    seed_share: bytes
    """Of the seed of the dealer's self mask."""
    key_share: bytes
    """Of the private key behind the dealer's pairwise masks."""


def seal_key(shared: bytes, context: bytes, dealer: int, recipient: int) -> bytes:
    """Return the key for the one message from dealer to recipient.

    Args:
        shared: the secret that the two agreed on.
        context: hash of the directory of this round's keys.
        dealer: number of the site whose secrets are shared.
        recipient: number of the site that gets the shares.
    """
    return derive_key(shared, b"seal", context, pack_index(dealer), pack_index(recipient))


def seal(pair: SharePair, key: bytes) -> bytes:
    """Encrypt a pair of shares; 82 bytes."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, pair.seed_share + pair.key_share, None)


def unseal(sealed: bytes, key: bytes, dealer_name: str) -> SharePair:
    """Decrypt a pair of shares.

    Args:
        sealed: 82 bytes, through the server; not trusted.
        key: from ``seal_key``.
        dealer_name: for the message.

    Raises:
        ProtocolError: it was altered, or is meant for another site or round.
    """
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise ProtocolError(
            f"the shares from site {dealer_name} were altered on their way, or are not meant "
            "for this site and round"
        ) from None
    return SharePair(plain[:SHARE_BYTES], plain[SHARE_BYTES:])


def seed_share_digest(share: bytes, context: bytes, dealer: int, holder: int) -> bytes:
    """Return the hash that fixes one share of a dealer's seed."""
    return commit(b"seed share", share, context, pack_index(dealer), pack_index(holder))


def key_share_digest(share: bytes, context: bytes, dealer: int, holder: int) -> bytes:
    """Return the hash that fixes one share of a dealer's private key."""
    return commit(b"key share", share, context, pack_index(dealer), pack_index(holder))


def seed_digest(seed: bytes, context: bytes, dealer: int) -> bytes:
    """Return the hash that fixes a dealer's seed."""
    return commit(b"seed", seed, context, pack_index(dealer))
