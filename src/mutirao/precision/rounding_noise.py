"""How much of Gaussian weights is lost by rounding them: noise power over signal power.

Weights are taken as independent and normal with mean zero, which real weights are only roughly.
Blocks of them are scaled as their format says, and each weight goes to the nearest point. The
expectation is computed without drawing a number: the extremes of a block by their order
statistics on a fixed grid of quantiles, everything between them by the normal distribution's
partial moments in closed form.

Left out: clipped ranges, rounding against data (GPTQ), rotations, outliers. What is computed is
plain rounding to nearest over the full range, the worst that a format does to Gaussian weights.

Shapes: B quantiles of a block's extremes, K points of a format.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

NUM_QUANTILES = 2048
"""Quantiles of a block's largest magnitude. The tests hold the result to sampled noise."""
NUM_QUANTILES_BY_SIDE = 64
"""Quantiles of the smallest and of the largest weight; their product is what is summed."""
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def exact_scale(peak_B: Floats, top: float) -> Floats:
    """Return the scale that puts a block's peak on the highest point, not rounded."""
    return peak_B / top


def power_of_two_scale(peak_B: Floats, top: float) -> Floats:
    """Return the scale of microscaling formats (E8M0), with which a peak may saturate.

    References:
        Open Compute Project 2023, Microscaling Formats (MX) v1.0, section 6.3.
    """
    scale_B: Floats = np.exp2(np.floor(np.log2(peak_B)) - math.floor(math.log2(top)))
    return scale_B


def e4m3_scale(peak_B: Floats, top: float) -> Floats:
    """Return the scale with three bits after the leading one; its own range is never left.

    A further scale for the whole tensor, in 32 bits, keeps block scales normal (assumption: no
    block's peak is below 2⁻¹⁴ of the tensor's).
    """
    exact_B = peak_B / top
    unit_B = np.exp2(np.floor(np.log2(exact_B)) - 3)
    scale_B: Floats = np.rint(exact_B / unit_B) * unit_B
    return scale_B


def absmax_noise(
    levels: tuple[float, ...], block_size: int, scale: Callable[[Floats, float], Floats]
) -> float:
    """Return the relative noise power where a block's scale comes from its largest magnitude.

    Where the scale is rounded, the result depends on where the standard deviation lies between
    two powers of two; all such places count alike.

    Args:
        levels: the format's points, ascending, with as large a magnitude at both ends.
        block_size: weights that share a scale, at least 2.
        scale: one of the rules above.

    Returns:
        E[(rounded - weight)²] / E[weight²], dimensionless.
    """
    count_B = np.arange(NUM_QUANTILES)
    # |weight| has distribution 2 Φ - 1; the tail is kept apart, for it is small in large blocks.
    tail_B = -np.expm1(np.log((count_B + 0.5) / NUM_QUANTILES) / block_size)
    peak_B = -ndtri(tail_B / 2)
    phase_B = np.exp2((count_B * _GOLDEN_RATIO) % 1.0)
    scale_B = scale(peak_B * phase_B, levels[-1]) / phase_B
    points_BK = scale_B[:, None] * np.asarray(levels)
    peak_error_B = np.abs(points_BK - peak_B[:, None]).min(axis=1) ** 2
    inner_B = _error_between(points_BK, -peak_B, peak_B)
    return float(np.mean(peak_error_B + (block_size - 1) * inner_B) / block_size)


def range_noise(num_levels: int, block_size: int) -> float:
    """Return the relative noise power of even steps from a block's lowest to highest weight.

    Zero is one of the points, so that the grid is moved to whole steps from it, and weights past
    its ends saturate.

    Args:
        num_levels: points of the grid, at least 2.
        block_size: weights that share a scale and a zero point, at least 3.
    """
    quantile_B = (np.arange(NUM_QUANTILES_BY_SIDE) + 0.5) / NUM_QUANTILES_BY_SIDE
    u_B, v_B = (each.ravel() for each in np.meshgrid(quantile_B, quantile_B))
    tail_B = -np.expm1(np.log(u_B) / block_size)
    high_B = -ndtri(tail_B)
    low_B = ndtri((1 - tail_B) * -np.expm1(np.log(v_B) / (block_size - 1)))
    bottom_B, top_B = np.minimum(low_B, 0.0), np.maximum(high_B, 0.0)
    step_B = (top_B - bottom_B) / (num_levels - 1)
    zero_B = np.clip(np.rint(-bottom_B / step_B), 0, num_levels - 1)
    points_BK = (np.arange(num_levels) - zero_B[:, None]) * step_B[:, None]
    ends_B = sum(np.abs(points_BK - end[:, None]).min(axis=1) ** 2 for end in (low_B, high_B))
    inner_B = _error_between(points_BK, low_B, high_B)
    return float(np.mean(ends_B + (block_size - 2) * inner_B) / block_size)


def cast_noise(mantissa_bits: int) -> float:
    """Return the relative noise power of a cast to a float without a scale, wide in range.

    Between two powers of two a float has even steps; the error is uniform within a step.
    """
    low = np.exp2(np.arange(-60, 6))
    share = 2 * (ndtr(2 * low) - ndtr(low))
    return float(np.sum(share * (low * 2.0**-mantissa_bits) ** 2 / 12))


def _error_between(points_BK: Floats, low_B: Floats, high_B: Floats) -> Floats:
    """Return E[(nearest point - x)²] of a normal x that is known to lie between two bounds."""
    middle_BK = (points_BK[:, 1:] + points_BK[:, :-1]) / 2
    edges_BK = np.column_stack([low_B, middle_BK, high_B])
    edges_BK = np.clip(edges_BK, low_B[:, None], high_B[:, None])
    cdf_BK = ndtr(edges_BK)
    pdf_BK = np.exp(-(edges_BK**2) / 2) / math.sqrt(2 * math.pi)
    mass_BK = np.diff(cdf_BK)
    first_BK = -np.diff(pdf_BK)
    second_BK = mass_BK - np.diff(edges_BK * pdf_BK)
    error_BK = second_BK - 2 * points_BK * first_BK + points_BK**2 * mass_BK
    total_B: Floats = error_BK.sum(axis=1) / (cdf_BK[:, -1] - cdf_BK[:, 0])
    return total_B
