"""Privacy accounting: what a run of noisy steps on sampled units reveals, as (ε, δ).

A step takes each unit (a patient, or a record) with probability q, independently of all
others (Poisson sampling), adds up one vector of norm at most C for each unit taken, and
releases the sum with Gaussian noise of standard deviation σ C. Neighbours are data sets
that differ by one unit, added or removed; exchanging a unit for another is two such
changes, and counts as group privacy of two. Later steps may depend on what earlier ones
released.

Two upper bounds are computed, and the lower one holds. Rényi differential privacy (RDP)
is exact per step at integer orders (Mironov, Talwar, Zhang 2019, arXiv:1908.10530) and is
turned into (ε, δ) as in Canonne, Kamath, Steinke 2020, arXiv:2004.00010. The distribution
of the privacy loss (PLD), composed by FFT (Koskela, Jälkö, Honkela 2020, arXiv:1906.03049;
Gopi, Lee, Wutschitz 2021, arXiv:2106.02848), is tighter. Its losses are put on a grid so
that the bound can only grow (Doroshenko et al. 2022, arXiv:2207.04380), and everything cut
off, wrapped around or lost to rounding is added to δ.

Left out: other mechanisms and other ways of sampling, in particular shuffled epochs, for
which these figures do not hold. Nothing here is wired into federated runs yet.

Shapes: C cells of the grid, K points of the grid, N points of the Fourier transform,
Z points of quadrature.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mutirao.artifact import canonical_json
from mutirao.config import Config
from mutirao.errors import ArtifactError, InputError

Vector = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1 + quarter / 4 for quarter in range(1, 16)),
    *range(5, 64),
    *range(64, 256, 8),
    *range(256, 1025, 64),
)
"""Rényi orders tried: low ones decide where ε is large, high ones where it is small."""

MAX_STEPS = 1_000_000
"""Most steps that a budget looks ahead."""

UNIT_ROUNDOFF = 2.0**-53
"""Relative rounding error of a float64 operation."""

TAIL_SHARE = 1e-6
"""Share of δ spent on losses too rare to be put on the grid."""

WRAP_SHARE = 1e-13
"""Tilted probability outside the Fourier transform's window, on each side."""

GRID_SHARE = 3e-5
"""Relative growth of ε that is aimed at when the grid's step is chosen."""

MAX_LOSS = 600.0
"""Largest loss of a step on the grid, in nats; its exponential must be a float64."""

MAX_CELLS = 2**18
"""Most cells of a step's grid: 0.1 s for the error functions of one."""

MAX_WINDOW = 2**21
"""Most grid steps that the composed loss is looked at over, up to a factor of 2."""


class Phase(Config):
    """Steps of one kind."""

    sampling_probability: float = Field(gt=0, le=1)
    """Probability q that a unit takes part in a step."""
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    """Standard deviation σ of the noise, as a multiple of the clipping norm."""
    num_steps: int = Field(default=1, ge=0)
    """How many steps."""


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
    return max(_composed_epsilon(merged, delta, removal) for removal in (True, False))


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
            InputError: the step would exceed the budget; nothing was entered.
        """
        if self.remaining_steps(sampling_probability, noise_multiplier) < 1:
            raise InputError(
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
    return float(np.logaddexp(0.0, _log_sum_exp(terms)))


def _log_sum_exp(values: Vector) -> float:
    top = float(values.max())
    return top if math.isinf(top) else top + math.log(float(np.exp(values - top).sum()))


@dataclass(frozen=True)
class _Losses:
    """A discrete distribution of one step's privacy loss, and how often the step is done."""

    values: Vector
    log_weights: Vector
    num_steps: int

    def log_moment(self, tilt: float) -> float:
        """Return the logarithm of E[exp(tilt · loss)] over all steps."""
        return self.num_steps * _log_sum_exp(self.log_weights + tilt * self.values)

    def moments(self, tilt: float) -> tuple[float, float]:
        """Return mean and variance over all steps, weighted by exp(tilt · loss)."""
        weights = self.tilted(tilt)
        mean = float(weights @ self.values)
        variance = float(weights @ (self.values - mean) ** 2)
        return self.num_steps * mean, self.num_steps * variance

    def tilted(self, tilt: float) -> Vector:
        """Return the weights times exp(tilt · loss), summing to 1."""
        logs = self.log_weights + tilt * self.values
        return np.exp(logs - _log_sum_exp(logs))


