"""Mixed fits: known constants come back, intervals hold, and the algebra is that of textbooks."""

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_runs import synthetic_rows, true_degradation

from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.forms import CENTER, Form, Prior, find_form
from mutirao.precision.mixed import SHARES, AveragedFit, _Model, fit_mixed
from mutirao.precision.rows import Measurement, Query

FORM = replace(find_form("kumar"), pooled=())
INTERACTION = find_form("interaction")
BIT_RATE = Prior("bit_rate", 1 / 0.59, 1e-3)
SIZES, TOKENS = (2e5, 4.5e5, 8e5), (2e6, 4e6)


def with_interaction(rows, k):
    """The same rows, with an exponent of D that falls by k for each e-fold of N."""
    found = []
    for row in rows:
        size = math.log(row.query.num_params / CENTER.num_params)
        length = math.log(row.query.num_tokens / CENTER.num_tokens)
        factor = math.exp(-k * size * length)
        found.append(
            replace(
                row,
                degradation=row.degradation * factor,
                standard_error=row.standard_error * factor,
            )
        )
    return found


def test_known_constants_come_back():
    rows = synthetic_rows(0, SIZES, TOKENS, num_seeds=6, between=0.02, within=0.01, bits=(3, 4))
    fit = fit_mixed(INTERACTION, with_interaction(rows, 0.2))
    errors = fit.standard_errors()
    for name, true in (("gamma_d[rtn]", 0.5), ("gamma_n[rtn]", 0.35), ("k", 0.2)):
        assert fit.parameters[name] == pytest.approx(true, abs=3 * errors[name])
        assert errors[name] < 0.1


def test_a_prior_draws_k_towards_zero():
    rows = with_interaction(synthetic_rows(1, SIZES, TOKENS, num_seeds=2, bits=(3,)), 0.2)
    free = fit_mixed(INTERACTION, rows)
    tied = fit_mixed(INTERACTION, rows, priors=[Prior("k", 0.0, 0.01)])
    assert abs(tied.parameters["k"]) < 0.02
    assert abs(free.parameters["k"]) > 0.05


def test_intervals_hold_19_of_20_new_runs():
    # One new run, larger and longer, for each of 60 sets of nine; rows of a run are not independent
    # of each other, so what is counted is spread over many runs. At 0.95, 60 runs of two cells have
    # a standard error of about 0.025.
    held = []
    for seed in range(60):
        fit = fit_mixed(FORM, synthetic_rows(seed, SIZES, TOKENS, bits=(3, 4)))
        for row in synthetic_rows(10_000 + seed, (1.6e6,), (8e6,), num_seeds=1, bits=(3, 4)):
            said = fit.predict(row.query, extrapolate_factor=2.1, relative_error=row.relative_error)
            held.append(said.low <= row.degradation <= said.high)
    assert 0.88 <= np.mean(held) <= 0.995


def test_the_spread_of_runs_is_found():
    rows = synthetic_rows(3, SIZES, TOKENS, num_seeds=30, between=0.2, within=0.02, bits=(3,))
    fit = fit_mixed(FORM, rows, priors=[BIT_RATE])
    run_and_cell = math.hypot(fit.spreads["run"], fit.spreads["cell_of_run"])
    assert run_and_cell == pytest.approx(0.2, rel=0.25)
    assert math.hypot(fit.spreads["checkpoint"], fit.spreads["row"]) < 0.05


def test_parameters_are_those_of_generalised_least_squares():
    rows = synthetic_rows(4, SIZES, TOKENS, num_seeds=2, bits=(3, 4))
    model = _Model(FORM, rows, [])
    log_sd = np.log([0.1, 0.05, 0.03, 0.04, 0.1])
    means, covariance = model.given_rows(log_sd)
    # By hand: the rows' covariance in loops, then (X'V⁻¹X)⁻¹ X'V⁻¹y.
    spread = np.zeros((len(rows), len(rows)))
    for first, one in enumerate(rows):
        for second, other in enumerate(rows):
            is_run = one.run == other.run
            is_long = one.query.num_tokens == other.query.num_tokens
            is_cell = one.query.cell == other.query.cell
            spread[first, second] = (
                0.1**2 * is_run
                + 0.05**2 * (is_run and is_long)
                + 0.03**2 * (is_run and is_cell)
                + 0.04**2 * (is_run and is_long and is_cell)
            )
        spread[first, first] += (one.standard_error / one.degradation) ** 2
    design = np.array([[FORM.terms(row.query)[name] for name in model.names] for row in rows])
    target = np.log([row.degradation for row in rows])
    weighted = np.linalg.solve(spread, design)
    precision = design.T @ weighted + np.eye(len(model.names)) / 100
    assert means == pytest.approx(np.linalg.solve(precision, weighted.T @ target), rel=1e-4)
    assert covariance == pytest.approx(np.linalg.inv(precision), rel=1e-3, abs=1e-6)


