"""Huber regression of log δ with Gaussian priors, and its bootstrap over runs.

The numerical half of ``fit``: it knows arrays, not forms. Rows enter by residuals over their
standard deviation (evaluation error and spread between runs together), whose loss turns from
square to linear at a few of them; priors enter as residuals whose loss stays square.

Shapes: R rows, P parameters.

References:
    Huber 1964, Robust estimation of a location parameter, Annals of Mathematical Statistics 35(1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from mutirao.config import Config
from mutirao.errors import InputError
from mutirao.precision.forms import Form, Prior
from mutirao.precision.rows import Measurement

Floats = NDArray[np.float64]

LEAST_SPREAD = 0.005
"""Smallest spread of log δ between runs that a fit believes (assumption): exact rows would
otherwise have infinite weight."""
_NUM_REWEIGHTINGS = 4
_MAX_REDRAWS = 200


class FitConfig(Config):
    """How a form is fitted."""

    huber_width: float = Field(default=1.5, gt=0)
    """Spreads beyond which a row's pull no longer grows."""
    min_significance: float = Field(default=5.0, ge=0)
    """Standard errors that a degradation must have; rows with less are dropped."""
    num_resamples: int = Field(default=400, ge=20)
    """Bootstrap samples of runs."""
    pooling_sd: float = Field(default=0.1, gt=0)
    """Standard deviation of a cell's exponents around the common ones (assumption)."""
    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True)
