"""A site's lasting identity (Ed25519) and its keys of one round (X25519).

The identity's public half is given to the other sites once, outside this protocol: whoever
distributes it decides who is who, so it must not be the server. Where the private half is
kept is the caller's affair. The keys of a round are derived from 32 secret bytes, which
lets a site that was restarted say the same again.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from mutirao.errors import ProtocolError
from mutirao.federated.secure.derivation import frame

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64


class Identity:
    """A site's name and its signing key."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        self.name = name
        self._private_key = private_key

    @classmethod
    def generate(cls, name: str) -> Identity:
        """Make a new identity."""
        return cls(name, Ed25519PrivateKey.generate())

    @property
    def public_bytes(self) -> bytes:
        """32 bytes that the other sites need."""
        return self._private_key.public_key().public_bytes_raw()

    def sign(self, label: bytes, *parts: bytes) -> bytes:
        """Sign parts for one purpose; the same parts always give the same 64 bytes."""
        return self._private_key.sign(frame(label, *parts))


def verify_signature(public_key: bytes, signature: bytes, label: bytes, *parts: bytes) -> bool:
    """Whether an identity signed these parts for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, frame(label, *parts))
    except (InvalidSignature, ValueError):
        return False
    return True


class RoundKey:
    """An X25519 key pair for one purpose in one round."""

    def __init__(self, private_bytes: bytes) -> None:
        self.private_bytes = private_bytes
        self._private_key = X25519PrivateKey.from_private_bytes(private_bytes)
        self.public_bytes = self._private_key.public_key().public_bytes_raw()

    def agree(self, peer_public: bytes, peer_name: str) -> bytes:
        """Return the 32 bytes that only the two owners can compute.

        Args:
            peer_public: the other's public key; not trusted.
            peer_name: whose it is, for the message.

        Raises:
            ProtocolError: the key is one of the few that make every secret zero.
        """
        try:
            return self._private_key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise ProtocolError(
                f"site {peer_name} advertised a key with which no secret can be agreed"
            ) from None
