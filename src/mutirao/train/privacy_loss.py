"""The distribution of the privacy loss (PLD) of sampled Gaussian steps, composed by FFT.

The loss is log P/Q of what a step released, P and Q being its distributions under two data
sets that differ by one unit. Losses of steps add up, so that their distributions are
convolved, and δ at any ε can be read from the result (Koskela, Jälkö, Honkela 2020,
arXiv:1906.03049; Gopi, Lee, Wutschitz 2021, arXiv:2106.02848). Losses are put on a grid so
that the bound can only grow (Doroshenko et al. 2022, arXiv:2207.04380), and everything cut
off, wrapped around or lost to rounding is added to δ.

``Phase`` says which steps, and ``composed_epsilon`` what they cost in one direction, a unit
removed or added. Left out, and in ``accountant``: the larger of the two directions, steps
without noise, the bound by Rényi orders, budgets.

Shapes: C cells of the grid, K points of the grid, N points of the Fourier transform,
Z points of quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mutirao.config import Config

Vector = NDArray[np.float64]

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


def composed_epsilon(phases: Sequence[Phase], delta: float, *, removal: bool) -> float:
    """Return an upper bound on ε of all phases together, in one direction, by FFT.

    The distribution is tilted by exp(θ · loss) to be centred near ε, which makes the
    transform's rounding error small relative to δ, and untilted afterwards.

    Args:
        phases: what was done: at least one step, and noise in each.
        delta: δ, between 0 and 1.
        removal: whether the unit is removed; otherwise it is added.

    Returns:
        ε in nats, at least 0; infinite where the grid cannot hold the loss.
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


def log_sum_exp(values: Vector) -> float:
    """Return log(Σ exp(value)), without overflow."""
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
        return self.num_steps * log_sum_exp(self.log_weights + tilt * self.values)

    def moments(self, tilt: float) -> tuple[float, float]:
        """Return mean and variance over all steps, weighted by exp(tilt · loss)."""
        weights = self.tilted(tilt)
        mean = float(weights @ self.values)
        variance = float(weights @ (self.values - mean) ** 2)
        return self.num_steps * mean, self.num_steps * variance

    def tilted(self, tilt: float) -> Vector:
        """Return the weights times exp(tilt · loss), summing to 1."""
        logs = self.log_weights + tilt * self.values
        return np.exp(logs - log_sum_exp(logs))


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
        log_weights_Z - log_sum_exp(log_weights_Z),
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
