"""What the parts of the probe share: how often things are timed, and what is made of the times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mutirao.inference.machine import memory_limits

ROUNDS = 5
SHORT_REPETITIONS = 20
"""Of what takes less than a millisecond."""
MAX_SECONDS = 5.0
"""Of the kernels, and of the disk: after that no new round is begun."""


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the range between the quartiles over it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / median


def lower_quartile(values: Sequence[float]) -> float:
    """Return a value that a quarter of the others are below: of what can only be disturbed."""
    return sorted(values)[len(values) // 4]


def room_bytes() -> int:
    """Return the memory that the probe may take: where there is little, a part of it."""
    return memory_limits().available_bytes // 4
