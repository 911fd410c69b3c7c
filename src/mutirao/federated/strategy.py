"""The outer step: how sites' updates become the next global state.

FedAvg (McMahan et al. 2017, arXiv:1602.05629), weighted by training tokens, with an
optional Nesterov momentum on the mean update as in DiLoCo (Douillard et al. 2023,
arXiv:2311.08105). Updates are folded in the order of the sites' names, in float64, so
that the result does not depend on who answered first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError


@dataclass(frozen=True)
class WeightedUpdate:
    """One site's decoded update."""

    values: NDArray[np.float32]
    """(N,) change of the global state that the site proposes."""
    weight: float
    """Its weight in the mean, > 0: training tokens."""


def mean_update(updates: Mapping[str, WeightedUpdate]) -> NDArray[np.float64]:
    """Return the weighted mean of the sites' updates.

    Args:
        updates: by site name; all of one length.

    Returns:
        (N,) float64.

    Raises:
        UpdateError: there is none, lengths differ, or weights are not positive.
    """
    if not updates:
        raise UpdateError("no site sent an update in this round")
    sizes = {update.values.shape for update in updates.values()}
    if len(sizes) != 1:
        raise UpdateError(f"the sites' updates have different shapes: {sorted(sizes)}")
    total = np.zeros(next(iter(sizes)), np.float64)
    total_weight = 0.0
    for name in sorted(updates):
        update = updates[name]
        if not (np.isfinite(update.weight) and update.weight > 0):
            raise UpdateError(f"site {name} sent the weight {update.weight} (expected more than 0)")
        total += update.weight * update.values.astype(np.float64)
        total_weight += update.weight
    return total / total_weight


def outer_step(
    state: NDArray[np.float32],
    momentum: NDArray[np.float32],
    mean: NDArray[np.float64],
    *,
    learning_rate: float,
    momentum_decay: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Move the global state along the mean update.

    Args:
        state: (N,) global state.
        momentum: (N,) momentum of earlier rounds; zeros at first.
        mean: (N,) weighted mean update.
        learning_rate: outer learning rate.
        momentum_decay: Nesterov momentum, 0 for none.

    Returns:
        The new state and the new momentum, float32.

    Raises:
        UpdateError: the step leads out of float32; the state must not be kept.
    """
    velocity = momentum_decay * momentum.astype(np.float64) + mean
    step = mean + momentum_decay * velocity if momentum_decay > 0 else mean
    new_state = state.astype(np.float64) + learning_rate * step
    with np.errstate(over="ignore"):
        result = new_state.astype(np.float32), velocity.astype(np.float32)
    if not all(np.isfinite(each).all() for each in result):
        raise UpdateError("this round's updates lead to values too large for float32")
    return result
