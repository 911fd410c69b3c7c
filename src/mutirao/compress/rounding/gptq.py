"""GPTQ: round one input at a time, and let the inputs that are left make up for the error.

The error that counts is that of a layer's output on calibration text, which depends on its
inputs only through their Gram matrix. Inputs are taken in order of decreasing energy, so that
those that matter are rounded while many others are left to correct them; grids are chosen
beforehand, in groups of the inputs' own order, so that what is stored is what plain rounding
stores.

Grids are chosen twice: after a first rounding, the scales are fitted to the codes that came out,
and rounding is done again on the fitted grids. Ranges are shortened less than for rounding to
nearest, since a weight that makes up for others may leave its group's range.

Left out: lazy updates of several layers at a time, and grids chosen anew as errors move in.

Shapes: O outputs, I inputs, G groups of inputs.

References:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, section 3; the order by energy and the groups
    fixed beforehand are from its authors' later code, where they are called act_order and
    static_groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mutirao.compress.rounding.grid import (
    Grid,
    QuantizedWeight,
    best_grid,
    output_errors,
    round_to_grid,
)
from mutirao.errors import DataError

BLOCK = 128
"""Inputs after which the rest is brought up to date: bounds memory traffic, changes nothing."""
DAMPING = 0.01
"""Added to a Gram matrix's diagonal, as a share of its mean."""
SHORTEST = 0.8
"""Least share of a group's full range that a grid takes; docs/log.md has what it was chosen by."""
ROUNDINGS = 2
NOT_FINITE = "a layer's inputs on the calibration text are not finite; check the model's weights"
NUMBERS_AT_ONCE = 2**24
"""Of the largest tensor in fitting scales: bounds memory."""


class _InverseFactor(NamedTuple):
    """Of a damped Gram matrix whose inputs were put in order."""

    upper: Tensor
    """(I, I) upper Cholesky factor of the inverse."""
    order: Tensor
    """(I,) inputs by decreasing energy."""


def fitted_gptq(
    weight_OI: Tensor,
    gram_II: Tensor,
    bits: int,
    group_size: int | None,
    *,
    pruned_OI: Tensor | None = None,
) -> QuantizedWeight:
    """Choose grids, round, and fit the grids to the codes: of two rounds, the best for each row.

    Rows are rounded each by itself: layers with the same input may be given as one.

    Args:
        weight_OI: (O, I) floating point, finite.
        gram_II: (I, I) mean of x x^T over calibration tokens, x the layer's input.
        bits: bits per code, 1 to 8.
        group_size: weights along the input that share a grid; None for a whole row.
        pruned_OI: see ``gptq_weight``.

    Raises:
        DataError: the Gram matrix is not finite.
        ShapeError: group_size does not divide I.
    """
    grid = best_grid(weight_OI, bits, group_size, gram_II.diagonal(), shortest=SHORTEST)
    factor = _inverse_factor(gram_II)
    best: QuantizedWeight | None = None
    least_O = torch.empty(0)
    for _ in range(ROUNDINGS):
        rounded = _round_in_order(weight_OI, factor, grid, bits, pruned_OI)
        fitted = fit_scales(weight_OI, rounded, gram_II)
        grid = Grid(fitted.scale, fitted.zero)
        for each in (rounded, fitted):
            error_O = output_errors(each.expand() - weight_OI, gram_II)
            if best is None:
                best, least_O = each, error_O
                continue
            is_better_O1 = (error_O < least_O)[:, None]
            pairs = zip(each, best, strict=True)
            best = QuantizedWeight(*(torch.where(is_better_O1, new, old) for new, old in pairs))
            least_O = torch.minimum(error_O, least_O)
    assert best is not None
    return best