def _composed_epsilon(phases: Sequence[Phase], delta: float, removal: bool) -> float:
    """Return ε of one direction by FFT.

    The distribution is tilted by exp(θ · loss) to be centred near ε, which makes the
    transform's rounding error small relative to δ, and untilted afterwards.
    """
    num_steps = sum(phase.num_steps for phase in phases)
    reach = math.sqrt(2 * math.log(num_steps / (TAIL_SHARE * delta)))
    samples = [_quadrature(phase, reach, removal) for phase in phases]
    tilt, rough_epsilon = _choose_tilt(samples, delta)
    deviation = math.sqrt(sum(sample.moments(tilt)[1] for sample in samples))
    widest = max(float(np.ptp(sample.values)) for sample in samples)
    # A step h adds a variance of h² / 6 to each loss, hence about num_steps θ h² / 12 to ε.
    step = math.sqrt(12 * GRID_SHARE * rough_epsilon / (num_steps * tilt))
    step = max(min(step, deviation / 20), widest / MAX_CELLS, 20 * deviation / MAX_WINDOW)
    grids, lost = [], 0.0
    for phase, sample in zip(phases, samples, strict=True):
        grid, beyond = _discretize(phase, sample, step, removal)
        grids.append(grid)
        lost += phase.num_steps * beyond
    if lost >= delta:
        return math.inf
    epsilon = sum(grid.num_steps * float(grid.values[-1]) for grid in grids)
    # Where a few rare losses decide, as in very short runs, Chernoff's θ is too large.
    for tried in (tilt, tilt / 4, tilt / 16, tilt / 64, tilt / 1024):
        found, is_resolved = _solve(grids, tried, step, delta - lost)
        epsilon = min(epsilon, found)
        if is_resolved:
            break
    return max(0.0, epsilon)


def _quadrature(phase: Phase, reach: float, removal: bool) -> _Losses:
    """Sample one step's loss roughly, to choose tilt and grid by; no bound rests on it."""
    q, sigma = phase.sampling_probability, phase.noise_multiplier
    z_Z = np.linspace(-reach * sigma, 1 + reach * sigma, 4001)
    exponent_Z = (2 * z_Z - 1) / (2 * sigma**2)
    log_other = math.log1p(-q) if q < 1 else -math.inf
    gain_Z = np.logaddexp(log_other, math.log(q) + exponent_Z)
    log_weights_Z = -(z_Z**2) / (2 * sigma**2) + (gain_Z if removal else 0.0)
    return _Losses(
        gain_Z if removal else -gain_Z,
        log_weights_Z - _log_sum_exp(log_weights_Z),
        phase.num_steps,
    )


def _choose_tilt(samples: Sequence[_Losses], delta: float) -> tuple[float, float]:
    """Return the θ whose Chernoff bound gives the least ε, and that ε."""
    deviation = math.sqrt(sum(sample.moments(0.0)[1] for sample in samples))
    tilts = np.geomspace(1e-2, 1e2, 100) / deviation

    def chernoff(tilt: float) -> float:
        return (sum(sample.log_moment(tilt) for sample in samples) - math.log(delta)) / tilt

    tilt = min((float(tilt) for tilt in tilts), key=chernoff)
    return tilt, max(chernoff(tilt), 0.0)


def _discretize(phase: Phase, sample: _Losses, step: float, removal: bool) -> tuple[_Losses, float]:
    """Put one step's loss on multiples of ``step``; also return the probability above them.

    Each cell's probability goes to its two ends so that its mass under both distributions
    stays what it was; between the ends the trade-off curve is then a chord, which lies
    above it (Doroshenko et al. 2022, arXiv:2207.04380). Rounding errors go to the upper end.
    """
    first = math.floor(float(sample.values.min()) / step)
    last = math.ceil(min(float(sample.values.max()), MAX_LOSS) / step)
    points_K: Vector = step * np.arange(first, last + 1, dtype=np.float64)
    edges = np.concatenate([[-math.inf], points_K, [math.inf]])
    ours_C, theirs_C, error_ours_C, error_theirs_C = _cell_masses(phase, edges, removal)
    inner = slice(1, -1)
    growth_C = np.exp(points_K[:-1])
    excess_C = ours_C[inner] - growth_C * theirs_C[inner]
    excess_C += error_ours_C[inner] + growth_C * error_theirs_C[inner]
    upper_C = np.clip(excess_C / -math.expm1(-step), 0.0, ours_C[inner])
    mass_K = np.zeros(len(points_K))
    mass_K[0] += ours_C[0]
    mass_K[:-1] += ours_C[inner] - upper_C
    mass_K[1:] += upper_C
    with np.errstate(divide="ignore"):
        log_mass_K: Vector = np.log(mass_K)
    return _Losses(points_K, log_mass_K, phase.num_steps), float(ours_C[-1])


def _cell_masses(
    phase: Phase, edges: Vector, removal: bool
) -> tuple[Vector, Vector, Vector, Vector]:
    """Return the probability of each cell of losses under both distributions, and their errors.

    Args:
        phase: q and σ.
        edges: rising losses, from minus to plus infinity.
        removal: whether the first distribution is the one with the unit.
    """
    q, sigma = phase.sampling_probability, phase.noise_multiplier
    z = 0.5 + sigma**2 * _exponent_at(edges if removal else -edges[::-1], q)
    plain, plain_error = _normal_masses(z / sigma)
    shifted, shifted_error = _normal_masses((z - 1) / sigma)
    mixed = (1 - q) * plain + q * shifted
    mixed_error = (1 - q) * plain_error + q * shifted_error
    if removal:
        return mixed, plain, mixed_error, plain_error
    return plain[::-1], mixed[::-1], plain_error[::-1], mixed_error[::-1]


