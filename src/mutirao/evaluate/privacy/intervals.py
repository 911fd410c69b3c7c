"""Exact binomial intervals, which stay honest for few trials and for counts of zero.

Small enough to do without a statistics library at run time; tests hold it against one.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError


def binomial_masses(num: int, share: float) -> NDArray[np.float64]:
    """Return the probabilities of 0 to ``num`` successes.

    Args:
        num: trials, at least 0.
        share: probability of a success, from 0 to 1.
    """
    if share in (0.0, 1.0):
        masses = np.zeros(num + 1)
        masses[round(num * share)] = 1.0
        return masses
    k = np.arange(num + 1)
    masses = np.exp(_log_choose(num) + k * math.log(share) + (num - k) * math.log1p(-share))
    return np.asarray(masses, np.float64)


@lru_cache(maxsize=64)
def _log_choose(num: int) -> NDArray[np.float64]:
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    return np.asarray(log_factorial[num] - log_factorial - log_factorial[::-1], np.float64)


def clopper_pearson(num_right: int, num: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share, both ends together with ``confidence``.

    Each end alone holds with (1 + confidence) / 2.

    Args:
        num_right: successes.
        num: trials, at least 1.
        confidence: between 0 and 1.

    Raises:
        InputError: the counts are not a share, or the confidence is not accepted.

    References:
        Clopper and Pearson 1934, Biometrika 26, 404-413.
    """
    if not 0 <= num_right <= num or num < 1:
        raise InputError(f"{num_right} of {num} is no share (expected at least one trial)")
    check_confidence(confidence)
    tail = (1 - confidence) / 2

    def at_least(share: float) -> float:
        return float(binomial_masses(num, share)[num_right:].sum())

    def at_most(share: float) -> float:
        return float(binomial_masses(num, share)[: num_right + 1].sum())

    low, high = 0.0, 1.0
    if num_right > 0:
        inside, outside = num_right / num, 0.0
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if at_least(middle) > tail else (inside, middle)
        low = outside
    if num_right < num:
        inside, outside = num_right / num, 1.0
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if at_most(middle) > tail else (inside, middle)
        high = outside
    return low, high


def check_confidence(confidence: float) -> None:
    """Refuse what is no confidence.

    Raises:
        InputError: it does not lie between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence:g} (expected a number between 0 and 1)")