def fit_scales(weight_OI: Tensor, rounded: QuantizedWeight, gram_II: Tensor) -> QuantizedWeight:
    """Return the same codes with the scales whose outputs are nearest to the weight's.

    Given the codes, a row's outputs are linear in its groups' scales: least squares, for each row
    by itself. A scale that would not be positive is left as it was.

    Args:
        weight_OI: (O, I) floating point, before rounding.
        rounded: its codes.
        gram_II: (I, I) mean of x x^T over calibration tokens, x the layer's input.
    """
    gram_II = gram_II.float()
    num_inputs, num_groups = len(gram_II), rounded.scale.shape[1]
    size = num_inputs // num_groups
    rows = max(1, NUMBERS_AT_ONCE // max(num_groups**2, num_inputs))
    parts = []
    for codes_OI, scale_OG, zero_OG, part_OI in zip(
        *(torch.split(each, rows) for each in (*rounded, weight_OI)), strict=True
    ):
        steps_OGS = codes_OI.reshape(*scale_OG.shape, size).float() - zero_OG.float()[..., None]
        normal_OGG = steps_OGS.new_empty(*scale_OG.shape, num_groups)
        for g in range(num_groups):
            # What a unit of a group's scale does to the outputs, seen through the Gram matrix.
            effect_OI = steps_OGS[:, g] @ gram_II[g * size : (g + 1) * size, g * size :]
            products_OG = (effect_OI.reshape(len(steps_OGS), -1, size) * steps_OGS[:, g:]).sum(2)
            normal_OGG[:, g, g:] = normal_OGG[:, g:, g] = products_OG
        wanted_OG = ((part_OI.float() @ gram_II).reshape(steps_OGS.shape) * steps_OGS).sum(dim=2)
        diagonal_OG = normal_OGG.diagonal(dim1=1, dim2=2)
        diagonal_OG.add_(1e-6 * diagonal_OG.mean(dim=1, keepdim=True))
        fitted_OG = torch.linalg.solve_ex(normal_OGG, wanted_OG)[0].to(torch.bfloat16)
        is_usable_OG = torch.isfinite(fitted_OG) & (fitted_OG > 0)
        parts.append(torch.where(is_usable_OG, fitted_OG, scale_OG))
    return rounded._replace(scale=torch.cat(parts))


def gptq_weight(
    weight_OI: Tensor,
    gram_II: Tensor,
    grid: Grid,
    bits: int,
    *,
    damping: float = DAMPING,
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
    factor = _inverse_factor(gram_II, damping)
    return _round_in_order(weight_OI, factor, grid, bits, pruned_OI)


def _round_in_order(
    weight_OI: Tensor, factor: _InverseFactor, grid: Grid, bits: int, pruned_OI: Tensor | None
) -> QuantizedWeight:
    factor_II, order_I = factor
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


def damped_factor(gram_II: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the lower Cholesky factor of a Gram matrix with more on its diagonal.

    The share is raised until float32 is enough.

    Args:
        gram_II: (I, I), symmetric and not negative.
        damping: added to the diagonal, as a share of its mean.

    Raises:
        DataError: the matrix is not finite.
    """
    if not bool(torch.isfinite(gram_II).all()):
        raise DataError(NOT_FINITE)
    mean = float(gram_II.diagonal().mean()) or 1.0  # inputs that are never on: any will do
    while True:
        damped_II = gram_II.float().clone()
        damped_II.diagonal().add_(damping * mean)
        factor_II: Tensor
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not int(failed):
            return factor_II
        damping *= 10


def _inverse_factor(gram_II: Tensor, damping: float = DAMPING) -> _InverseFactor:
    """Return the factor of a Gram matrix's inverse."""
    gram_II = gram_II.float().clone()
    energy_I = gram_II.diagonal()
    energy_I[energy_I == 0] = 1.0  # an input that is never on: any weight will do
    order_I = torch.argsort(energy_I, descending=True, stable=True)
    gram_II = gram_II[order_I][:, order_I]
    while True:
        inverse_II = torch.cholesky_inverse(damped_factor(gram_II, damping))
        upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
        if not int(failed):
            return _InverseFactor(upper_II, order_I)
        damping *= 10  # float32 was not enough for so small a damping
