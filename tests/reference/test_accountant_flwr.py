"""The accountant against others: Flower's, where its backend is installed, and kept figures.

Flower's RDP accountant rests on the package dp-accounting, which is no dependency here. The
kept figures were computed with dp-accounting 0.6.0 (PLDAccountant, interval 1e-4, and
RdpAccountant); its own PLD bound is pessimistic too.
"""

from __future__ import annotations

import importlib.util
import math

import pytest

from mutirao.train.accountant import Phase, pld_epsilon, rdp_epsilon

FIGURES = [
    # q, σ, steps, δ, ε by PLD, ε by RDP at integer orders
    (256 / 100_000, 1.0, 3000, 1e-5, 0.7131402299015156, 1.0244467292921609),
    (5e-3, 0.8, 1000, 1e-6, 2.0041117459413003, None),
    (256 / 60_000, 0.6, 7031, 1e-5, 7.69002705144793, None),
    (0.5, 0.3, 5, 1e-6, 53.33494712024927, None),
    (0.999, 2.0, 50, 1e-9, 26.844878657973375, None),
]


def _phase(q: float, sigma: float, num_steps: int) -> Phase:
    return Phase(sampling_probability=q, noise_multiplier=sigma, num_steps=num_steps)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "by_pld", "by_rdp"), FIGURES)
def test_kept_figures_of_dp_accounting(
    q: float, sigma: float, steps: int, delta: float, by_pld: float, by_rdp: float | None
) -> None:
    phase = _phase(q, sigma, steps)
    assert pld_epsilon([phase], delta) == pytest.approx(by_pld, rel=5e-4)
    if by_rdp is not None:
        assert rdp_epsilon([phase], delta) == pytest.approx(by_rdp, rel=1e-9)


def test_kept_figure_of_different_phases() -> None:
    phases = [_phase(0.01, 1.0, 500), _phase(0.02, 2.0, 300), _phase(0.001, 0.7, 1000)]
    assert pld_epsilon(phases, 1e-5) == pytest.approx(1.5452958464482838, rel=5e-4)


@pytest.mark.parametrize("sample_size", [100, 2000, 10_000])
@pytest.mark.parametrize("sigma", [0.8, 1.0, 3.0])
def test_agrees_with_flower(sample_size: int, sigma: float) -> None:
    privacy = pytest.importorskip(
        "flwr.supercore.privacy_accounting", reason="this flwr has no privacy accounting"
    )
    if importlib.util.find_spec("dp_accounting") is None:
        pytest.skip("Flower's accountant needs dp-accounting, which is not installed")
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    population, num_steps = 10_000, 200
    is_whole = sample_size == population
    orders = tuple(float(order) for order in range(2, 65))
    theirs = RdpAccountant(
        privacy.PrivacyConfig(
            target_delta=1e-5,
            population_size=population,
            neighboring_relation=privacy.NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=privacy.SamplingMethod.NO_AMPLIFICATION
            if is_whole
            else privacy.SamplingMethod.POISSON,
        ),
        orders=orders,
    )
    theirs.compose(privacy.GaussianPrivacyEvent(sigma, sample_size, population), num_steps)
    ours = rdp_epsilon([_phase(sample_size / population, sigma, num_steps)], 1e-5, orders)
    assert math.isfinite(ours)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