def test_the_slope_of_the_cost_is_that_of_small_steps():
    rows = synthetic_rows(8, SIZES, TOKENS, num_seeds=2, bits=(3, 4))
    model = _Model(INTERACTION, rows, [])
    at = np.log([0.1, 0.05, 0.03, 0.04, 0.2])
    _, slope = model.cost(at)
    for share in range(5):
        step = np.eye(5)[share] * 1e-4
        rise = (model.cost(at + step)[0] - model.cost(at - step)[0]) / 2e-4
        assert slope[share] == pytest.approx(rise, rel=1e-3, abs=1e-3)


def test_a_prediction_adds_up_what_is_not_known():
    rows = synthetic_rows(5, SIZES, TOKENS)
    fit = fit_mixed(FORM, rows)
    query = rows[0].query
    said = fit.predict(query)
    terms = np.array([FORM.terms(query)[name] for name in fit.parameters])
    variance = terms @ fit.covariance @ terms + sum(fit.spreads[each] ** 2 for each in SHARES)
    assert math.log(said.high / said.mean) == pytest.approx(1.96 * math.sqrt(variance))
    assert said.mean == pytest.approx(true_degradation(query), rel=0.3)
    assert said.mean / said.low == pytest.approx(said.high / said.mean)


def test_an_average_lies_between_its_parts_and_knows_that_they_differ():
    rows = synthetic_rows(9, SIZES, TOKENS)
    first = fit_mixed(FORM, rows)
    second = fit_mixed(FORM, [replace(r, degradation=4 * r.degradation) for r in rows])
    asked = rows[0].query
    one, other = first.predict(asked), second.predict(asked)
    said = AveragedFit(FORM, (first, second)).predict(asked)
    assert said.mean == pytest.approx(math.sqrt(one.mean * other.mean))
    sds = [math.log(each.high / each.mean) / 1.96 for each in (one, other)]
    # Two equally likely normals: the mean of squares less the square of the mean.
    centers = [math.log(each.mean) for each in (one, other)]
    square = np.mean([sd**2 + at**2 for sd, at in zip(sds, centers, strict=True)])
    sd = math.sqrt(square - np.mean(centers) ** 2)
    assert math.log(said.high / said.mean) == pytest.approx(1.96 * sd, rel=1e-6)
    same = AveragedFit(FORM, (first, first)).predict(asked)
    assert (same.mean, same.low) == (pytest.approx(one.mean), pytest.approx(one.low))


def test_the_form_loss_finds_its_slope_and_asks_for_the_loss():
    rows = []
    for row in synthetic_rows(6, SIZES, TOKENS, between=0.01, within=0.01, relative_error=0.01):
        loss = 1.5 - 0.2 * math.log(row.query.num_tokens / CENTER.num_tokens)
        rows.append(replace(row, query=replace(row.query, loss=loss)))
    fit = fit_mixed(find_form("loss"), rows)
    assert fit.parameters["slope[rtn]"] == pytest.approx(0.5 / 0.2, rel=0.05)
    with pytest.raises(InputError, match="loss of the model"):
        fit.predict(replace(rows[0].query, loss=None))


def test_what_cannot_be_fitted_or_asked_is_refused():
    rows = synthetic_rows(7, SIZES, TOKENS)
    fit = fit_mixed(FORM, rows)
    with pytest.raises(OutOfRangeError, match="num_params"):
        fit.predict(Query(1e9, 2e6, 4, "rtn", 32))
    with pytest.raises(InputError, match="of 1 runs"):
        fit_mixed(FORM, [row for row in rows if row.run == rows[0].run])
    with pytest.raises(InputError, match="no such parameter"):
        fit_mixed(FORM, rows, priors=[Prior("k", 0, 1)])
    with pytest.raises(InputError, match="0 significant rows"):
        fit_mixed(FORM, [Measurement(rows[0].query, 1e-9, 1.0, "run")])


def test_shannon_is_four_times_less_for_a_bit_more():
    form = find_form("shannon")
    assert isinstance(form, Form)
    two, three = (Query(1e6, 1e6, bits, "rtn", 32) for bits in (2, 3))
    assert form.offset(two) - form.offset(three) == pytest.approx(math.log(4))
    assert form.offset(two) == pytest.approx(-2.5 * math.log(4))
