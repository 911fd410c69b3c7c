"""Membership inference: was this record learned from?

A record that a model was trained on tends to have a lower loss. The attacker ranks records
by it (Yeom et al. 2018, arXiv:1709.01604), better by the loss relative to a model that has
not seen the record (Watson et al. 2022, arXiv:2111.08440), best by a likelihood ratio from
models with and without it (LiRA, Carlini et al. 2022, arXiv:2112.03570). The area under the
curve is an average over records; what counts for the few that are found out is the true
positive rate at a low false positive rate, which needs many non-members to be measured.

Members and non-members must come from one distribution, by a random split: otherwise it is
the distribution that is told apart. Training shadow models is left to the caller.

Shapes: N records, S shadow models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mutirao.config import Config
from mutirao.errors import DataError, InputError
from mutirao.evaluate.losses import TextResult
from mutirao.evaluate.privacy.intervals import clopper_pearson

Vector = NDArray[np.float64]


class TruePositiveRate(Config):
    """How many members are found when few others are accused."""

    asked_false_positive_rate: float
    """Share of non-members that may be accused."""
    num_false_positives: int
    """Non-members that are accused; fewer than allowed where scores tie."""
    rate: float
    """Share of the members that are found."""
    low: float
    """Lower end of its 95 % Clopper-Pearson interval, the threshold taken as given."""
    high: float
    """Upper end."""


class MembershipResult(Config):
    """How well scores tell members from non-members."""

    num_members: int
    """Records that were trained on."""
    num_others: int
    """Records that were not."""
    auc: float
    """Probability that a random member scores higher than a random other; ties count half."""
    auc_low: float
    """Lower end of its 95 % bootstrap interval."""
    auc_high: float
    """Upper end."""
    rates: tuple[TruePositiveRate, ...]
    """One for each false positive rate that was asked for."""


def loss_scores(target: TextResult) -> Vector:
    """Score by the model's loss alone: (N,) minus nats per token."""
    return np.asarray(-_per_token(target), np.float64)


def calibrated_scores(target: TextResult, reference: TextResult) -> Vector:
    """Score by how much lower the loss is than that of a model which has not seen the record.

    Args:
        target: the attacked model on the records.
        reference: another model on the same records, for example the one that training
            started from.

    Returns:
        (N,) nats per token.

    Raises:
        DataError: the two are not of the same records.
    """
    if target.record_tokens != reference.record_tokens:
        raise DataError(
            f"losses of {len(target.record_tokens)} and {len(reference.record_tokens)} records "
            "cannot be compared (expected the same records, encoded by the same tokenizer)"
        )
    return _per_token(reference) - _per_token(target)


def likelihood_ratio_scores(
    target_N: ArrayLike, shadows_SN: ArrayLike, is_in_SN: ArrayLike
) -> Vector:
    """Score by the log-likelihood ratio 'in' to 'out', each normal (LiRA, online).

    The two deviations are the same for all records, which is better with few shadows
    (Carlini et al. 2022, section VI-C).

    Args:
        target_N: (N,) statistic of the attacked model, such as minus its loss.
        shadows_SN: (S, N) the same of shadow models.
        is_in_SN: (S, N) which shadow was trained on which record.

    Returns:
        (N,) nats.

    Raises:
        DataError: shapes do not fit, or a record lacks two shadows with and two without it.
    """
    target = np.asarray(target_N, np.float64)
    shadows, is_in = np.asarray(shadows_SN, np.float64), np.asarray(is_in_SN, bool)
    if shadows.ndim != 2 or shadows.shape != is_in.shape or shadows.shape[1:] != target.shape:
        raise DataError(
            f"statistics of shapes {target.shape}, {shadows.shape} and {is_in.shape} do not fit "
            "(expected (N,), (S, N) and (S, N))"
        )
    ratio = np.zeros_like(target)
    for sign, chosen in ((1, is_in), (-1, ~is_in)):
        num = chosen.sum(axis=0)
        if num.size == 0 or num.min() < 2:
            raise DataError(
                "a record has fewer than two shadow models with it, or without it; train more, "
                "each on a random half"
            )
        mean = np.where(chosen, shadows, 0.0).sum(axis=0) / num
        squares = np.where(chosen, (shadows - mean) ** 2, 0.0).sum()
        deviation = max(math.sqrt(squares / float((num - 1).sum())), 1e-12)
        ratio += sign * (-0.5 * ((target - mean) / deviation) ** 2 - math.log(deviation))
    return ratio


def evaluate_membership(
    members: ArrayLike,
    others: ArrayLike,
    *,
    false_positive_rates: Sequence[float] = (0.01,),
    num_resamples: int = 1000,
    seed: int = 0,
) -> MembershipResult:
    """Measure how well scores tell members from others.

    Args:
        members: scores of records that were trained on; what is high points to a member.
        others: scores of records of the same distribution that were not.
        false_positive_rates: at which true positive rates are wanted.
        num_resamples: of the bootstrap, records drawn anew within each group.
        seed: of the bootstrap.

    Raises:
        DataError: a group is empty or a score is not finite, or there are too few others for
            a rate: at least one of them has to be allowed to be accused.
        InputError: a false positive rate does not lie between 0 and 1.
    """
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if inside.ndim != 1 or outside.ndim != 1 or not len(inside) or not len(outside):
        raise DataError("membership needs scores of at least one member and one other record")
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise DataError("a membership score is not finite; the attacked model may have diverged")
    rates = tuple(_rate_at(inside, outside, asked) for asked in false_positive_rates)
    rng = np.random.default_rng(seed)
    areas = [
        _area(rng.choice(inside, len(inside)), rng.choice(outside, len(outside)))
        for _ in range(num_resamples)
    ]
    low, high = np.quantile(areas, [0.025, 0.975])
    return MembershipResult(
        num_members=len(inside),
        num_others=len(outside),
        auc=_area(inside, outside),
        auc_low=float(low),
        auc_high=float(high),
        rates=rates,
    )


def _rate_at(inside: Vector, outside: Vector, asked: float) -> TruePositiveRate:
    if not 0 < asked < 1:
        raise InputError(f"false positive rate {asked:g} (expected a number between 0 and 1)")
    num_allowed = math.floor(asked * len(outside) + 1e-9)
    if num_allowed < 1:
        raise DataError(
            f"a true positive rate at {asked:.3%} false positives cannot be measured on "
            f"{len(outside)} non-members (expected at least {math.ceil(1 / asked)})"
        )
    # Accused is who lies above the first non-member that may not be.
    threshold = np.sort(outside)[::-1][num_allowed] if num_allowed < len(outside) else -math.inf
    num_found = int((inside > threshold).sum())
    low, high = clopper_pearson(num_found, len(inside))
    return TruePositiveRate(
        asked_false_positive_rate=asked,
        num_false_positives=int((outside > threshold).sum()),
        rate=num_found / len(inside),
        low=low,
        high=high,
    )


def _area(inside: Vector, outside: Vector) -> float:
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left")
    up_to = np.searchsorted(ordered, inside, "right")
    return float((below + up_to).mean() / (2 * len(outside)))


def _per_token(result: TextResult) -> Vector:
    losses = np.asarray(result.record_losses, np.float64)
    return np.asarray(losses / np.asarray(result.record_tokens), np.float64)
