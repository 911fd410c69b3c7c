"""GPTQ: round one input at a time, and let the inputs that are left make up for the error.

The error that counts is that of a layer's output on calibration text, which depends on its
inputs only through their Gram matrix. Inputs are taken in order of decreasing energy, so that
those that matter are rounded while many others are left to correct them; grids are chosen
beforehand, in groups of the inputs' own order, so that what is stored is what plain rounding
stores.

Left out: lazy updates of several layers at a time, and grids chosen anew as errors move in.

Shapes: O outputs, I inputs, G groups of inputs.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, section 3; the order by energy and the groups
    fixed beforehand are from its authors' later code, where they are called act_order and
    static_groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mutirao.compress.rounding.grid import Grid, QuantizedWeight, round_to_grid
from mutirao.errors import DataError

BLOCK = 128
"""Inputs after which the rest is brought up to date: bounds memory traffic, changes nothing."""


def gptq_weight(
    weight_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    bits: int,
    *,
    damping: float = 0.01,
    pruned_OI: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight so that the layer's output changes little.

    Args:
        weight_OI: (O, I) floating point, finite.
        gram_II: (I, I) mean of x x^T over calibration tokens, x the layer's input.
        grid: where codes stand, from ``grid.best_grid``.
        bits: bits per code, 1 to 8.
        damping: added to the diagonal, as a share of its mean.
        pruned_OI: (O, I) bool, weights that are zero and stay so, whatever the errors of others
            (as in SparseGPT, arXiv:2301.00774); None for none.

    Raises:
        DataError: the Gram matrix is not finite.
    """
    if not bool(torch.isfinite(gram_II).all()):
        raise DataError(
            "a layer's inputs on the calibration text are not finite; check the model's weights"
        )
    factor_II, order_I = _inverse_factor(gram_II, damping)
    group_I = torch.arange(weight_OI.shape[1]) // (weight_OI.shape[1] // grid.scale.shape[1])
    scale_OI, zero_OI = (part.float()[:, group_I[order_I]] for part in grid)
    left_OI = weight_OI.float()[:, order_I].clone()
    rounded_OI = torch.empty_like(left_OI)
    if pruned_OI is not None:
        pruned_OI = pruned_OI[:, order_I]
    for begin in range(0, left_OI.shape[1], BLOCK):
        end = min(begin + BLOCK, left_OI.shape[1])
        errors_OK = _round_block(
            left_OI[:, begin:end],
            rounded_OI[:, begin:end],
            factor_II[begin:end, begin:end],
            scale_OI[:, begin:end],
            zero_OI[:, begin:end],
            2**bits - 1,
            None if pruned_OI is None else pruned_OI[:, begin:end],
        )
        left_OI[:, end:] -= errors_OK @ factor_II[begin:end, end:]
    own_order_I = torch.argsort(order_I)
    return round_to_grid(rounded_OI[:, own_order_I], grid, bits)


def _round_block(
    left_OK: Tensor,
    rounded_OK: Tensor,
    factor_KK: Tensor,
    scale_OK: Tensor,
    zero_OK: Tensor,
    highest: int,
    pruned_OK: Tensor | None,
) -> Tensor:
    """Round the inputs of a block in turn; return what each moves to later blocks."""
    # One row per input, so that each step reads and writes memory in a line.
    left_KO, scale_KO, zero_KO = (each.T.contiguous() for each in (left_OK, scale_OK, zero_OK))
    errors_KO = torch.empty_like(left_KO)
    for k in range(len(left_KO)):
        codes_O = (left_KO[k] / scale_KO[k]).round_().add_(zero_KO[k]).clamp_(0, highest)
        weight_O = (codes_O - zero_KO[k]) * scale_KO[k]
        if pruned_OK is not None:
            weight_O.masked_fill_(pruned_OK[:, k], 0.0)
        errors_KO[k] = (left_KO[k] - weight_O) / factor_KK[k, k]
        left_KO[k + 1 :].addr_(factor_KK[k, k + 1 :], errors_KO[k], alpha=-1)
        rounded_OK[:, k] = weight_O
    return errors_KO.T


def _inverse_factor(gram_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse Gram matrix, and the order of its inputs."""
    gram_II = gram_II.float().clone()
    energy_I = gram_II.diagonal()
    energy_I[energy_I == 0] = 1.0  # an input that is never on: any weight will do
    order_I = torch.argsort(energy_I, descending=True, stable=True)
    gram_II = gram_II[order_I][:, order_I]
    share = damping
    while True:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(share * float(gram_II.diagonal().mean()))
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not int(failed):
            inverse_II = torch.cholesky_inverse(factor_II)
            upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if not int(failed):
                return upper_II, order_I
        share *= 10  # float32 was not enough for so small a damping
