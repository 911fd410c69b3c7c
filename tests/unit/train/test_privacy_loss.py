"""The composed privacy loss against closed forms and integrals: never below, and hardly above."""

import itertools
import math

import numpy as np
import pytest
from sampled_steps import loss_at, run
from scipy import integrate, optimize, stats

from mutirao.train import privacy_loss
from mutirao.train.accountant import pld_epsilon, rdp_epsilon

LOOSENESS = 5e-4
"""Relative amount by which the PLD's bound may lie above the exact ε."""


def one_step_delta(epsilon, q, sigma, *, removal):
    """δ of one step at any real ε, in closed form, P and Q exchanged where a unit is added."""
    gain = epsilon if removal else -epsilon
    inner = (math.expm1(gain) + q) / q
    if inner <= 0:
        return -math.expm1(epsilon) if removal else 0.0
    z = 0.5 + sigma**2 * math.log(inner)
    plain, shifted = stats.norm.sf(z / sigma), stats.norm.sf((z - 1) / sigma)
    mixed = (1 - q) * plain + q * shifted
    if removal:
        return mixed - math.exp(epsilon) * plain
    return (1 - plain) - math.exp(epsilon) * (1 - mixed)


def two_step_delta(epsilon, q, sigma, *, removal):
    """δ of two steps: the mean over the first step's loss of the second step's δ."""

    def integrand(z):
        gain = loss_at(z, q, sigma)
        noise = stats.norm.pdf(z, scale=sigma)
        density = noise * math.exp(gain) if removal else noise
        rest = epsilon - (gain if removal else -gain)
        return density * one_step_delta(rest, q, sigma, removal=removal)

    points = np.linspace(-10 * sigma, 1 + 10 * sigma, 81)
    pieces = [
        integrate.quad(integrand, low, high, epsrel=1e-9, epsabs=1e-16)[0]
        for low, high in itertools.pairwise(points)
    ]
    return sum(pieces)


def exact_epsilon(delta_at, delta):
    """The larger ε of both directions, by root finding."""

    def one_way(removal):
        if delta_at(0, removal=removal) <= delta:
            return 0.0
        return optimize.brentq(
            lambda eps: delta_at(eps, removal=removal) - delta, 0, 100, xtol=1e-10
        )

    return max(one_way(True), one_way(False))


@pytest.mark.parametrize(
    ("sigma", "num_steps", "delta"),
    [(1.0, 1, 1e-5), (1.0, 100, 1e-5), (10.0, 100, 1e-5), (5.0, 7, 1e-12), (50.0, 1, 1e-3)],
)
def test_without_sampling_epsilon_is_that_of_the_analytic_gaussian(sigma, num_steps, delta):
    shift = math.sqrt(num_steps) / sigma

    def delta_at(epsilon):
        # Balle and Wang 2018, arXiv:1805.06530.
        tail = epsilon + stats.norm.logcdf(-shift / 2 - epsilon / shift)
        return stats.norm.cdf(shift / 2 - epsilon / shift) - math.exp(tail)

    exact = optimize.brentq(lambda epsilon: delta_at(epsilon) - delta, 0, 1000, xtol=1e-10)
    bound = pld_epsilon([run(1.0, sigma, num_steps)], delta)
    assert exact <= bound <= exact * (1 + LOOSENESS)
    assert bound <= rdp_epsilon([run(1.0, sigma, num_steps)], delta)


@pytest.mark.parametrize(
    ("q", "sigma", "delta"),
    [(0.01, 1.0, 1e-4), (0.3, 0.8, 1e-6), (0.9, 2.0, 1e-8), (0.05, 0.4, 1e-5), (1e-4, 1.0, 1e-6)],
)
def test_one_sampled_step_is_the_closed_form(q, sigma, delta):
    exact = exact_epsilon(
        lambda epsilon, removal: one_step_delta(epsilon, q, sigma, removal=removal), delta
    )
    bound = pld_epsilon([run(q, sigma, 1)], delta)
    assert exact <= bound <= exact * (1 + LOOSENESS) + 2e-4


@pytest.mark.parametrize(
    ("q", "sigma", "delta"), [(0.1, 1.0, 1e-4), (0.5, 0.8, 1e-6), (0.02, 0.6, 1e-5)]
)
def test_two_sampled_steps_are_the_integral(q, sigma, delta):
    bound = pld_epsilon([run(q, sigma, 2)], delta)

    def exact_delta(epsilon):
        return max(two_step_delta(epsilon, q, sigma, removal=removal) for removal in (True, False))

    assert exact_delta(bound) <= delta * (1 + 1e-6) < exact_delta(bound * (1 - LOOSENESS))


@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_a_coarser_grid_only_raises_the_bound(monkeypatch, share):
    phases = [run(0.01, 0.8, 300), run(0.05, 2.0, 40)]
    fine = pld_epsilon(phases, 1e-6)
    monkeypatch.setattr(privacy_loss, "GRID_SHARE", share)
    assert fine < pld_epsilon(phases, 1e-6) < 1.1 * fine
