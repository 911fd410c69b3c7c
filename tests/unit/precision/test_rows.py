"""Rows: what is significant, what was calibrated, what is refused."""

import math
from dataclasses import replace

import pytest

from mutirao.errors import InputError, OutOfRangeError
from mutirao.precision.rows import CalibratedRange, Measurement, Query, select_significant

QUERY = Query(1e6, 1e8, 4, "rtn", 32)


def measured(query=QUERY, degradation=0.1, error=0.001, run="a"):
    return Measurement(query, degradation, error, run)


RANGE = CalibratedRange.of(
    [
        measured(),
        measured(Query(4e6, 2e8, 3, "gptq", 128)),
        measured(Query(2e6, 1e8, 3, "rtn")),
    ]
)


def test_small_degradations_are_dropped_and_counted():
    rows = [
        measured(degradation=d, error=e)
        for d, e in ((0.1, 0.02), (0.1, 0.021), (-0.1, 0.001), (0.0, 0.0), (0.1, 0.0))
    ]
    kept, dropped = select_significant(rows, 5)
    assert kept == [rows[0], rows[4]]
    assert dropped == 3


def test_inside_is_accepted():
    RANGE.check(QUERY)
    RANGE.check(replace(QUERY, num_params=3.3e6, num_tokens=1.5e8, bits=3.5, group_size=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_params": 4.1e6}, r"num_params=4\.1e\+06 was not calibrated \(expected 1e\+06 to"),
        ({"num_params": 9e5}, "num_params"),
        ({"num_tokens": 2.1e8}, "num_tokens"),
        ({"bits": 2}, "bits=2 was not calibrated"),
        ({"bits": 4.5}, "bits"),
        ({"group_size": 64}, r"group_size=64 .*\(expected one of 128, 32, row\)"),
        ({"method": "awq"}, r"method=awq .*\(expected one of gptq, rtn\)"),
    ],
)
def test_outside_is_refused(change, message):
    with pytest.raises(OutOfRangeError, match=message):
        RANGE.check(replace(QUERY, **change))


def test_a_stated_factor_extends_sizes_and_tokens_alone():
    RANGE.check(replace(QUERY, num_params=4e7, num_tokens=1e7), extrapolate_factor=10)
    with pytest.raises(OutOfRangeError, match="times a factor 10"):
        RANGE.check(replace(QUERY, num_params=4.1e7), extrapolate_factor=10)
    with pytest.raises(OutOfRangeError, match="bits"):
        RANGE.check(replace(QUERY, bits=8), extrapolate_factor=10)
    with pytest.raises(InputError, match=r"extrapolate_factor=0\.5"):
        RANGE.check(QUERY, extrapolate_factor=0.5)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["num_params", "num_tokens", "bits"])
def test_bad_queries_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}="):
        replace(QUERY, **{name: value})


@pytest.mark.parametrize(("degradation", "error"), [(math.nan, 0.1), (math.inf, 0.1), (0.1, -1)])
def test_bad_measurements_are_refused(degradation, error):
    with pytest.raises(InputError, match="of run a is not accepted"):
        measured(degradation=degradation, error=error)


def test_a_row_shares_its_own_size():
    assert Query(1e6, 1e8, 4, "rtn", row_size=192).shared_weights == 192
    with pytest.raises(InputError, match="needs row_size"):
        _ = Query(1e6, 1e8, 4, "rtn").shared_weights
