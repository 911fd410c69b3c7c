"""Privacy accounting: what a run of noisy steps on sampled units reveals, as (ε, δ).

A step takes each unit (a patient, or a record) with probability q, independently of all
others (Poisson sampling), adds up one vector of norm at most C for each unit taken, and
releases the sum with Gaussian noise of standard deviation σ C. Neighbours are data sets
that differ by one unit, added or removed; exchanging a unit for another is two such
changes, and counts as group privacy of two. Later steps may depend on what earlier ones
released.

Two upper bounds are computed, and the lower one holds. Rényi differential privacy (RDP),
computed here, is exact per step at integer orders (Mironov, Talwar, Zhang 2019,
arXiv:1908.10530) and is turned into (ε, δ) as in Canonne, Kamath, Steinke 2020,
arXiv:2004.00010. The distribution of the privacy loss (PLD) is tighter; its arithmetic is
``privacy_loss``. Here too: the least noise that an ε allows, and the budget that a run is
paid from.

Left out: other mechanisms and other ways of sampling, in particular shuffled epochs, for
which these figures do not hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import ValidationError

from mutirao.artifact import canonical_json
from mutirao.errors import ArtifactError, InputError, PrivacyBudgetError
from mutirao.train.privacy_loss import Phase, composed_epsilon, log_sum_exp

__all__ = [
    "MAX_STEPS",
    "ORDERS",
    "Phase",
    "PrivacyBudget",
    "epsilon_spent",
    "find_noise_multiplier",
    "is_within",
    "merge_phases",
    "pld_epsilon",
    "rdp",
    "rdp_epsilon",
]

ORDERS: tuple[float, ...] = (
    *(1 + quarter / 4 for quarter in range(1, 16)),
    *range(5, 64),
    *range(64, 256, 8),
    *range(256, 1025, 64),
)
"""Rényi orders tried: low ones decide where ε is large, high ones where it is small."""

MAX_STEPS = 1_000_000
"""Most steps that a budget looks ahead."""


def merge_phases(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Return the phases with those of one kind as one, in an order that depends on nothing."""
    steps: dict[tuple[float, float], int] = {}
    for phase in phases:
        kind = (phase.sampling_probability, phase.noise_multiplier)
        steps[kind] = steps.get(kind, 0) + phase.num_steps
    return tuple(
        Phase(sampling_probability=q, noise_multiplier=sigma, num_steps=num)
        for (q, sigma), num in sorted(steps.items())
        if num
    )


def epsilon_spent(phases: Iterable[Phase], delta: float) -> float:
    """Return the smallest ε that is proved for all phases together.

    Args:
        phases: what was done, in any order.
        delta: δ, between 0 and 1, far below one over the number of units.

    Returns:
        ε in nats; 0 before the first step, infinite where a step had no noise.

    Raises:
        InputError: delta is not between 0 and 1.
    """
    merged = _checked(phases, delta)
    return min(rdp_epsilon(merged, delta), pld_epsilon(merged, delta))


def is_within(phases: Iterable[Phase], delta: float, epsilon: float) -> bool:
    """Whether ``epsilon_spent`` is at most ε; quicker than the number where that is plain."""
    merged = _checked(phases, delta)
    return rdp_epsilon(merged, delta) <= epsilon or pld_epsilon(merged, delta) <= epsilon


def rdp(sampling_probability: float, noise_multiplier: float, order: float) -> float:
    """Return the Rényi divergence of one step, in nats.

    Exact at integer orders and without sampling; between integers (α - 1) times the
    divergence, the logarithm of a moment, is convex in α, so that the chord lies above it.

    Args:
        sampling_probability: q, above 0, at most 1.
        noise_multiplier: σ, above 0.
        order: α, above 1.

    References:
        Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3: the sum at integer orders,
        and that removing a unit is the worse direction.
    """
    if sampling_probability == 1:
        return order / (2 * noise_multiplier**2)
    low = math.floor(order)
    share = order - low
    log_moment = (1 - share) * _log_moment(sampling_probability, noise_multiplier, low)
    if share:
        log_moment += share * _log_moment(sampling_probability, noise_multiplier, low + 1)
    return log_moment / (order - 1)