class Regression:
    """A regression as arrays: R rows, P parameters."""

    names: list[str]
    design: Floats
    """(R, P) coefficients."""
    target: Floats
    """(R,) log δ without what the form knows."""
    relative_error: Floats
    """(R,) standard error of log δ, by evaluation."""
    run_index: NDArray[np.int64]
    """(R,)"""
    prior_mean: Floats
    """(P,)"""
    prior_weight: Floats
    """(P,) 1 / sd; zero where there is no prior."""
    config: FitConfig

    @classmethod
    def build(
        cls, form: Form, rows: list[Measurement], priors: Sequence[Prior], config: FitConfig
    ) -> Regression:
        """Return the regression of a form on rows.

        Raises:
            InputError: rows do not determine a parameter, or a prior is of none.
        """
        terms = [form.terms(row.query) for row in rows]
        names = sorted({name for each in terms for name in each})
        if strangers := {prior.parameter for prior in priors} - set(names):
            raise InputError(
                f"prior of {', '.join(sorted(strangers))}: the form {form.name} has no such "
                f"parameter (expected {', '.join(names) or 'none'})"
            )
        pooled = [name for name in names if form.pooled and name.startswith(form.pooled)]
        known = {name: Prior(name, 0.0, config.pooling_sd) for name in pooled}
        known |= {prior.parameter: prior for prior in priors}
        runs = sorted({row.run for row in rows})
        regression = cls(
            names=names,
            design=np.array([[each.get(name, 0.0) for name in names] for each in terms]),
            target=np.array([math.log(row.degradation) - form.offset(row.query) for row in rows]),
            relative_error=np.array([row.relative_error for row in rows]),
            run_index=np.array([runs.index(row.run) for row in rows]),
            prior_mean=np.array([known[n].mean if n in known else 0.0 for n in names]),
            prior_weight=np.array([1 / known[n].sd if n in known else 0.0 for n in names]),
            config=config,
        )
        if not regression.is_determined(regression.counts):
            raise InputError(
                f"{len(rows)} rows of {len(runs)} runs do not determine all parameters of the form "
                f"{form.name} ({', '.join(names)}); measure more sizes, or give priors"
            )
        return regression

    @property
    def num_runs(self) -> int:
        """Runs that rows are of."""
        return int(self.run_index.max()) + 1

    @property
    def counts(self) -> Floats:
        """Each row once."""
        return np.ones(len(self.target))

    @property
    def free_runs(self) -> int:
        """Runs less what parameters take of them: the rank that is left of the runs' means."""
        if not self.names:
            return self.num_runs
        means = [self.design[self.run_index == run].mean(axis=0) for run in range(self.num_runs)]
        scaled = np.array(means) / np.linalg.norm(self.design, axis=0)
        return max(self.num_runs - int(np.linalg.matrix_rank(scaled, tol=1e-6)), 1)

    def is_determined(self, counts_R: Floats) -> bool:
        """Whether rows, each so many times, and priors leave no direction free."""
        if not self.names:
            return True
        stacked = np.vstack([self.design[counts_R > 0], np.diag(self.prior_weight)])
        size = np.linalg.norm(stacked, axis=0)
        return bool(
            size.all() and np.linalg.matrix_rank(stacked / size, tol=1e-6) == len(self.names)
        )

    def solve(self) -> tuple[Floats, Floats, float]:
        """Return parameters, what each row's error is measured in, and the spread between runs.

        How much evaluation error counts depends on the spread between runs, which is known only
        after a fit: so it is fitted a few times. Huber's threshold follows the bulk of the rows;
        the spread that intervals use follows all of them.
        """
        parameters, bulk = self.prior_mean, 0.1
        for _ in range(_NUM_REWEIGHTINGS):
            scale_R = np.hypot(bulk, self.relative_error)
            parameters = self.regress(self.counts, scale_R, parameters)
            left_R = self.target - self.design @ parameters
            # 1.4826: a normal's standard deviation over its median magnitude.
            observed = 1.4826 * float(np.median(np.abs(left_R)))
            evaluation = float(np.median(self.relative_error))
            bulk = math.sqrt(max(observed**2 - evaluation**2, LEAST_SPREAD**2))
        free = max(len(left_R) - int((self.prior_weight == 0).sum()), 1)
        variance = float(left_R @ left_R) / free - float(np.mean(self.relative_error**2))
        variance *= self.num_runs / self.free_runs
        return parameters, scale_R, math.sqrt(max(variance, LEAST_SPREAD**2))

    def regress(self, counts_R: Floats, scale_R: Floats, start_P: Floats) -> Floats:
        """Return the parameters with the least Huber loss, penalties of priors added."""
        if not self.names:
            return start_P
        has_prior_P = self.prior_weight > 0
        prior_rows_PP = np.diag(self.prior_weight)[has_prior_P]
        matrix = np.vstack([self.design / scale_R[:, None], prior_rows_PP])
        target = np.concatenate(
            [self.target / scale_R, (self.prior_weight * self.prior_mean)[has_prior_P]]
        )
        times = np.concatenate([counts_R, np.ones(len(prior_rows_PP))])
        is_row = np.arange(len(target)) < len(counts_R)
        width = self.config.huber_width

        def loss(square: Floats) -> Floats:
            is_far = is_row & (square > width**2)
            root = np.sqrt(np.where(is_far, square, 1.0))
            value = np.where(is_far, 2 * width * root - width**2, square)
            slope = np.where(is_far, width / root, 1.0)
            bend = np.where(is_far, -width / (2 * root**3), 0.0)
            weighted: Floats = times * np.stack([value, slope, bend])
            return weighted

        found = least_squares(
            lambda parameters: matrix @ parameters - target,
            start_P,
            jac=lambda parameters: matrix,
            loss=loss,
            x_scale="jac",
        )
        return np.asarray(found.x, dtype=np.float64)

    def resample(self, parameters: Floats, scale_R: Floats) -> Floats:
        """Return (resamples, P) parameters of bootstrap samples of whole runs.

        They are drawn apart a little, as few runs resampled stray too little by √(free/all).
        """
        rng = np.random.default_rng(self.config.seed)
        samples = range(self.config.num_resamples)
        found = [self.regress(self._draw(rng), scale_R, parameters) for _ in samples]
        strayed = np.reshape(found, (len(samples), len(self.names))) - parameters
        return parameters + strayed * math.sqrt(self.num_runs / self.free_runs)

    def _draw(self, rng: np.random.Generator) -> Floats:
        """Draw runs with replacement, until they determine all parameters."""
        for _ in range(_MAX_REDRAWS):
            drawn = rng.integers(self.num_runs, size=self.num_runs)
            counts_R = np.bincount(drawn, minlength=self.num_runs)[self.run_index].astype(float)
            if self.is_determined(counts_R):
                return counts_R
        raise InputError(
            f"{self.num_runs} runs are too few to tell how uncertain the parameters are; "
            "measure more runs, or give priors"
        )
