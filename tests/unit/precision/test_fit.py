"""Fits of synthetic rows: known laws come back, intervals hold, what is not known is refused."""

import math
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from synthetic_runs import LAW, synthetic_rows, true_degradation

from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.fit import fit_form
from mutirao.precision.forms import FORMS, Prior, find_form, published_priors
from mutirao.precision.law import CHEN_W4A16, KUMAR, OUYANG
from mutirao.precision.number_formats import integer_format
from mutirao.precision.regression import FitConfig, Regression
from mutirao.precision.rows import Measurement, Query

QUICK = FitConfig(num_resamples=50)
FAST = FitConfig(num_resamples=20)


def remeasured(rows, degradation_of):
    return [
        replace(row, degradation=degradation_of(row.query), standard_error=1e-9) for row in rows
    ]


def test_exact_rows_of_a_law_give_its_parameters_back():
    rows = remeasured(synthetic_rows(0, num_seeds=2), true_degradation)
    fit = fit_form("kumar", rows, config=FAST)
    assert fit.parameters == pytest.approx(LAW, rel=1e-6)
    assert fit.predict(rows[0].query).mean == pytest.approx(rows[0].degradation, rel=1e-6)


def test_noisy_rows_give_parameters_back_within_their_errors():
    fit = fit_form("kumar", synthetic_rows(0), config=QUICK)
    errors = fit.standard_errors()
    for name, true in LAW.items():
        assert abs(fit.parameters[name] - true) < 3 * errors[name], name
    assert (fit.num_runs, fit.num_rows, fit.num_dropped) == (15, 240, 0)
    assert fit.spread == pytest.approx(math.hypot(0.08, 0.04), rel=0.35)


def published(name):
    if name.startswith("chen"):
        return lambda q: CHEN_W4A16.degradation(q.num_params, q.num_tokens, q.group_size)
    law = KUMAR if name.startswith("kumar") else OUYANG
    return lambda q: law.degradation(q.num_params, q.num_tokens, q.bits)


def step_squared(query):
    return 0.3 * query.num_tokens**0.4 / query.num_params**0.3 / (2 ** (query.bits - 1) - 1) ** 2


def noise_law(query):
    return 0.3 * query.num_tokens**0.4 / query.num_params**0.3 * query.noise


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("ouyang", published("ouyang")),
        ("chen", published("chen")),
        ("step_squared", step_squared),
        ("noise", noise_law),
        ("per_cell", step_squared),
        ("per_cell_exponents", step_squared),
        ("kumar_published", lambda q: 0.2 * published("kumar")(q)),
        ("ouyang_published", lambda q: 3 * published("ouyang")(q)),
        ("chen_published", lambda q: published("chen")(q) * 5**-q.bits),
        ("kumar_published_fixed", published("kumar")),
        ("ouyang_published_fixed", published("ouyang")),
        ("chen_published_fixed", published("chen")),
    ],
)
def test_each_form_fits_its_own_law(name, law):
    bits = (4,) if name == "chen_published_fixed" else (3, 4, 6)
    rows = synthetic_rows(0, bits=bits, groups=(32, 128), num_seeds=1, tokens=(1e6, 1e7, 1e8))
    rows = [
        replace(
            row,
            query=replace(
                row.query,
                noise=integer_format(int(row.query.bits), row.query.group_size).relative_noise(),
            ),
        )
        for row in rows
    ]
    fit = fit_form(name, remeasured(rows, law), config=FAST)
    for row in rows[::7]:
        assert fit.predict(row.query).mean == pytest.approx(law(row.query), rel=1e-4)


def test_the_largest_model_speaks_for_all():
    rows = synthetic_rows(0, num_seeds=2)
    fit = fit_form("largest", rows, config=FAST)
    largest = [
        math.log(row.degradation)
        for row in rows
        if (row.query.num_params, row.query.num_tokens, row.query.bits) == (1.8e6, 64e6, 4)
    ]
    assert fit.predict(Query(1e5, 1e6, 4, "rtn", 32)).mean == pytest.approx(
        math.exp(mean(largest)), rel=0.01
    )


