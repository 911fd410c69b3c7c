"""Masks: ChaCha20 key streams read as unsigned integers, at any offset.

A mask of N values is never held: any stretch of it is made when it is needed, and how the
vector is cut does not change it. Values are 32 or 64 bits wide and wrap, which is exact
modulo 2**k for every k up to that width.

The stream is ChaCha20 of RFC 8439 with a zero nonce: each key is for one mask only. Its
32-bit block counter ends after 256 GiB, which bounds the values of a vector.

Shapes: C values of a stretch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from mutirao.federated.secure.derivation import derive_key
from mutirao.federated.secure.wire import pack_index

BLOCK_BYTES = 64
MAX_STREAM_BYTES = 2**32 * BLOCK_BYTES
_NONCE = bytes(12)


@dataclass(frozen=True)
class Mask:
    """One mask and its sign."""

    key: bytes
    """32 secret bytes, for this mask only."""
    is_added: bool
    """Whether it is added; else it is subtracted."""

    @property
    def opposite(self) -> Mask:
        """The mask that takes this one off."""
        return Mask(self.key, not self.is_added)


def self_mask(seed: bytes, context: bytes) -> Mask:
    """Return the mask that hides a site's update until ``threshold`` others give its seed back.

    Args:
        seed: 32 secret bytes of the site.
        context: hash of the directory of this round's keys.
    """
    return Mask(derive_key(seed, b"self mask", context), is_added=True)


def pair_mask(shared: bytes, context: bytes, site: int, peer: int) -> Mask:
    """Return the mask that a site shares with a peer: the peer's has the other sign.

    Args:
        shared: the secret that the two agreed on.
        context: hash of the directory of this round's keys.
        site: number of the site whose update is masked.
        peer: number of the other.
    """
    low, high = sorted((site, peer))
    key = derive_key(shared, b"pair mask", context, pack_index(low), pack_index(high))
    return Mask(key, is_added=site < peer)


def add_mask(total: NDArray[Any], mask: Mask, start: int) -> None:
    """Add a stretch of a mask to values, in place, wrapping.

    Args:
        total: (C,) uint32 or uint64 values.
        mask: which mask, and its sign.
        start: where the stretch begins, in values.
    """
    width = total.dtype.itemsize
    stream = key_stream(mask.key, start * width, total.size * width)
    values = np.frombuffer(stream, total.dtype)
    if mask.is_added:
        np.add(total, values, out=total)
    else:
        np.subtract(total, values, out=total)


def key_stream(key: bytes, start: int, num_bytes: int) -> bytes:
    """Return a stretch of ChaCha20's key stream.

    Args:
        key: 32 bytes.
        start: offset of the first byte.
        num_bytes: how many.
    """
    assert 0 <= start <= start + num_bytes <= MAX_STREAM_BYTES
    block, skipped = divmod(start, BLOCK_BYTES)
    if num_bytes == 0:
        return b""
    counter_and_nonce = block.to_bytes(4, "little") + _NONCE
    encryptor = Cipher(ChaCha20(key, counter_and_nonce), mode=None).encryptor()
    return encryptor.update(bytes(skipped + num_bytes))[skipped:]