def rdp_epsilon(phases: Iterable[Phase], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """Return the bound on ε by Rényi differential privacy; see ``epsilon_spent``.

    References:
        Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12.
    """
    merged = _checked(phases, delta)
    if not merged:
        return 0.0
    if _is_noiseless(merged):
        return math.inf

    def bound(order: float) -> float:
        divergence = sum(
            phase.num_steps * rdp(phase.sampling_probability, phase.noise_multiplier, order)
            for phase in merged
        )
        return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    return max(0.0, min(bound(order) for order in orders))


def pld_epsilon(phases: Iterable[Phase], delta: float) -> float:
    """Return the bound on ε by the composed privacy loss; see ``epsilon_spent``.

    Removing and adding a unit are composed apart, each with its dominating pair of
    distributions (Zhu, Dong, Wang 2022, arXiv:2106.08567); the larger ε counts.

    Returns:
        ε in nats; infinite where the grid cannot hold the loss, as with very little noise.
    """
    merged = _checked(phases, delta)
    if not merged:
        return 0.0
    if _is_noiseless(merged):
        return math.inf
    return max(composed_epsilon(merged, delta, removal=removal) for removal in (True, False))


def find_noise_multiplier(
    target_epsilon: float, delta: float, *, sampling_probability: float, num_steps: int
) -> float:
    """Return the least noise, to a thousandth, with which a run stays within ε.

    Args:
        target_epsilon: ε to stay within, in nats, above 0.
        delta: δ, between 0 and 1.
        sampling_probability: q of each step.
        num_steps: steps of the whole run, at least 1.

    Returns:
        σ, with ``epsilon_spent`` at most ``target_epsilon``.

    Raises:
        InputError: no noise up to a million times the clipping norm is enough, or a value
            is not accepted.
    """
    if not target_epsilon > 0 or num_steps < 1:
        raise InputError(
            f"epsilon={target_epsilon:g} in {num_steps} steps cannot be met (expected an epsilon "
            "above 0 and at least one step)"
        )

    def is_enough(sigma: float) -> bool:
        phase = Phase(
            sampling_probability=sampling_probability, noise_multiplier=sigma, num_steps=num_steps
        )
        return is_within([phase], delta, target_epsilon)

    high = 1.0
    while not is_enough(high):
        high *= 2
        if high > 1e6:
            raise InputError(
                f"epsilon={target_epsilon:g} at delta={delta:g} cannot be met in {num_steps} "
                "steps; take fewer steps, smaller samples or a larger epsilon"
            )
    low = high / 2
    while is_enough(low):
        high, low = low, low / 2
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


class PrivacyBudget:
    """What may be spent, what was spent, and a refusal of the step that would exceed it.

    A step is to be entered, and the ledger kept on disk, before anything of the step is
    seen: a step that is done again after a crash is a second release and counts twice.
    """

    def __init__(self, epsilon: float, delta: float, phases: Iterable[Phase] = ()) -> None:
        """Open a budget.

        Args:
            epsilon: most that may be spent, in nats, above 0; infinite to keep count only.
            delta: δ at which ε is stated.
            phases: what was spent before.

        Raises:
            InputError: epsilon or delta is not accepted.
        """
        if not epsilon > 0:
            raise InputError(f"epsilon={epsilon:g} is not accepted (expected a number above 0)")
        self.epsilon = epsilon
        self.delta = delta
        self.phases = _checked(phases, delta)
        self._limit: tuple[tuple[Phase, ...], Phase, int] | None = None

    def spent(self) -> float:
        """Return ε of all steps so far, in nats."""
        return epsilon_spent(self.phases, self.delta)

    def remaining_steps(self, sampling_probability: float, noise_multiplier: float) -> int:
        """Return how many more steps of one kind are affordable, at most ``MAX_STEPS``."""
        if math.isinf(self.epsilon):
            return MAX_STEPS
        kind = Phase(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier)
        others = tuple(phase for phase in self.phases if not _is_alike(phase, kind))
        done = sum(phase.num_steps for phase in self.phases if _is_alike(phase, kind))
        # Found once for steps of one kind: below the limit, fewer steps never cost more.
        if self._limit is None or self._limit[:2] != (others, kind):
            self._limit = (others, kind, self._most_steps(others, kind))
        return max(0, self._limit[2] - done)

    def spend(self, sampling_probability: float, noise_multiplier: float) -> None:
        """Enter one step.

        Raises:
            PrivacyBudgetError: the step would exceed the budget; nothing was entered.
        """
        if self.remaining_steps(sampling_probability, noise_multiplier) < 1:
            raise PrivacyBudgetError(
                f"one more step with q={sampling_probability:g} and noise multiplier "
                f"{noise_multiplier:g} would exceed epsilon={self.epsilon:g} at "
                f"delta={self.delta:g} (spent so far: {self.spent():.4g}); stop here, or agree "
                "on a larger budget"
            )
        step = Phase(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier)
        self.phases = merge_phases((*self.phases, step))

    def dump(self) -> bytes:
        """Return the budget and its ledger as JSON, for a journal; see ``restore``."""
        phases = [phase.model_dump(mode="json") for phase in self.phases]
        epsilon = None if math.isinf(self.epsilon) else self.epsilon
        return canonical_json({"epsilon": epsilon, "delta": self.delta, "phases": phases})

    @classmethod
    def restore(cls, content: bytes) -> PrivacyBudget:
        """Return the budget that was dumped, exactly: ε follows from the ledger alone.

        Raises:
            ArtifactError: the content is damaged.
        """
        try:
            state: dict[str, Any] = json.loads(content)
            phases = [Phase.model_validate(phase) for phase in state["phases"]]
            epsilon = math.inf if state["epsilon"] is None else float(state["epsilon"])
            return cls(epsilon, float(state["delta"]), phases)
        except (ValueError, KeyError, TypeError, ValidationError, InputError) as error:
            what = str(error).partition("\n")[0]
            raise ArtifactError(
                f"the privacy ledger is damaged ({what}); without it nothing more may be trained "
                "on these units: restore it from a copy"
            ) from None

    def _most_steps(self, others: tuple[Phase, ...], kind: Phase) -> int:
        def fits(num_steps: int) -> bool:
            run = kind.model_copy(update={"num_steps": num_steps})
            return is_within((*others, run), self.delta, self.epsilon)

        low, high = 0, 1
        while high < MAX_STEPS and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return min(low, MAX_STEPS)


def _checked(phases: Iterable[Phase], delta: float) -> tuple[Phase, ...]:
    if not 0 < delta < 1:
        raise InputError(f"delta={delta:g} is not accepted (expected a number between 0 and 1)")
    return merge_phases(phases)


def _is_noiseless(phases: Iterable[Phase]) -> bool:
    return any(phase.noise_multiplier == 0 for phase in phases)


def _is_alike(one: Phase, other: Phase) -> bool:
    return (one.sampling_probability, one.noise_multiplier) == (
        other.sampling_probability,
        other.noise_multiplier,
    )


@lru_cache(maxsize=4096)
def _log_moment(q: float, sigma: float, order: int) -> float:
    """Return log E[(P/Q)^order] under Q, P being the mixture with the unit, Q without it.

    The binomial terms add up to 1; what exceeds 1 is a sum of positive terms, so that
    nothing cancels.
    """
    if order < 2:
        return 0.0
    k = np.arange(2, order + 1, dtype=np.float64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1)))])
    log_choose = log_factorial[order] - log_factorial[2:] - log_factorial[order - 2 :: -1]
    exponent = (k * k - k) / (2 * sigma**2)
    terms = log_choose + k * math.log(q) + (order - k) * math.log1p(-q)
    terms += exponent + np.log(-np.expm1(-exponent))
    return float(np.logaddexp(0.0, log_sum_exp(terms)))
