"""The law of one checkpoint: what rounding costs it, from what was measured on it.

    log δ = log C_method + ρ log noise

Noise is that of the checkpoint's own weights (``ways.relative_noise``), so that bits and groups
that were not measured are foretold from those that were. To second order the loss rises in
proportion to the noise, ρ = 1; where the rise is large, that expansion ends, so ρ is fitted, with 1
as its prior, and rises beyond ``LARGEST_RISE`` are left out. Each way counts as one draw: intervals
say how far a way may stray from the law, not how far another checkpoint may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mutirao.advise.measuring import Measured
from mutirao.advise.ways import Way
from mutirao.errors import DataError, OutOfRangeError
from mutirao.precision.fit import FittedForm, Prediction, fit_form
from mutirao.precision.forms import Form, Prior
from mutirao.precision.regression import FitConfig
from mutirao.precision.rows import Measurement, Query

LARGEST_RISE = 1.0
"""Nats per token; a model that lost more is no small step from what it was (assumption)."""
LEAST_ROWS = 4
POWER = Prior("noise_power", mean=1.0, sd=0.3)
"""ρ: 1 by expansion of the loss; its standard deviation is an assumption."""


def _terms(query: Query) -> dict[str, float]:
    assert query.noise is not None
    return {f"log_c[{query.method}]": 1.0, POWER.parameter: math.log(query.noise)}


CHECKPOINT = Form("checkpoint", _terms)


@dataclass(frozen=True)
class CheckpointLaw:
    """The law with its constants, and where it holds."""

    fitted: FittedForm
    noise: tuple[float, float]
    """Range of the noise that was measured with a clear rise."""
    num_left_out: int
    """Ways whose rise was larger than ``LARGEST_RISE``."""

    def predict(self, way: Way, noise: float) -> Prediction:
        """Return the rise of the loss, in nats per token.

        Raises:
            OutOfRangeError: the method was not measured, or noise so small or large was not.
        """
        low, high = self.noise
        if not low / 1.001 <= noise <= high * 1.001:
            raise OutOfRangeError(
                f"{way} adds a noise of {noise:.2g}, which was not calibrated (expected {low:.2g} "
                f"to {high:.2g})"
            )
        return self.fitted.predict(_query(way, noise))


def fit_checkpoint(measured: Sequence[Measured], noises: dict[Way, float]) -> CheckpointLaw:
    """Fit the law to what was measured.

    Args:
        measured: ways and their rises.
        noises: of each way that was measured.

    Raises:
        DataError: too few ways have a clear rise; the message says what to do.
    """
    small = [each for each in measured if each.loss.rise <= LARGEST_RISE]
    clear = [each for each in small if each.is_clear]
    if len(clear) < LEAST_ROWS:
        errors = sorted(each.loss.standard_error for each in measured)
        raise DataError(
            f"only {len(clear)} of {len(measured)} ways of rounding raise the loss by five "
            f"standard errors and at most {LARGEST_RISE:g} nats (at least {LEAST_ROWS} are needed; "
            f"a standard error is {errors[len(errors) // 2]:.2g}); measure on more windows, or at "
            "more bits"
        )
    rows = [
        Measurement(
            _query(each.way, noises[each.way]),
            each.loss.rise,
            each.loss.standard_error,
            run=str(each.way),
        )
        for each in clear
    ]
    found = [noises[each.way] for each in clear]
    return CheckpointLaw(
        fit_form(CHECKPOINT, rows, priors=[POWER], config=FitConfig()),
        (min(found), max(found)),
        len(measured) - len(small),
    )


def _query(way: Way, noise: float) -> Query:
    """Return a question about this checkpoint; its N and D are one value, and enter nowhere."""
    return Query(1.0, 1.0, 1.0, way.method, noise=noise)
