"""Lower bounds on ε, from attacks: what a mechanism cannot be better than.

If an attacker tells apart runs with and without a unit better than (ε, δ) allows, then the
mechanism is not (ε, δ)-private, however it was accounted. Two ways to bound ε from below:

- many runs, with and without one unit (Jagielski, Ullman, Oprea 2020, arXiv:2006.07709);
- one run, into which many canaries were put by coin flips (Steinke, Nasr, Jagielski 2023,
  arXiv:2305.08846), far cheaper, and looser.

A bound holds with its confidence, whatever the attack; a weak attack gives a low bound,
which is no evidence of privacy. Neighbours differ by one unit added or removed, as in
``train.accountant``. Left out: bounds by whole trade-off curves (Nasr et al. 2023,
arXiv:2302.07956), which assume the mechanism's shape and are tighter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mutirao.config import Config
from mutirao.errors import DataError, InputError
from mutirao.evaluate.choices import Z_95
from mutirao.evaluate.privacy.intervals import binomial_masses, check_confidence, clopper_pearson

Vector = NDArray[np.float64]

MAX_EPSILON = 64.0
"""No bound is looked for above; 2e27 runs would be needed to find one."""


class EpsilonBound(Config):
    """A lower bound on ε and the counts it rests on."""

    epsilon: float
    """The true ε is at least this, in nats; 0 says nothing."""
    delta: float
    """δ that the bound is for."""
    confidence: float
    """Probability, over runs of the audit, that the bound is right."""
    num_guesses: int
    """Guesses that counted."""
    num_right: int
    """How many of them were right."""


def audit_runs(
    with_unit: ArrayLike, without_unit: ArrayLike, *, delta: float = 0.0, confidence: float = 0.95
) -> EpsilonBound:
    """Bound ε by scores of many independent runs with and without one unit.

    The first half of the runs chooses the threshold, the second half is counted, so that
    the choice costs no confidence.

    Args:
        with_unit: score of each run that had the unit; what is high points to the unit.
        without_unit: score of each run that had not.
        delta: δ, from 0 to below 1.
        confidence: of the bound.

    Raises:
        DataError: there are fewer than four runs of a kind, or a score is not finite.
        InputError: delta or confidence is not accepted.
    """
    present, absent = _scores(with_unit), _scores(without_unit)
    if min(len(present), len(absent)) < 4:
        raise DataError(
            f"{len(present)} runs with the unit and {len(absent)} without cannot be audited "
            "(expected at least four of each, and hundreds for a useful bound)"
        )
    seen_in, counted_in = np.array_split(present, 2)
    seen_out, counted_out = np.array_split(absent, 2)
    threshold = _choose_threshold(seen_in, seen_out, delta)
    num_accused = int((counted_in >= threshold).sum())
    num_wrongly = int((counted_out >= threshold).sum())
    return EpsilonBound(
        epsilon=epsilon_from_counts(
            num_accused, len(counted_in), num_wrongly, len(counted_out), delta, confidence
        ),
        delta=delta,
        confidence=confidence,
        num_guesses=len(counted_in) + len(counted_out),
        num_right=num_accused + len(counted_out) - num_wrongly,
    )


def epsilon_from_counts(
    num_accused: int,
    num_present: int,
    num_wrongly_accused: int,
    num_absent: int,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Return the ε that true and false positives rule out everything below of.

    (ε, δ) allows no test with TPR > e^ε FPR + δ, nor one with TNR > e^ε FNR + δ; both rates
    are put at the unfavourable ends of their exact intervals, which hold together.

    Raises:
        InputError: delta, confidence or a count is not accepted.
    """
    _check_delta(delta)
    low, _ = clopper_pearson(num_accused, num_present, confidence)
    _, high = clopper_pearson(num_wrongly_accused, num_absent, confidence)
    ratios = [(low - delta) / high, (1 - high - delta) / (1 - low)]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0), 0.0)


