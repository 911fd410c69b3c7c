"""The accountant against integrals and published figures; the budget refuses and returns."""

import math

import pytest
from sampled_steps import loss_at, run
from scipy import integrate, stats

from mutirao.errors import ArtifactError, InputError, PrivacyBudgetError
from mutirao.train.accountant import (
    ORDERS,
    PrivacyBudget,
    epsilon_spent,
    find_noise_multiplier,
    pld_epsilon,
    rdp,
    rdp_epsilon,
)


def renyi_integral(q, sigma, order, *, removal=True):
    """log E_Q[(P/Q)^α] / (α - 1), or with P and Q exchanged, by quadrature."""

    def integrand(z):
        gain = loss_at(z, q, sigma)
        log_noise = stats.norm.logpdf(z, scale=sigma)
        return math.exp(log_noise + (order * gain if removal else (1 - order) * gain))

    high = order + 12 * sigma
    points = [0.0, 1.0, order]
    value, _ = integrate.quad(
        integrand, -12 * sigma, high, points=points, limit=500, epsrel=1e-12, epsabs=0
    )
    return math.log(value) / (order - 1)


@pytest.mark.parametrize("q", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("order", [2, 3, 8, 17])
def test_integer_orders_are_the_integral(q, sigma, order):
    exact = renyi_integral(q, sigma, order)
    assert rdp(q, sigma, order) == pytest.approx(exact, rel=1e-7, abs=1e-12)
    assert renyi_integral(q, sigma, order, removal=False) <= exact * (1 + 1e-7) + 1e-12


@pytest.mark.parametrize("order", [1.25, 2.5, 4.75, 9.5])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.2, 0.8), (0.5, 3.0)])
def test_fractional_orders_are_bounded_from_above(q, sigma, order):
    exact = renyi_integral(q, sigma, order)
    assert exact * (1 - 1e-9) <= rdp(q, sigma, order) <= rdp(q, sigma, math.ceil(order))


def test_without_sampling_the_divergence_is_that_of_two_gaussians():
    assert rdp(1.0, 2.0, 1.25) == pytest.approx(1.25 / 8)
    assert rdp(0.999999, 2.0, 6) == pytest.approx(6 / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("sigma", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
)
def test_published_figures_of_tensorflow_privacy(sigma, epochs, published):
    """60,000 images, batches of 256, δ = 1e-5 (tutorials/README.md of TensorFlow Privacy),
    by Rényi orders and the older conversion of Mironov 2017, arXiv:1702.07476."""
    phase = run(256 / 60_000, sigma, epochs * 60_000 // 256)
    older = min(
        phase.num_steps * rdp(phase.sampling_probability, sigma, order)
        + math.log(1e5) / (order - 1)
        for order in ORDERS
    )
    assert older == pytest.approx(published, rel=0.01)
    assert pld_epsilon([phase], 1e-5) < rdp_epsilon([phase], 1e-5) < older


def test_published_figure_of_the_moments_accountant():
    """Abadi et al. 2016, arXiv:1607.00133, section 3.2: 1.26 at q = 0.01, σ = 4, 10,000 steps."""
    phase = run(0.01, 4.0, 10_000)
    older = min(10_000 * rdp(0.01, 4.0, k) + math.log(1e5) / (k - 1) for k in range(2, 34))
    assert older == pytest.approx(1.26, abs=0.01)
    assert epsilon_spent([phase], 1e-5) < 1.0


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (run(256 / 100_000, 1.0, 3000), 0.713),  # records of one silo
        (run(1.0, 1.0, 100), 91.8),  # whole clients, every round
        (run(1.0, 10.0, 100), 4.38),
    ],
)
def test_figures_that_the_documents_name(phase, expected):
    assert epsilon_spent([phase], 1e-5) == pytest.approx(expected, rel=2e-3)


def test_epsilon_rises_with_steps_sampling_and_less_noise_and_less_delta():
    base = epsilon_spent([run(0.02, 1.0, 200)], 1e-5)
    assert epsilon_spent([run(0.02, 1.0, 210)], 1e-5) > base
    assert epsilon_spent([run(0.021, 1.0, 200)], 1e-5) > base
    assert epsilon_spent([run(0.02, 0.97, 200)], 1e-5) > base
    assert epsilon_spent([run(0.02, 1.0, 200)], 9e-6) > base


