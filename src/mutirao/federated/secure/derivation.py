"""Keys and commitments from secrets: HKDF-SHA256 with a label for each purpose.

HKDF is RFC 5869 as ``cryptography`` has it. What a key is for, and in which round and
between which sites, is in its info field; parts are framed by their lengths, so that no
two lists of parts give the same bytes.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
_DOMAIN = b"mutirao secure aggregation v1"


def hkdf_sha256(secret: bytes, *, salt: bytes | None, info: bytes, num_bytes: int) -> bytes:
    """Return RFC 5869's output keying material.

    Args:
        secret: input keying material.
        salt: non-secret randomness, or None for zeros.
        info: what the output is for.
        num_bytes: length of the output, at most 8,160.
    """
    return HKDF(algorithm=SHA256(), length=num_bytes, salt=salt, info=info).derive(secret)


def frame(*parts: bytes) -> bytes:
    """Join parts, each after its length, under the protocol's name."""
    framed = (len(part).to_bytes(8, "little") + part for part in (_DOMAIN, *parts))
    return b"".join(framed)


def derive_key(secret: bytes, label: bytes, *context: bytes) -> bytes:
    """Return a 32-byte key for one purpose in one context.

    Args:
        secret: uniformly random, or the result of a key agreement.
        label: the purpose.
        context: the round, the sites.
    """
    return hkdf_sha256(secret, salt=None, info=frame(label, *context), num_bytes=KEY_BYTES)


def commit(label: bytes, secret: bytes, *context: bytes) -> bytes:
    """Return a hash that fixes a secret of 256 random bits without telling it."""
    return hashlib.sha256(frame(label, secret, *context)).digest()
