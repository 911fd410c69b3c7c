"""Outcomes: does a model rank the patients who had one above those who had not?

Ranking is measured by the area under the ROC curve, which needs no threshold and no
calibrated probabilities; calibration itself is not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mutirao.config import Config
from mutirao.data.records import Record
from mutirao.errors import DataError
from mutirao.evaluate.choices import Z_95, score_choices
from mutirao.models.protocol import LanguageModel


class OutcomeResult(Config):
    """How well a model ranks records by a yes/no outcome."""

    num: int
    """Records."""
    num_positive: int
    """Records whose outcome is yes."""
    auroc: float
    """Probability that a random yes is ranked above a random no; ties count half."""
    auroc_low: float
    """Lower end of the 95 % interval."""
    auroc_high: float
    """Upper end of the 95 % interval."""
    scores: tuple[float, ...]
    """Per record: log-odds of yes against no, in nats."""
    labels: tuple[int, ...]
    """Per record: 1 for yes, 0 for no."""


def evaluate_outcomes(
    model: LanguageModel, records: Sequence[Record], *, max_tokens: int = 256
) -> OutcomeResult:
    """Rank records by the log-odds that the model gives to yes.

    Args:
        model: the model.
        records: each with two choices, no first and yes second.
        max_tokens: longest sequence; longer contexts lose their beginning.

    Raises:
        DataError: a record has not two choices, or all outcomes are the same.
    """
    for record in records:
        if len(record.choices) != 2:
            raise DataError(
                f"outcome {record.id} has {len(record.choices)} choices (expected two: no, yes)"
            )
    labels = tuple(record.answer or 0 for record in records)
    _check_classes(labels)
    pairs = score_choices(model, records, max_tokens=max_tokens)
    scores = tuple(float(yes - no) for no, yes in pairs)
    area = auroc(scores, labels)
    low, high = auroc_interval(area, sum(labels), len(labels) - sum(labels))
    return OutcomeResult(
        num=len(labels),
        num_positive=sum(labels),
        auroc=area,
        auroc_low=low,
        auroc_high=high,
        scores=scores,
        labels=labels,
    )


def auroc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Return the area under the ROC curve.

    Args:
        scores: higher means more likely yes.
        labels: 1 for yes, 0 for no.

    Raises:
        DataError: all labels are the same.
    """
    _check_classes(labels)
    values, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    gaps = values[is_positive][:, None] - values[~is_positive][None, :]
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def auroc_interval(area: float, num_positive: int, num_negative: int) -> tuple[float, float]:
    """Return the 95 % interval of an area under the ROC curve.

    It holds the areas from which the measured one is less than 1.96 standard errors away,
    the error being Hanley and McNeil's at that area. Unlike an interval centred on the
    estimate it stays within 0 and 1, and has a width where the estimate is 0 or 1.

    Args:
        area: measured area.
        num_positive: records whose outcome is yes, at least 1.
        num_negative: records whose outcome is no, at least 1.

    References:
        Newcombe 2006, Statistics in Medicine 25, 559-573, method 5.
    """

    def is_compatible(candidate: float) -> bool:
        error_squared = _hanley_mcneil_variance(candidate, num_positive, num_negative)
        return (area - candidate) ** 2 <= Z_95**2 * error_squared

    def boundary(outside: float) -> float:
        inside = area
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_compatible(middle) else (inside, middle)
        return inside

    return boundary(0.0), boundary(1.0)


def _hanley_mcneil_variance(area: float, num_positive: int, num_negative: int) -> float:
    """Variance of an estimated area, both group sizes taken as their mean (Newcombe)."""
    spread = (num_positive + num_negative) / 2 - 1
    factor = 1 + spread * (1 - area) / (2 - area) + spread * area / (1 + area)
    return area * (1 - area) * factor / (num_positive * num_negative)


def _check_classes(labels: Sequence[int]) -> None:
    if len(set(labels)) < 2:
        found = f"{len(labels)} times {labels[0]}" if labels else "none"
        raise DataError(
            f"outcomes cannot be ranked: {found} (expected at least one yes and one no); "
            "evaluate on more records"
        )