@pytest.mark.parametrize("delta", [0.5, 1e-3, 1e-9, 1e-15])
@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.01, 1.0, 50), (0.7, 3.0, 9), (1e-5, 0.5, 1)])
def test_the_tighter_bound_is_never_the_looser_one(q, sigma, steps, delta):
    phase = run(q, sigma, steps)
    assert 0 <= pld_epsilon([phase], delta) <= rdp_epsilon([phase], delta)
    assert epsilon_spent([phase], delta) == pld_epsilon([phase], delta)


def test_phases_compose_in_any_order_and_any_pieces():
    a, b = run(0.01, 1.0, 300), run(0.02, 2.0, 100)
    together = epsilon_spent([a, b], 1e-5)
    assert epsilon_spent([b, a], 1e-5) == together
    assert epsilon_spent([run(0.01, 1.0, 100), b, run(0.01, 1.0, 200)], 1e-5) == together
    alone = [epsilon_spent([phase], 1e-5) for phase in (a, b)]
    assert max(alone) < together < sum(alone)


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon_spent([], 1e-5) == 0
    assert epsilon_spent([run(0.1, 1.0, 0)], 1e-5) == 0
    assert math.isinf(epsilon_spent([run(0.1, 0.0, 1), run(0.1, 1.0, 1)], 1e-5))
    almost_noiseless = epsilon_spent([run(0.01, 0.05, 10)], 1e-5)
    assert 500 < almost_noiseless < math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_must_be_a_probability(delta):
    with pytest.raises(InputError, match="delta="):
        epsilon_spent([run(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize("target", [0.3, 2.0, 12.0])
def test_noise_is_just_enough(target):
    sigma = find_noise_multiplier(target, 1e-5, sampling_probability=0.01, num_steps=400)
    assert epsilon_spent([run(0.01, sigma, 400)], 1e-5) <= target
    assert epsilon_spent([run(0.01, 0.995 * sigma, 400)], 1e-5) > target


def test_noise_that_cannot_be_enough_is_an_error():
    with pytest.raises(InputError, match="cannot be met"):
        find_noise_multiplier(1e-9, 1e-12, sampling_probability=1.0, num_steps=100)
    with pytest.raises(InputError, match="above 0"):
        find_noise_multiplier(0.0, 1e-5, sampling_probability=0.1, num_steps=1)


def test_the_step_that_would_exceed_the_budget_is_refused():
    budget = PrivacyBudget(1.0, 1e-5, [run(0.02, 2.0, 50)])
    num_affordable = budget.remaining_steps(0.1, 1.5)
    assert 1 < num_affordable < 1000
    for _ in range(num_affordable):
        budget.spend(0.1, 1.5)
    assert budget.remaining_steps(0.1, 1.5) == 0
    before = budget.phases
    refusal = r"would exceed epsilon=1 at delta=1e-05.*larger budget$"
    with pytest.raises(PrivacyBudgetError, match=refusal):
        budget.spend(0.1, 1.5)
    assert budget.phases == before
    assert budget.spent() <= 1.0
    assert epsilon_spent([*budget.phases, run(0.1, 1.5, 1)], 1e-5) > 1.0


def test_a_budget_returns_from_a_journal_exactly():
    budget = PrivacyBudget(0.7, 3e-6)
    for q, sigma in [(0.1 / 3, 1.1), (0.002, 0.1 + 0.7), (0.1 / 3, 1.1)]:
        budget.phases = (*budget.phases, run(q, sigma, 1))
    budget = PrivacyBudget(0.7, 3e-6, budget.phases)
    back = PrivacyBudget.restore(budget.dump())
    assert back.dump() == budget.dump()
    assert (back.epsilon, back.delta, back.phases) == (0.7, 3e-6, budget.phases)
    assert back.spent() == budget.spent()
    assert math.isinf(PrivacyBudget.restore(PrivacyBudget(math.inf, 1e-5).dump()).epsilon)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"epsilon": 1, "delta": 1e-5}',
        b'{"epsilon": 1, "delta": 2, "phases": []}',
        b'{"epsilon": 1, "delta": 1e-5, "phases": [{"sampling_probability": 2}]}',
    ],
)
def test_a_damaged_ledger_is_refused(content):
    with pytest.raises(ArtifactError, match="privacy ledger is damaged"):
        PrivacyBudget.restore(content)


def test_a_budget_must_be_positive():
    with pytest.raises(InputError, match="epsilon=0"):
        PrivacyBudget(0.0, 1e-5)
