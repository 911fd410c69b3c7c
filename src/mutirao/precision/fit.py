"""Fitting a form to measured degradations, and predicting with an interval.

log δ is regressed with Huber's loss, which lets single rows be wrong; priors on parameters are
Gaussian penalties. Rows whose δ is within a few standard errors of zero are dropped, and counted.

Three things make an interval: parameters are uncertain, which a bootstrap over *runs* shows (rows
of one run share its luck, so resampling rows would make intervals far too narrow); runs differ
from each other even if all parameters were known, by the spread of what the fit leaves over; and,
where a measurement is to be predicted, its own error. The range of the rows is kept with the fit,
and a question outside is refused unless a stated factor allows it.

Left out: a form being wrong. An interval knows nothing of what happens past the calibrated range;
``comparison`` on held-out runs does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from mutirao.errors import InputError
from mutirao.precision.forms import Form, Prior, find_form
from mutirao.precision.regression import FitConfig, Floats, Regression
from mutirao.precision.rows import CalibratedRange, Measurement, Query, select_significant

_NUM_NOISES = 201
"""Quantiles of the spread between runs that each resampled prediction is laid out with."""


@dataclass(frozen=True)
class Prediction:
    """A degradation in nats, with a 95 % interval for a new run."""

    mean: float
    """Central estimate: the geometric mean, which is also the median."""
    low: float
    high: float


class Predictor(Protocol):
    """What was fitted, in whatever way; ``FittedForm`` is one."""

    @property
    def form(self) -> Form: ...

    @property
    def parameters(self) -> dict[str, float]: ...

    def standard_errors(self) -> dict[str, float]: ...

    def predict(
        self, query: Query, *, extrapolate_factor: float = 1.0, relative_error: float = 0.0
    ) -> Prediction: ...


@dataclass(frozen=True)
class FittedForm:
    """A form with parameters, what they are worth, and where they hold."""

    form: Form
    parameters: dict[str, float]
    """Fitted values."""
    resampled: Floats
    """(resamples, parameters) fitted to resampled runs."""
    spread: float
    """Standard deviation of log δ between runs, evaluation error taken out."""
    num_rows: int
    num_dropped: int
    """Rows whose degradation was not significant."""
    num_runs: int
    free_runs: int
    """Runs less those that parameters took: the degrees of freedom of ``spread``."""
    range: CalibratedRange

    def standard_errors(self) -> dict[str, float]:
        """Return the bootstrap's standard deviation of each parameter."""
        return dict(zip(self.parameters, self.resampled.std(axis=0, ddof=1).tolist(), strict=True))

    def predict(
        self, query: Query, *, extrapolate_factor: float = 1.0, relative_error: float = 0.0
    ) -> Prediction:
        """Return the degradation of a run that was not measured.

        Args:
            query: the model, and how it is rounded.
            extrapolate_factor: how many times past the calibrated N and D it may lie.
            relative_error: standard error over δ of the measurement that the interval is to be
                held against; 0 for the degradation itself.

        Raises:
            OutOfRangeError: the query is outside the calibrated range.
            InputError: the form needs something that the query does not tell.
        """
        self.range.check(query, extrapolate_factor)
        coefficients = self.form.coefficients(query, self.parameters)
        known = self.form.offset(query)
        center = known + float(coefficients @ np.fromiter(self.parameters.values(), float))
        draws = known + self.resampled @ coefficients
        noise = student_t.ppf((np.arange(_NUM_NOISES) + 0.5) / _NUM_NOISES, df=self.free_runs)
        draws = draws[:, None] + math.hypot(self.spread, relative_error) * noise
        low, high = np.quantile(draws, [0.025, 0.975])
        return Prediction(math.exp(center), math.exp(low), math.exp(high))


def fit_form(
    form: str | Form,
    rows: Sequence[Measurement],
    *,
    priors: Sequence[Prior] = (),
    config: FitConfig | None = None,
) -> FittedForm:
    """Fit a form to measured rows.

    Args:
        form: a name in ``forms.FORMS``, or a form.
        rows: what was measured.
        priors: of some of the form's parameters.
        config: see ``FitConfig``.

    Raises:
        InputError: no row is significant, rows do not determine a parameter, a prior is of none,
            or the form is not known.
    """
    config = config or FitConfig()
    form = find_form(form) if isinstance(form, str) else form
    significant, num_dropped = select_significant(rows, config.min_significance)
    if not significant:
        raise InputError(
            f"none of {len(rows)} rows has a degradation of {config.min_significance:g} standard "
            "errors; evaluate on more tokens, or round to fewer bits"
        )
    regression = Regression.build(form, form.select(significant), priors, config)
    parameters, scale_R, spread = regression.solve()
    return FittedForm(
        form=form,
        parameters=dict(zip(regression.names, parameters.tolist(), strict=True)),
        resampled=regression.resample(parameters, scale_R),
        spread=spread,
        num_rows=len(significant),
        num_dropped=num_dropped,
        num_runs=regression.num_runs,
        free_runs=regression.free_runs,
        range=CalibratedRange.of(significant),
    )
