"""The state that all sites hold alike, and its hash.

Coordinator and sites keep the same float32 tensors. What travels is a change of them, encoded;
both sides add what is decoded, never what was meant, so that they stay the same to the bit.
What encoding lost shows up as a difference between the coordinator's own state and this replica,
and goes out with the next change: error feedback without any memory of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.codec import Tensors


def hash_tensors(tensors: Tensors) -> str:
    """Return the sha256 of float32 tensors: names, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        update_hash(digest, name, tensors[name])
    return digest.hexdigest()


def update_hash(digest: hashlib._Hash, name: str, values: NDArray[np.float32]) -> None:
    """Add one tensor to a hash, for those who never hold all tensors at once."""
    digest.update(repr((name, tuple(int(size) for size in values.shape))).encode())
    digest.update(np.ascontiguousarray(values, "<f4").data)


def add_change(state: Tensors, change: Tensors) -> dict[str, NDArray[np.float32]]:
    """Return state plus change, each value rounded once in float32 on every side alike."""
    return {name: np.asarray(state[name] + change[name], np.float32) for name in state}


def shapes_of_state(state: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state's tensors, by name."""
    return {name: tuple(values.shape) for name, values in state.items()}
