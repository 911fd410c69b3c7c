"""Fitting a form where rows share luck: of their run, their checkpoint, their cell in that run.

log δ is normal around the form; its covariance adds up what rows have in common. How large each
share is, and how far single cells stray from what is common to them, is estimated by the largest
marginal likelihood, each standard deviation with a log-normal prior so that none ends at zero.
Parameters are normal beforehand, so that those given the rows are normal in closed form
(Lindley and Smith 1972, Bayes estimates for the linear model, JRSS B 34(1); Rasmussen and
Williams 2006, Gaussian Processes for Machine Learning, chapter 2.7). A prediction is for a new run:
its interval holds all lucks anew, beside what is not known of the parameters.

Beside ``fit``: no bootstrap over few runs, no Student's t, no Huber's loss, so that a single wild
row pulls. Left out, as there: a form being wrong.

Shapes: R rows, P parameters, S shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]

from mutirao.errors import InputError
from mutirao.precision.fit import Prediction
from mutirao.precision.forms import Form, Prior
from mutirao.precision.regression import Floats
from mutirao.precision.rows import CalibratedRange, Measurement, Query, select_significant

SHARES = ("run", "checkpoint", "cell_of_run", "row")
"""What rows share luck by."""
_TYPICAL = np.log([0.05, 0.05, 0.05, 0.05, 0.1])
"""Medians of the priors of the shares' and the cells' standard deviations (assumption)."""
_LIMITS = (math.log(0.002), math.log(2.0))
"""Between which those standard deviations are sought."""
_FLAT_SD = 10.0
"""Of a parameter without a prior, in log nats."""


@dataclass(frozen=True)
class MixedFit:
    """A form with normal parameters, and the standard deviation of each share of luck."""

    form: Form
    parameters: dict[str, float]
    """Means."""
    covariance: Floats
    """(P, P) of the parameters."""
    spreads: dict[str, float]
    """Standard deviation of log δ by share, and of single cells ('pooled')."""
    num_rows: int
    num_dropped: int
    num_runs: int
    range: CalibratedRange

    def standard_errors(self) -> dict[str, float]:
        """Return the standard deviation of each parameter."""
        return dict(zip(self.parameters, np.sqrt(np.diag(self.covariance)).tolist(), strict=True))

    def predict(
        self, query: Query, *, extrapolate_factor: float = 1.0, relative_error: float = 0.0
    ) -> Prediction:
        """Return the degradation of a run that was not measured; arguments as in ``FittedForm``.

        Raises:
            OutOfRangeError: the query is outside the calibrated range.
            InputError: the form needs something that the query does not tell.
        """
        self.range.check(query, extrapolate_factor)
        terms_P = self.form.coefficients(query, self.parameters)
        center = self.form.offset(query) + float(terms_P @ np.array([*self.parameters.values()]))
        variance = float(terms_P @ self.covariance @ terms_P) + relative_error**2
        variance += sum(self.spreads[share] ** 2 for share in SHARES)
        reach = 1.96 * math.sqrt(variance)
        return Prediction(math.exp(center), math.exp(center - reach), math.exp(center + reach))


@dataclass(frozen=True)
class AveragedFit:
    """Several fits, each as likely as the others (Bates and Granger 1969, The combination of
    forecasts): for forms that err to different sides where they are extrapolated.
    """

    form: Form
    """Its name; what it says is of the parts."""
    parts: tuple[MixedFit, ...]

    @property
    def parameters(self) -> dict[str, float]:
        """Means of all parts' parameters, each after its form's name."""
        return {f"{p.form.name}:{k}": v for p in self.parts for k, v in p.parameters.items()}

    def standard_errors(self) -> dict[str, float]:
        """Return the standard deviation of each."""
        return {f"{p.form.name}:{k}": v for p in self.parts for k, v in p.standard_errors().items()}

    def predict(
        self, query: Query, *, extrapolate_factor: float = 1.0, relative_error: float = 0.0
    ) -> Prediction:
        """Return the geometric mean of what the parts say; arguments as in ``FittedForm``.

        Its variance is the mean of theirs, and what they differ by.
        """
        said = [
            part.predict(
                query, extrapolate_factor=extrapolate_factor, relative_error=relative_error
            )
            for part in self.parts
        ]
        centers = np.log([each.mean for each in said])
        reaches = np.log([each.high / each.mean for each in said])
        center = float(centers.mean())
        reach = math.sqrt(float((reaches**2).mean()) + 1.96**2 * float(centers.var()))
        return Prediction(math.exp(center), math.exp(center - reach), math.exp(center + reach))


def fit_mixed(
    form: Form,
    rows: Sequence[Measurement],
    *,
    priors: Sequence[Prior] = (),
    min_significance: float = 5.0,
) -> MixedFit:
    """Fit a form whose rows share luck.

    Args:
        form: parameters that start with one of its ``pooled`` are drawn towards zero, as much as
            the rows ask for.
        rows: what was measured.
        priors: of some parameters; the others have hardly any.
        min_significance: standard errors that a degradation must have.

    Raises:
        InputError: no row is significant, fewer than two runs, or a prior is of no parameter.
    """
    significant, num_dropped = select_significant(rows, min_significance)
    runs = {row.run for row in significant}
    if len(runs) < 2:
        raise InputError(
            f"{len(significant)} significant rows of {len(runs)} runs do not tell how far runs "
            "differ (expected rows of two runs or more)"
        )
    chosen = form.select(significant)
    model = _Model(form, chosen, priors)
    found = minimize(
        model.cost, _TYPICAL, jac=True, method="L-BFGS-B", bounds=[_LIMITS] * len(_TYPICAL)
    )
    means_P, covariance_PP = model.given_rows(found.x)
    return MixedFit(
        form=form,
        parameters=dict(zip(model.names, means_P.tolist(), strict=True)),
        covariance=covariance_PP,
        spreads=dict(zip((*SHARES, "pooled"), np.exp(found.x).tolist(), strict=True)),
        num_rows=len(significant),
        num_dropped=num_dropped,
        num_runs=len(runs),
        range=CalibratedRange.of(significant),
    )


class _Model:
    """The marginal likelihood of a form's rows, and its parameters given them."""

    def __init__(self, form: Form, rows: list[Measurement], priors: Sequence[Prior]) -> None:
        terms = [form.terms(row.query) for row in rows]
        self.names = sorted({name for each in terms for name in each})
        known = {prior.parameter: prior for prior in priors}
        if strangers := known.keys() - set(self.names):
            raise InputError(
                f"prior of {', '.join(sorted(strangers))}: the form {form.name} has no such "
                f"parameter (expected {', '.join(self.names) or 'none'})"
            )
        self.is_pooled_P = np.array(
            [bool(form.pooled) and name.startswith(form.pooled) for name in self.names]
        )
        self.mean_P = np.array([known[n].mean if n in known else 0.0 for n in self.names])
        self.sd_P = np.array([known[n].sd if n in known else _FLAT_SD for n in self.names])
        self.design_RP = np.array([[each.get(name, 0.0) for name in self.names] for each in terms])
        logs_R = np.array([math.log(row.degradation) - form.offset(row.query) for row in rows])
        self.left_R = logs_R - self.design_RP @ self.mean_P
        self.error_RR = np.diag([row.relative_error**2 for row in rows])
        self.shared_SRR = np.array(
            [_are_equal(keys) for keys in zip(*map(_keys, rows), strict=True)]
        )

    def prior_variance(self, log_sd_S: Floats) -> Floats:
        """Return (P,) that of each parameter."""
        variance_P: Floats = np.where(self.is_pooled_P, np.exp(2 * log_sd_S[-1]), self.sd_P**2)
        return variance_P

    def covariance(self, log_sd_S: Floats) -> Floats:
        """Return (R, R) that of the rows."""
        spread_RP = self.design_RP * self.prior_variance(log_sd_S)
        luck_RR = np.tensordot(np.exp(2 * log_sd_S[:-1]), self.shared_SRR, axes=1)
        total_RR: Floats = spread_RP @ self.design_RP.T + luck_RR + self.error_RR
        return total_RR

    def cost(self, log_sd_S: Floats) -> tuple[float, Floats]:
        """Return what is minimised, and (S,) its slope.

        That is the negative log of likelihood times priors, less constants.
        """
        factor = cho_factor(self.covariance(log_sd_S), lower=True)
        weighted_R = cho_solve(factor, self.left_R)
        cost = self.left_R @ weighted_R / 2 + np.log(np.diag(factor[0])).sum()
        cost += ((log_sd_S - _TYPICAL) ** 2).sum() / 2
        # Half of tr(V⁻¹ dV) - (V⁻¹y)' dV (V⁻¹y), where dV = 2 σ² times who shares.
        steep_RR = cho_solve(factor, np.eye(len(self.left_R))) - np.outer(weighted_R, weighted_R)
        pooled_RP = self.design_RP[:, self.is_pooled_P]
        slope_S = [
            *np.tensordot(self.shared_SRR, steep_RR),
            np.sum(steep_RR @ pooled_RP * pooled_RP),
        ]
        return float(cost), np.exp(2 * log_sd_S) * slope_S + log_sd_S - _TYPICAL

    def given_rows(self, log_sd_S: Floats) -> tuple[Floats, Floats]:
        """Return (P,) means and (P, P) covariance of the parameters."""
        factor = cho_factor(self.covariance(log_sd_S), lower=True)
        prior_P = self.prior_variance(log_sd_S)
        gain_RP = self.design_RP * prior_P
        means_P = self.mean_P + gain_RP.T @ cho_solve(factor, self.left_R)
        covariance_PP = np.diag(prior_P) - gain_RP.T @ cho_solve(factor, gain_RP)
        return means_P, covariance_PP


def _keys(row: Measurement) -> tuple[tuple[object, ...], ...]:
    """Return what a row is known by, share by share."""
    run, tokens, cell = row.run, row.query.num_tokens, row.query.cell
    return (run,), (run, tokens), (run, cell), (run, tokens, cell)


def _are_equal(keys: Sequence[object]) -> Floats:
    return np.array([[first == second for second in keys] for first in keys], dtype=np.float64)