def audit_one_run(
    scores: ArrayLike,
    is_included: Sequence[bool] | NDArray[np.bool_],
    *,
    num_guesses: int | Sequence[int],
    delta: float = 0.0,
    confidence: float = 0.95,
) -> EpsilonBound:
    """Bound ε by one run whose canaries were each included by a fair coin.

    The canaries with the highest scores are guessed to be in, as many with the lowest to
    be out, and the rest is passed over.

    Args:
        scores: (M,) of each canary; what is high points to it. They may depend on the run's
            outcome in any way, but not on which canaries were included.
        is_included: (M,) what the coins said.
        num_guesses: how many guesses are made, half of them 'in'. If several numbers are
            given, the best one counts and the confidence is corrected for the choice.
        delta: δ, from 0 to below 1.
        confidence: of the bound.

    Raises:
        DataError: there are not as many scores as coins, or one is not finite.
        InputError: a number of guesses, delta or confidence is not accepted.
    """
    values, truth = _scores(scores), np.asarray(is_included, bool)
    if values.shape != truth.shape:
        raise DataError(f"{len(values)} scores came with {len(truth)} coins (expected as many)")
    _check_delta(delta)
    check_confidence(confidence)
    choices = [num_guesses] if isinstance(num_guesses, int) else list(num_guesses)
    if not choices or not all(2 <= choice <= len(values) for choice in choices):
        raise InputError(
            f"num_guesses={choices} is not accepted (expected 2 to {len(values)}, the canaries)"
        )
    order = np.argsort(values, kind="stable")
    level = (1 - confidence) / len(choices)
    bounds = []
    for choice in choices:
        num_in, num_out = choice - choice // 2, choice // 2
        num_right = int(truth[order[len(order) - num_in :]].sum() + (~truth[order[:num_out]]).sum())
        bounds.append(
            EpsilonBound(
                epsilon=one_run_epsilon(len(values), choice, num_right, delta, level),
                delta=delta,
                confidence=confidence,
                num_guesses=choice,
                num_right=num_right,
            )
        )
    return max(bounds, key=lambda bound: bound.epsilon)


def one_run_p_value(
    num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float
) -> float:
    """Return an upper bound on the probability of so many right guesses under (ε, δ).

    References:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2 and appendix D: the
        guesses are no better than binomial with e^ε / (1 + e^ε), but for δ.
    """
    masses = binomial_masses(num_guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(masses[num_right:].sum())
    slack = 0.0
    if num_right and delta:
        below = np.cumsum(masses[:num_right][::-1]) / np.arange(1, num_right + 1)
        slack = 2 * num_canaries * delta * float(below.max())
    return min(1.0, tail + slack)


def one_run_epsilon(
    num_canaries: int, num_guesses: int, num_right: int, delta: float, level: float
) -> float:
    """Return the largest ε found that is rejected at ``level``, 0 where none is.

    Rejecting one ε rejects all smaller ones, since privacy at a smaller ε implies it.
    """

    def is_rejected(epsilon: float) -> bool:
        return one_run_p_value(num_canaries, num_guesses, num_right, epsilon, delta) < level

    if not is_rejected(0.0):
        return 0.0
    low, high = 0.0, MAX_EPSILON
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low


def _choose_threshold(present: Vector, absent: Vector, delta: float) -> float:
    """Return the score from which on to accuse, by Wilson's intervals, which are quick.

    What is chosen here may be poor, never wrong: other runs are counted.
    """
    thresholds = np.unique(np.concatenate([present, absent]))
    low, _ = _wilson(len(present) - np.searchsorted(np.sort(present), thresholds), len(present))
    _, high = _wilson(len(absent) - np.searchsorted(np.sort(absent), thresholds), len(absent))
    ratios = np.maximum((low - delta) / high, (1 - high - delta) / (1 - low))
    return float(thresholds[int(np.argmax(ratios))])


def _wilson(num_right: NDArray[np.int64], num: int) -> tuple[Vector, Vector]:
    """As ``choices.wilson_interval``, for many counts; ends kept off 0 and 1."""
    share, z2 = num_right / num, Z_95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * np.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    least = 1e-3 / num
    return np.maximum(centre - half, least), np.minimum(centre + half, 1 - least)


def _scores(values: ArrayLike) -> Vector:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError("scores of an audit are not finite numbers in a row (expected (N,) floats)")
    return scores


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise InputError(f"delta={delta:g} is not accepted (expected from 0 to below 1)")
