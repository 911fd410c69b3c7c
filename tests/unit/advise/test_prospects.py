"""More training, other sizes and the bill, against the same by search and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mutirao.advise.choosing import Candidate
from mutirao.advise.config import Outlook
from mutirao.advise.findings import _about
from mutirao.advise.prospects import OtherSize, Prospects, look_ahead
from mutirao.advise.ways import Way
from mutirao.precision.fit import Prediction
from mutirao.precision.forms import published_priors
from mutirao.precision.law import KUMAR

N = 1e8


def _chosen(rise, bits=4):
    prediction = Prediction(rise, *sorted((rise * 0.8, rise * 1.2)))
    return Candidate(Way("gptq", bits, 32), 0.01, 10**8, 5.0, prediction, None)


def _gamma(name):
    return next(p.mean for p in published_priors("per_cell") if p.parameter == name)


def test_the_critical_tokens_are_where_the_loss_is_least():
    tokens = 1e11
    found = look_ahead(_chosen(0.02), int(N), Outlook(training_tokens=tokens)).more_training
    grid = np.geomspace(1e8, 1e16, 400_001)
    loss = KUMAR.base.b * grid**-KUMAR.base.beta + 0.02 * (grid / tokens) ** _gamma("gamma_d")
    assert found.critical_tokens.mean == pytest.approx(grid[loss.argmin()], rel=1e-3)
    assert found.critical_tokens.low < found.critical_tokens.mean < found.critical_tokens.high


def test_far_past_the_critical_tokens_more_would_hurt():
    far = look_ahead(_chosen(0.3), int(N), Outlook(training_tokens=1e14)).more_training
    assert far.would_hurt is True
    near = look_ahead(_chosen(1e-4), int(N), Outlook(training_tokens=1e9)).more_training
    assert near.would_hurt is False


def test_half_the_size_at_twice_the_bits():
    half, double = look_ahead(_chosen(0.02), int(N), Outlook()).other_sizes
    assert (half.size, half.bits, double.size, double.bits) == (0.5, 8, 2.0, 2)
    base = KUMAR.base
    smaller = base.a * ((N / 2) ** -base.alpha - N**-base.alpha)
    assert half.change == pytest.approx(smaller - 0.02, abs=0.001)  # 8 bits cost next to nothing
    assert double.change > 0  # two bits cost more than twice the weights bring


@pytest.mark.parametrize("rise", [0.02, -0.001])
def test_other_sizes_have_the_interval_of_the_rise_and_of_its_exponent(rise):
    prior = next(p for p in published_priors("per_cell") if p.parameter == "gamma_n")
    chosen = _chosen(rise)
    rises = np.linspace(0.8 * rise, 1.2 * rise, 41)
    gammas = np.linspace(prior.mean - 1.96 * prior.sd, prior.mean + 1.96 * prior.sd, 41)
    base = KUMAR.base
    for other in look_ahead(chosen, int(N), Outlook()).other_sizes:
        step = (2 ** (chosen.way.bits - 1) - 0.5) / (2 ** (other.bits - 1) - 0.5)
        changes = [
            base.a * ((N * other.size) ** -base.alpha - N**-base.alpha)
            + nats * other.size**-gamma * step**2
            - nats
            for nats in rises
            for gamma in gammas
        ]
        assert other.low == pytest.approx(min(changes), rel=1e-9)
        assert other.high == pytest.approx(max(changes), rel=1e-9)
        assert other.low < other.change < other.high


def test_what_is_said_of_other_sizes_and_of_the_bill():
    worse, unsure = OtherSize(0.5, 8, 0.12, 0.1, 0.15), OtherSize(2.0, 2, -0.01, -0.03, 0.02)
    outlook = Outlook(training_tokens=1e10, num_requests=1e9)
    bill = look_ahead(_chosen(0.02), int(1e9), outlook).bill
    first, second, third = _about(Prospects(None, (worse, unsure), None, bill, ()))
    assert "would lose about 0.12 nats (0.10 to 0.15)" in first
    assert "may lose or gain against this choice: -0.01 nats of loss (-0.03 to +0.02)" in second
    assert "has no interval" in third
    assert "count as exact" in third


def test_the_bill_by_hand():
    outlook = Outlook(training_tokens=1e12, num_requests=1e9, tokens_per_request=1000)
    bill = look_ahead(_chosen(0.02), int(N), outlook).bill
    machine = outlook.accelerator
    hours = 6 * N * 1e12 / (machine.peak_flops_per_s * machine.training_utilization) / 3600
    assert bill.original.training_cost == pytest.approx(hours * machine.price_per_hour)
    served = 2 * N * 1e12 / (machine.peak_flops_per_s * machine.inference_utilization) / 3600
    assert bill.original.inference_cost == pytest.approx(served * machine.price_per_hour)
    assert bill.chosen.inference_cost == pytest.approx(bill.original.inference_cost / 4)
    assert bill.smaller is None  # half the weights cannot reach that loss


def test_a_smaller_model_that_can_match_costs_less_from_some_request_on():
    outlook = Outlook(training_tokens=1e10, num_requests=1e9)
    bill = look_ahead(_chosen(0.02), int(1e9), outlook).bill
    longer = bill.smaller.training_flops / (6 * 0.5e9)
    assert KUMAR.base.loss(0.5e9, longer) == pytest.approx(KUMAR.base.loss(1e9, 1e10))
    at = bill.break_even_requests
    assert bill.original.training_cost + at * bill.original.cost_per_request == pytest.approx(
        bill.smaller.training_cost + at * bill.smaller.cost_per_request
    )


def test_what_was_not_told_is_not_answered():
    found = look_ahead(_chosen(0.02), int(N), Outlook())
    assert found.more_training is None
    assert found.qat_share is None
    assert found.bill is None
    assert any("--training-tokens" in note for note in found.notes)
    undecayed = look_ahead(_chosen(0.02), int(N), Outlook(training_tokens=1e12, is_decayed=False))
    assert any("had not decayed" in note for note in undecayed.notes)
    assert 0 < undecayed.qat_share < 1


def test_models_far_from_those_of_the_law_are_refused():
    outlook = Outlook(training_tokens=1e12, num_requests=1e9)
    found = look_ahead(_chosen(0.02), 50_000, outlook)
    assert (found.more_training, found.other_sizes) == (None, ())
    assert found.bill.smaller is None
    assert "nothing is said of other sizes" in found.notes[0]


def test_a_rise_that_is_not_clear_has_no_critical_tokens():
    chosen = Candidate(Way("rtn", 8, 32), 1e-5, 10**8, 8.6, Prediction(-4e-4, -1.6e-3, 8e-4), None)
    found = look_ahead(chosen, int(N), Outlook(training_tokens=1e12))
    assert found.more_training is None
    assert any("not clear of zero" in note for note in found.notes)


def test_an_undecayed_rate_is_told_whatever_else_is_known():
    found = look_ahead(_chosen(0.02), int(N), Outlook(is_decayed=False))
    assert any("had not decayed" in note for note in found.notes)