def test_the_regression_is_the_minimum_of_hubers_loss_and_the_penalties():
    """Against a general minimiser that shares no code with it."""
    rows = synthetic_rows(3, num_seeds=1)
    rows[5] = replace(rows[5], degradation=20 * rows[5].degradation)
    problem = Regression.build(
        find_form("kumar"), rows, [Prior("gamma_d", 0.2, 0.02)], FitConfig(huber_width=1.2)
    )
    scale = np.full(len(rows), 0.1)
    found = problem.regress(problem.counts, scale, np.zeros(4))

    def objective(parameters):
        left = np.abs((problem.design @ parameters - problem.target) / scale)
        loss = np.where(left <= 1.2, left**2, 2 * 1.2 * left - 1.2**2).sum()
        return loss + ((parameters[problem.names.index("gamma_d")] - 0.2) / 0.02) ** 2

    start = objective(found)
    for simplex_step in (1e-4, 1e-2):
        near = found + simplex_step * np.vstack([np.zeros(4), np.eye(4)])
        options = {"initial_simplex": near, "xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
        best = minimize(objective, found, method="Nelder-Mead", options=options)
        assert best.fun >= start - 1e-5 * start


def test_a_wrong_row_does_little():
    rows = synthetic_rows(1)
    clean = fit_form("kumar", rows, config=FAST).parameters
    rows[7] = replace(rows[7], degradation=100 * rows[7].degradation)
    dirty = fit_form("kumar", rows, config=FAST).parameters
    assert dirty["gamma_d"] == pytest.approx(clean["gamma_d"], abs=0.02)
    squared = fit_form("kumar", rows, config=FitConfig(num_resamples=20, huber_width=1e6))
    assert abs(squared.parameters["gamma_d"] - clean["gamma_d"]) > abs(
        dirty["gamma_d"] - clean["gamma_d"]
    )


def test_priors_pull_and_stand_in_for_what_is_not_measured():
    rows = synthetic_rows(0)
    pulled = fit_form("kumar", rows, priors=[Prior("gamma_d", 0.1, 1e-5)], config=FAST)
    assert pulled.parameters["gamma_d"] == pytest.approx(0.1, abs=1e-3)
    loose = fit_form("kumar", rows, priors=[Prior("gamma_d", 0.1, 100.0)], config=FAST)
    assert loose.parameters["gamma_d"] == pytest.approx(0.5, abs=0.05)

    one_size = [row for row in rows if row.query.num_params == 9e5]
    with pytest.raises(InputError, match=r"do not determine all .*gamma_n.*give priors"):
        fit_form("kumar", one_size, config=FAST)
    known = fit_form("kumar", one_size, priors=[Prior("gamma_n", 0.35, 0.05)], config=FAST)
    assert known.parameters["gamma_n"] == pytest.approx(0.35, abs=1e-3)


def test_published_priors_are_of_published_fits():
    priors = {prior.parameter: prior for prior in published_priors("chen")}
    assert priors.keys() == {"gamma_d", "gamma_n", "gamma_group"}
    values = [0.5068, 0.5251, 0.1610]
    assert priors["gamma_d"].mean == pytest.approx(mean(values))
    assert priors["gamma_d"].sd == pytest.approx(stdev(values))
    assert published_priors("largest") == ()
    assert {prior.parameter for prior in published_priors("per_cell")} == {"gamma_d", "gamma_n"}


def test_rows_within_five_standard_errors_are_dropped_and_counted():
    rows = synthetic_rows(0)
    rows += [replace(rows[0], standard_error=rows[0].degradation / 4.9) for _ in range(7)]
    rows += [replace(rows[0], degradation=-0.001)]
    fit = fit_form("kumar", rows, config=FAST)
    assert (fit.num_rows, fit.num_dropped) == (240, 8)
    with pytest.raises(InputError, match="none of 8 rows"):
        fit_form("kumar", rows[240:], config=FAST)


@pytest.mark.parametrize("form", ["kumar", "per_cell_exponents"])
def test_intervals_hold_measurements_of_new_runs_as_often_as_they_say(form):
    """Synthetic: 8 sweeps of 15 runs; new runs inside, and at five times N and eight times D."""
    inside, outside = [], []
    for seed in range(8):
        fit = fit_form(form, synthetic_rows(seed), config=QUICK)
        near = synthetic_rows(100 + seed, (3e5, 1.2e6), (2e6, 3e7), num_seeds=8)
        far = synthetic_rows(200 + seed, (9e6,), (5e8,), num_seeds=16)
        for rows, hits in ((near, inside), (far, outside)):
            for row in rows:
                told = fit.predict(
                    row.query, extrapolate_factor=10, relative_error=row.relative_error
                )
                hits.append(told.low <= row.degradation <= told.high)
    assert 0.90 <= np.mean(inside) <= 0.99
    assert 0.90 <= np.mean(outside) <= 0.99


def test_intervals_are_wider_far_away_and_with_measurement_error():
    fit = fit_form("kumar", synthetic_rows(0), config=QUICK)

    def width(query, **options):
        told = fit.predict(query, **options)
        assert 0 < told.low < told.mean < told.high
        return math.log(told.high / told.low)

    near = Query(4.5e5, 8e6, 4, "rtn", 32)
    far = Query(4.5e7, 8e8, 4, "rtn", 32)
    assert width(far, extrapolate_factor=100) > width(near)
    assert width(near, relative_error=0.3) > 2 * width(near)


def test_resampling_rows_instead_of_runs_would_deceive():
    rows = synthetic_rows(0, between=0.2, within=0.01)
    by_run = fit_form("kumar", rows, config=QUICK).standard_errors()
    alone = [replace(row, run=str(number)) for number, row in enumerate(rows)]
    by_row = fit_form("kumar", alone, config=QUICK).standard_errors()
    assert by_run["gamma_n"] > 2 * by_row["gamma_n"]


def test_the_same_seed_gives_the_same_fit():
    first, second = (fit_form("kumar", synthetic_rows(0), config=FAST) for _ in range(2))
    assert np.array_equal(first.resampled, second.resampled)
    assert first.predict(Query(2e5, 2e6, 4, "rtn", 32)) == second.predict(
        Query(2e5, 2e6, 4, "rtn", 32)
    )


def test_outside_of_the_calibrated_range_is_refused():
    fit = fit_form("kumar", synthetic_rows(0), config=FAST)
    far = Query(1e8, 1e7, 4, "rtn", 32)
    with pytest.raises(OutOfRangeError, match="num_params"):
        fit.predict(far)
    assert fit.predict(far, extrapolate_factor=60).mean > 0
    by_cell = fit_form("per_cell", synthetic_rows(0), config=FAST)
    with pytest.raises(OutOfRangeError, match=r"rtn/32/3\.5 was not calibrated"):
        by_cell.predict(Query(2e5, 2e6, 3.5, "rtn", 32))


def test_what_cannot_be_fitted_is_refused():
    rows = synthetic_rows(0)
    with pytest.raises(InputError, match=r"form 'x' is not known \(expected one of kumar"):
        fit_form("x", rows)
    with pytest.raises(InputError, match="prior of gamma_x"):
        fit_form("kumar", rows, priors=[Prior("gamma_x", 0, 1)])
    with pytest.raises(InputError, match="needs the noise of rtn/32/3"):
        fit_form("noise", rows)
    with pytest.raises(InputError, match="needs row_size"):
        fit_form("chen", [replace(r, query=replace(r.query, group_size=None)) for r in rows])
    with pytest.raises(InputError, match="law at 4 bits"):
        fit_form("chen_published_fixed", rows)
    alone = [replace(r, query=replace(r.query, method=r.run)) for r in rows]
    with pytest.raises(InputError, match="15 runs are too few"):  # each has a constant of its own
        fit_form("kumar", alone, priors=[Prior("gamma_n", 0.35, 0.1)])
    with pytest.raises(InputError, match="more than 1 bit"):
        fit_form("step_squared", [Measurement(Query(1e6, 1e8, 1, "rtn", 32), 0.1, 0.001, "a")])
    with pytest.raises(InputError, match="must be above 0"):
        Prior("gamma_d", 0.5, 0.0)


@pytest.fixture(scope="module")
def fit():
    return fit_form("kumar", synthetic_rows(0), config=FAST)


@given(num_params=st.floats(1e5, 1.8e6), num_tokens=st.floats(1e6, 3e7), num_bits=st.floats(3, 5))
@settings(max_examples=40, deadline=None)
def test_predictions_grow_with_tokens_and_fall_with_bits(fit, num_params, num_tokens, num_bits):
    query = Query(num_params, num_tokens, num_bits, "rtn", 32)
    here = fit.predict(query)
    assert here.low < here.mean < here.high
    assert fit.predict(replace(query, num_tokens=2 * num_tokens)).mean > here.mean
    assert fit.predict(replace(query, bits=num_bits + 1)).mean < here.mean


def test_forms_are_listed_under_their_names():
    assert all(find_form(name).name == name for name in FORMS)
