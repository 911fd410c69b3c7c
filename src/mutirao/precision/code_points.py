"""The numbers that a small float or a codebook can hold, in units of its scale.

Left out: infinities and NaN, which rounding of weights never produces, and codes that repeat a
number (minus zero).
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri  # type: ignore[import-untyped]

from mutirao.errors import InputError


def float_levels(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Return all finite numbers of a small float, ascending, subnormal numbers included.

    References:
        Micikevicius et al. 2022, arXiv:2209.05433 (E4M3 without infinities, up to 448; E5M2 up
        to 57344); Open Compute Project 2023, MX v1.0, section 5.3 (E3M2, E2M3, E2M1, which have
        neither infinities nor NaN).
    """
    tops = {(4, 3): 448.0, (5, 2): 57344.0, (3, 2): 28.0, (2, 3): 7.5, (2, 1): 6.0}
    if (exponent_bits, mantissa_bits) not in tops:
        known = ", ".join(f"e{e}m{m}" for e, m in tops)
        raise InputError(
            f"float e{exponent_bits}m{mantissa_bits} is not known (expected one of {known})"
        )
    bias = 2 ** (exponent_bits - 1) - 1
    unit = 2.0 ** (1 - bias - mantissa_bits)
    size = 2**mantissa_bits
    subnormal = [unit * fraction for fraction in range(size)]
    normal = [
        unit * 2**exponent * (size + fraction)
        for exponent in range(2**exponent_bits - 1)
        for fraction in range(size)
    ]
    top = tops[exponent_bits, mantissa_bits]
    positive = [number for number in subnormal + normal if 0 < number <= top]
    return (*(-number for number in reversed(positive)), 0.0, *positive)


def nf4_levels() -> tuple[float, ...]:
    """Return the sixteen points of NF4: quantiles of a normal weight, zero one of them.

    References:
        Dettmers et al. 2023, arXiv:2305.14314, section 3; eight points above zero, seven below.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    above = ndtri(np.linspace(0.5, edge, 9)[1:])
    below = -ndtri(np.linspace(0.5, edge, 8)[1:])
    return (*sorted((below / -below.min()).tolist()), 0.0, *(above / above.max()).tolist())
