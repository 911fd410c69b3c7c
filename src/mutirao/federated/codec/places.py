"""Top-k: which values of a tensor go, and how their places lie on the wire.

The largest magnitudes go; of equals, those that stand first. Places go in ascending order, in
2 bytes where the tensor has at most 65,536 values and in 4 otherwise. Sending the largest
values only, with error feedback, is Stich et al. 2018, arXiv:1809.07599.

Shapes: N values, K of them kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError


def place_bytes(size: int) -> int:
    """Bytes of one place in a tensor of this many values."""
    return 2 if size <= 2**16 else 4


def select_largest(values_N: NDArray[np.float32], num_kept: int) -> NDArray[np.int64]:
    """Return the places of the largest magnitudes, (K,) ascending.

    Args:
        values_N: (N,) finite values.
        num_kept: how many, at most N.
    """
    if num_kept == 0:
        return np.empty(0, np.int64)
    magnitudes = np.abs(values_N)
    least = np.partition(magnitudes, values_N.size - num_kept)[values_N.size - num_kept]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: num_kept - above.size]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)


def write_places(places_K: NDArray[np.int64], size: int, room: NDArray[np.uint8]) -> None:
    """Write places into a payload's room for them."""
    room.view(f"<u{place_bytes(size)}")[:] = places_K


def read_places(raw: NDArray[np.uint8], size: int, name: str) -> NDArray[np.unsignedinteger]:
    """Return the places that a payload names.

    Args:
        raw: the payload's bytes of them.
        size: values of the whole tensor.
        name: of the tensor, for messages.

    Raises:
        UpdateError: they are not in strictly ascending order within the tensor.
    """
    places: NDArray[np.unsignedinteger] = raw.view(f"<u{place_bytes(size)}")
    if (places[1:] <= places[:-1]).any() or (places.size and int(places[-1]) >= size):
        raise UpdateError(
            f"the payload of tensor {name!r} names places that are not in strictly ascending "
            f"order below {size}"
        )
    return places