def _exponent_at(gain: Vector, q: float) -> Vector:
    """Return t where log(1 - q + q exp(t)) is ``gain``; minus infinity below its least value."""
    if q == 1:
        return gain
    with np.errstate(divide="ignore", over="ignore"):
        return gain - math.log(q) + np.log1p(np.maximum(-(1 - q) * np.exp(-gain), -1.0))


def _normal_masses(edges: Vector) -> tuple[Vector, Vector]:
    """Return the standard normal probability between neighbouring edges, and its error."""
    root = math.sqrt(0.5)
    below = 0.5 * np.fromiter(map(math.erfc, (-root * edges).tolist()), np.float64, len(edges))
    above = 0.5 * np.fromiter(map(math.erfc, (root * edges).tolist()), np.float64, len(edges))
    is_right = edges[:-1] > 0
    mass = np.where(is_right, above[:-1] - above[1:], below[1:] - below[:-1])
    size = np.where(is_right, above[:-1], below[1:])
    # erfc's own error and that of its argument, out to 11 standard deviations.
    return np.maximum(mass, 0.0), 256 * UNIT_ROUNDOFF * size


def _solve(grids: Sequence[_Losses], tilt: float, step: float, delta: float) -> tuple[float, bool]:
    """Compose the grids; return the least ε whose δ, all errors counted, is small enough.

    Also returns whether another tilt could hardly do better.
    """
    log_moment = sum(grid.log_moment(tilt) for grid in grids)
    low, high = _window(grids, tilt)
    if not high - low < 2 * MAX_WINDOW * step:
        return math.inf, False
    start = math.floor(low / step)
    size = 2 ** math.ceil(math.log2(high / step - start + 2))
    composed_N = np.roll(_compose(grids, tilt, step, size), -(start % size))
    losses_N = step * np.arange(start, start + size)
    is_seen = losses_N > max(0.0, low)
    losses_N, composed_N = losses_N[is_seen], np.maximum(composed_N[is_seen], 0.0)
    weights_N = np.exp(log_moment - tilt * losses_N)
    outside = WRAP_SHARE * math.exp(log_moment - tilt * high)
    # Relative error of a transform in the 2-norm, about 4 log2(N) roundings (Higham 2002,
    # theorem 24.2); a power has as many times more; then Cauchy and Schwarz.
    num_steps = sum(grid.num_steps for grid in grids)
    rounding = 4 * UNIT_ROUNDOFF * math.log2(size) * (num_steps + 2)
    # Each step's weight is off by a few hundred roundings at most, being an exponential.
    growth = 1 + 1e-9 + 512 * UNIT_ROUNDOFF * num_steps

    def error_at(epsilon: float) -> float:
        gains_N = -np.expm1(np.minimum(epsilon - losses_N, 0.0))
        return rounding * float(np.linalg.norm(weights_N * gains_N)) + outside

    def delta_at(epsilon: float) -> float:
        gains_N = -np.expm1(np.minimum(epsilon - losses_N, 0.0))
        return growth * float((weights_N * composed_N) @ gains_N) + error_at(epsilon)

    low = max(0.0, low)
    epsilon = _least(delta_at, delta, low, max(low, high))
    is_resolved = (epsilon > low or low == 0) and error_at(min(epsilon, high)) < 1e-3 * delta
    return epsilon, is_resolved or epsilon == 0


def _compose(grids: Sequence[_Losses], tilt: float, step: float, size: int) -> Vector:
    """Return the tilted distribution of the sum of all losses, wrapped around (size,)."""
    spectrum = np.ones(size // 2 + 1, np.complex128)
    for grid in grids:
        indices = np.rint(grid.values / step).astype(np.int64) % size
        folded = np.bincount(indices, grid.tilted(tilt), size)
        spectrum *= np.fft.rfft(folded) ** grid.num_steps
    return np.fft.irfft(spectrum, size)


def _least(delta_at: Callable[[float], float], delta: float, low: float, high: float) -> float:
    """Return an ε, within a billionth of the least, at which ``delta_at`` is at most δ."""
    if delta_at(low) <= delta:
        return low
    if delta_at(high) > delta:
        return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
    return high


def _window(grids: Sequence[_Losses], tilt: float) -> tuple[float, float]:
    """Return losses outside of which the tilted sum lies with ``WRAP_SHARE`` at most, each side.

    By Chernoff's bound, at a few exponents.
    """
    deviation = math.sqrt(sum(grid.moments(tilt)[1] for grid in grids))
    if deviation == 0:
        return -math.inf, math.inf
    centre = sum(grid.log_moment(tilt) for grid in grids)
    above, below = [], []
    for exponent in np.arange(0.5, 12.5, 0.5) / deviation:
        rise = sum(grid.log_moment(tilt + exponent) for grid in grids) - centre
        fall = sum(grid.log_moment(tilt - exponent) for grid in grids) - centre
        above.append((rise - math.log(WRAP_SHARE)) / exponent)
        below.append((math.log(WRAP_SHARE) - fall) / exponent)
    return float(max(below)), float(min(above))
