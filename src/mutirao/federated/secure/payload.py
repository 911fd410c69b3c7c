"""The one update of a session, fixed by a hash of each chunk before a key is made.

Shapes: N values of the update, C values of a chunk.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError
from mutirao.federated.secure.terms import RoundTerms

Integers = NDArray[np.signedinteger[Any]]


class Payload:
    """An update that fits the terms and cannot be changed unnoticed.

    Args:
        codes: (N,) signed integers; may be a memory map, of which one chunk at a time is read.
        terms: of the round.

    Raises:
        UpdateError: another size or type, or a value beyond the clip.
    """

    def __init__(self, codes: Integers, terms: RoundTerms) -> None:
        if codes.shape != (terms.num_values,) or codes.dtype.kind != "i":
            raise UpdateError(
                f"the update is {codes.dtype} of shape {codes.shape} (expected signed integers of "
                f"shape ({terms.num_values},))"
            )
        self._codes, self._terms = codes, terms
        self._digests = tuple(map(self._check_chunk, range(terms.num_chunks)))

    @property
    def digest(self) -> bytes:
        """SHA-256 that fixes the whole update."""
        return hashlib.sha256(b"".join(self._digests)).digest()

    def residues(self, chunk: int) -> NDArray[Any]:
        """Return a chunk as words that wrap: a negative code is its two's complement.

        Args:
            chunk: which, from 0.

        Returns:
            (C,) of ``terms.word``, not yet reduced to the modulus.

        Raises:
            UpdateError: it is not what it was.
        """
        codes = self._read(chunk)
        if _digest(codes) != self._digests[chunk]:
            raise UpdateError(
                "the update was changed during the round; only one update can be masked with "
                "this round's keys"
            )
        return codes.view(np.uint64).astype(self._terms.word)

    def _check_chunk(self, chunk: int) -> bytes:
        codes, most = self._read(chunk), self._terms.fixed_point.largest_code
        if int(codes.max()) > most or int(codes.min()) < -most:
            raise UpdateError(f"the update has a code beyond ± {most}; encode it with the terms")
        return _digest(codes)

    def _read(self, chunk: int) -> NDArray[np.int64]:
        start, end = self._terms.chunk_range(chunk)
        return self._codes[start:end].astype("<i8")


def _digest(codes: NDArray[np.int64]) -> bytes:
    return hashlib.sha256(codes.data).digest()
