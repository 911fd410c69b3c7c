"""Comparing fitted forms on runs that none of them saw.

Each form is scored by the median absolute relative error of its central estimate and by how often
its 95 % interval holds the measurement, whose own error widens the interval. Differences between
forms are paired: whole runs are drawn with replacement, and both forms are scored on the same draw.
Forms, split and predictions should be settled before the held-out runs are made; that is a matter
of procedure, which no function can see to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError
from mutirao.precision.fit import Predictor
from mutirao.precision.rows import Measurement, select_significant

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FormScore:
    """How well one form did."""

    name: str
    median_error: float
    """Median of |predicted - measured| / measured."""
    coverage: float
    """Share of rows that lie within their 95 % interval."""


@dataclass(frozen=True)
class PairedDifference:
    """Median error of the first form minus that of the second; below zero the first is better."""

    first: str
    second: str
    difference: float
    low: float
    """Of the 95 % bootstrap interval."""
    high: float
    first_is_better: float
    """Share of bootstrap samples in which the first has the smaller error, ties as half."""


@dataclass(frozen=True)
class Comparison:
    """All forms, best first, and all pairs of them."""

    scores: tuple[FormScore, ...]
    differences: tuple[PairedDifference, ...]
    num_rows: int
    num_dropped: int
    """Held-out rows without a significant degradation."""
    num_runs: int


def compare_forms(
    fits: Sequence[Predictor],
    held_out: Sequence[Measurement],
    *,
    extrapolate_factor: float = 1.0,
    min_significance: float = 5.0,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Score fitted forms on held-out rows.

    Args:
        fits: fitted forms, of different names.
        held_out: measurements of other runs.
        extrapolate_factor: how many times past the calibrated N and D they may lie.
        min_significance: standard errors that a degradation must have, as in ``FitConfig``.
        num_resamples: bootstrap samples of runs.
        seed: of the bootstrap.

    Raises:
        InputError: two fits have one name, or no row is significant.
        OutOfRangeError: a row is outside a fit's calibrated range.
    """
    names = [fit.form.name for fit in fits]
    if len(set(names)) < len(names):
        raise InputError(f"forms {', '.join(names)} are not all different; compare each once")
    rows, num_dropped = select_significant(held_out, min_significance)
    if not rows:
        raise InputError(f"none of {len(held_out)} held-out rows has a significant degradation")
    errors: dict[str, Floats] = {}
    scores = []
    for fit in fits:
        errors[fit.form.name], is_covered = _judge(fit, rows, extrapolate_factor)
        median = float(np.median(errors[fit.form.name]))
        scores.append(FormScore(fit.form.name, median, float(is_covered.mean())))
    runs = _rows_by_run(rows)
    return Comparison(
        scores=tuple(sorted(scores, key=lambda score: score.median_error)),
        differences=_differences(errors, runs, num_resamples, seed),
        num_rows=len(rows),
        num_dropped=num_dropped,
        num_runs=len(runs),
    )


def _judge(
    fit: Predictor, rows: Sequence[Measurement], extrapolate_factor: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return absolute relative errors, and which rows lie within their interval."""
    measured = np.array([row.degradation for row in rows])
    predictions = [
        fit.predict(
            row.query, extrapolate_factor=extrapolate_factor, relative_error=row.relative_error
        )
        for row in rows
    ]
    means, lows, highs = np.array([(each.mean, each.low, each.high) for each in predictions]).T
    return np.abs(means - measured) / measured, (lows <= measured) & (measured <= highs)


def _rows_by_run(rows: Sequence[Measurement]) -> list[NDArray[np.int64]]:
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.run, []).append(index)
    return [np.array(indices) for indices in found.values()]


def _differences(
    errors: Mapping[str, Floats], runs: list[NDArray[np.int64]], num_resamples: int, seed: int
) -> tuple[PairedDifference, ...]:
    rng = np.random.default_rng(seed)
    medians: dict[str, list[float]] = {name: [] for name in errors}
    for _ in range(num_resamples):
        drawn = np.concatenate([runs[run] for run in rng.integers(len(runs), size=len(runs))])
        for name, each in errors.items():
            medians[name].append(float(np.median(each[drawn])))
    found = []
    for first, second in combinations(errors, 2):
        gaps = np.array(medians[first]) - np.array(medians[second])
        low, high = np.quantile(gaps, [0.025, 0.975])
        found.append(
            PairedDifference(
                first,
                second,
                difference=float(np.median(errors[first]) - np.median(errors[second])),
                low=float(low),
                high=float(high),
                first_is_better=float(np.mean(gaps < 0) + np.mean(gaps == 0) / 2),
            )
        )
    return tuple(found)
