"""Weights on evenly spaced grids: each group of a layer's weights has its own.

A grid always holds zero; weights go to the nearest point of it. It runs from the smallest to
the largest weight of its group, or over the shorter range with the smaller error: with few
bits, a step that is finer for all is worth more than a few weights at the ends.

Shapes: O outputs, I inputs, G groups of inputs, S weights in a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mutirao.errors import ShapeError

RANGE_STEP = 1 / 40
SHORTEST = 0.4
"""Least share of the full range that is tried. Assumption: at 2 bits, the best range of a normal
weight is near half of its extremes."""


class Grid(NamedTuple):
    """Where the codes of a layer stand: weight = (code - zero) * scale."""

    scale: Tensor
    """(O, G) bfloat16."""
    zero: Tensor
    """(O, G) uint8: the code of zero."""


class QuantizedWeight(NamedTuple):
    """Codes and the grid they stand on: weight = (code - zero) * scale."""

    codes: Tensor
    """(O, I) uint8."""
    scale: Tensor
    """(O, G) bfloat16."""
    zero: Tensor
    """(O, G) uint8: the code of zero."""

    def expand(self) -> Tensor:
        """Return the (O, I) float32 weight that the codes stand for."""
        num_outputs, num_groups = self.scale.shape
        codes_OGS = self.codes.reshape(num_outputs, num_groups, -1).float()
        weight_OGS = (codes_OGS - self.zero.float()[..., None]) * self.scale.float()[..., None]
        return weight_OGS.reshape(self.codes.shape)


def quantize_weight(weight_OI: Tensor, bits: int, group_size: int | None) -> QuantizedWeight:
    """Round a weight to codes of a few bits, over each group's full range.

    Args:
        weight_OI: (O, I) floating point, finite.
        bits: bits per code, 1 to 8.
        group_size: weights along the input that share a grid; None for a whole row.

    Raises:
        ShapeError: group_size does not divide I.
    """
    grid = full_grid(weight_OI, bits, group_size)
    return round_to_grid(weight_OI, grid, bits)


def full_grid(weight_OI: Tensor, bits: int, group_size: int | None) -> Grid:
    """Return the grids that reach over all weights of each group.

    Args:
        weight_OI: (O, I) floating point, finite.
        bits: bits per code, 1 to 8.
        group_size: weights along the input that share a grid; None for a whole row.

    Raises:
        ShapeError: group_size does not divide I.
    """
    return _grid(_groups(weight_OI, group_size), bits, 1.0)


def best_grid(
    weight_OI: Tensor,
    bits: int,
    group_size: int | None,
    importance_I: Tensor | None = None,
    *,
    shortest: float = SHORTEST,
) -> Grid:
    """Return the grids with the least squared error among shorter and full ranges.

    Args:
        weight_OI: (O, I) floating point, finite.
        bits: bits per code, 1 to 8.
        group_size: weights along the input that share a grid; None for a whole row.
        importance_I: (I,) what a squared error of each input's weight counts: the mean square
            of the input; None for all alike.
        shortest: least share of the full range that is tried.

    Raises:
        ShapeError: group_size does not divide I.
    """
    groups_OGS = _groups(weight_OI, group_size)
    counts_GS = torch.ones_like(groups_OGS[0])
    if importance_I is not None:
        counts_GS = importance_I.float().reshape(counts_GS.shape)
    best = _grid(groups_OGS, bits, 1.0)
    least_OG = torch.full(best.scale.shape, torch.inf)
    for step in range(round((1 - shortest) / RANGE_STEP) + 1):
        grid = _grid(groups_OGS, bits, 1 - step * RANGE_STEP)
        errors_OGS = (_rounded(groups_OGS, grid, bits) - grid.zero.float()[..., None]) * (
            grid.scale.float()[..., None]
        ) - groups_OGS
        error_OG = (errors_OGS.square() * counts_GS).sum(dim=2)
        is_better_OG = error_OG < least_OG
        least_OG = torch.where(is_better_OG, error_OG, least_OG)
        best = Grid(
            torch.where(is_better_OG, grid.scale, best.scale),
            torch.where(is_better_OG, grid.zero, best.zero),
        )
    return best


def round_to_grid(weight_OI: Tensor, grid: Grid, bits: int) -> QuantizedWeight:
    """Move each weight to the nearest point of its group's grid."""
    groups_OGS = weight_OI.float().reshape(*grid.scale.shape, -1)
    codes_OGS = _rounded(groups_OGS, grid, bits)
    return QuantizedWeight(codes_OGS.to(torch.uint8).reshape(weight_OI.shape), *grid)


def output_error(error_OI: Tensor, gram_II: Tensor) -> float:
    """Return the mean square change of a layer's outputs, summed over them: trace(E G E^T)."""
    return float(output_errors(error_OI, gram_II).sum())


def output_errors(error_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Return (O,) the mean square change of each of a layer's outputs."""
    return (error_OI @ gram_II * error_OI).sum(dim=1)


def name_bits(widths: Iterable[int]) -> str:
    """Return what layers have, in words: '4 bits', or '2, 3 and 8 bits'."""
    *others, last = map(str, sorted(set(widths)))
    return f"{', '.join(others)} and {last} bits" if others else f"{last} bits"


def check_group_size(num_inputs: int, group_size: int | None) -> None:
    """Refuse groups that do not divide a layer's inputs.

    Raises:
        ShapeError: they do not.
    """
    if group_size and num_inputs % group_size:
        raise ShapeError(
            f"compress.group_size={group_size} does not divide a layer's {num_inputs} inputs; "
            "choose a divisor such as 32 or 64"
        )


def _groups(weight_OI: Tensor, group_size: int | None) -> Tensor:
    num_outputs, num_inputs = weight_OI.shape
    check_group_size(num_inputs, group_size)
    return weight_OI.float().reshape(num_outputs, -1, group_size or num_inputs)


def _grid(groups_OGS: Tensor, bits: int, share: float) -> Grid:
    """Return grids over a share of each group's range."""
    highest = 2**bits - 1
    low_OG = groups_OGS.amin(dim=2).clamp(max=0.0) * share
    high_OG = groups_OGS.amax(dim=2).clamp(min=0.0) * share
    # Rounded first to what is stored, so that codes are chosen for the grid as it will be read.
    scale_OG = ((high_OG - low_OG) / highest).to(torch.bfloat16)
    scale_OG = torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)
    zero_OG = (-low_OG / scale_OG.float()).round().clamp(0, highest)
    return Grid(scale_OG, zero_OG.to(torch.uint8))


def _rounded(groups_OGS: Tensor, grid: Grid, bits: int) -> Tensor:
    """Return (O, G, S) codes, as floating point."""
    codes_OGS = (groups_OGS / grid.scale.float()[..., None]).round()
    return (codes_OGS + grid.zero.float()[..., None]).clamp(0, 2**bits - 1)
