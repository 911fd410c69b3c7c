"""Bills add up, energy follows hours, and two bills cross where arithmetic says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutirao.config import parse_recipe
from mutirao.errors import InputError, RecipeError
from mutirao.precision.lifetime import (
    Accelerator,
    Candidate,
    LifetimeCost,
    Usage,
    break_even_requests,
    cheapest_by_requests,
    compare_candidates,
    lifetime_cost,
)

# Round numbers, of no real product.
CHIP = Accelerator(
    peak_flops_per_s=1e15,
    training_utilization=0.5,
    inference_utilization=0.25,
    power_w=1000,
    pue=1.5,
    price_per_hour=2,
)
USE = Usage(num_requests=1e6, tokens_per_request=1000)


def test_an_arithmetic_example_of_training_against_a_year_of_use():
    """191 M$ once against 6 G$ a year. An example of arithmetic, not a fact about any company.

    191 M$ is the AI Index 2024's estimate of one large model's training cost. The year's bill is
    stated assumptions alone: 10⁹ requests a day, 365 days, 1.644 cents a request.
    """
    bill = LifetimeCost(
        "example", training_cost=191e6, cost_per_request=0.01644, num_requests=1e9 * 365
    )
    assert bill.inference_cost == pytest.approx(6.0e9, rel=0.001)
    assert bill.inference_cost / bill.training_cost == pytest.approx(31.4, abs=0.1)
    assert bill.total_cost == pytest.approx(6.191e9, rel=0.001)
    assert bill.requests_per_training / 1e9 == pytest.approx(11.6, abs=0.05)  # days of use


def test_operations_hours_money_and_energy_by_hand():
    cost = lifetime_cost(Candidate("a", 1e9, 2e10), USE, CHIP)
    assert cost.training_flops == 1.2e20
    assert cost.flops_per_request == 2e12
    training_hours = 1.2e20 / 0.5e15 / 3600
    request_hours = 2e12 / 0.25e15 / 3600
    assert cost.training_cost == pytest.approx(2 * training_hours)
    assert cost.inference_cost == pytest.approx(2 * request_hours * 1e6)
    assert cost.total_energy_kwh == pytest.approx(1.5 * (training_hours + request_hours * 1e6))


def test_bits_count_in_proportion_or_not_at_all():
    few = Candidate("few", 1e9, 2e10, training_bits=8, inference_bits=4)
    cost = lifetime_cost(few, USE, CHIP)
    assert cost.training_flops == 0.6e20
    assert cost.flops_per_request == 0.5e12
    indifferent = CHIP.model_copy(update={"bits_exponent": 0.0})
    assert lifetime_cost(few, USE, indifferent).training_flops == 1.2e20


def test_a_small_model_trained_longer_pays_off_with_use():
    """7B on 2T tokens against 3B on 8T: dearer to train, cheaper to ask."""
    large = Candidate("large", 7e9, 2e12, loss=2.1)
    small = Candidate("small", 3e9, 8e12, inference_bits=8, loss=2.1)
    large_cost, small_cost = (lifetime_cost(each, USE, CHIP) for each in (large, small))
    even = break_even_requests(large_cost, small_cost)
    assert even == break_even_requests(small_cost, large_cost)
    for factor, winner in ((0.9, "large"), (1.1, "small")):
        usage = Usage(num_requests=factor * even, tokens_per_request=1000)
        assert compare_candidates([large, small], usage, CHIP)[0].name == winner
    assert cheapest_by_requests([small_cost, large_cost]) == ((0.0, "large"), (even, "small"))
    assert large_cost.loss == 2.1


def test_where_nothing_crosses():
    cheap = LifetimeCost("cheap", 1.0, 1.0, 0)
    dear = LifetimeCost("dear", 2.0, 2.0, 0)
    assert break_even_requests(cheap, dear) is None
    assert break_even_requests(cheap, cheap) is None
    assert cheapest_by_requests([dear, cheap]) == ((0.0, "cheap"),)
    assert LifetimeCost("free", 1.0, 0.0, 0).requests_per_training == math.inf


money = st.floats(0.01, 1e6)


@given(bills=st.lists(st.tuples(money, money), min_size=1, max_size=6), requests=st.floats(0, 1e7))
def test_the_cheapest_is_the_cheapest(bills, requests):
    costs = [
        LifetimeCost(str(number), training, request, requests)
        for number, (training, request) in enumerate(bills)
    ]
    name = [name for start, name in cheapest_by_requests(costs) if start <= requests][-1]
    named = next(cost for cost in costs if cost.name == name)
    assert named.total_cost == pytest.approx(min(cost.total_cost for cost in costs), rel=1e-9)


@given(num_params=st.floats(1e6, 1e12), bits=st.floats(2, 16), factor=st.floats(1.1, 10))
def test_more_of_anything_costs_more(num_params, bits, factor):
    def total(params, tokens, precision, requests):
        usage = Usage(num_requests=requests, tokens_per_request=100)
        return lifetime_cost(
            Candidate("x", params, tokens, inference_bits=precision), usage, CHIP
        ).total_cost

    here = total(num_params, 1e9, bits, 1e6)
    assert total(num_params * factor, 1e9, bits, 1e6) > here
    assert total(num_params, 1e9 * factor, bits, 1e6) > here
    assert total(num_params, 1e9, bits * factor, 1e6) > here
    assert total(num_params, 1e9, bits, 1e6 * factor) > here


def test_bad_values_are_refused():
    with pytest.raises(InputError, match=r"x\.num_tokens=0 is not accepted"):
        Candidate("x", 1e9, 0)
    with pytest.raises(RecipeError, match=r"pue=0\.5"):
        parse_recipe(
            Accelerator,
            {"peak_flops_per_s": 1, "power_w": 1, "price_per_hour": 1, "pue": 0.5},
        )
