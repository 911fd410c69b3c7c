"""Weights on evenly spaced grids: each group of a layer's weights has its own.

The grid runs from the smallest to the largest weight of the group and always holds zero;
weights go to the nearest point of it. Choosing grids by what the layer sees is left to
other methods.

Shapes: O outputs, I inputs, G groups of inputs, S weights in a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mutirao.errors import ShapeError


class QuantizedWeight(NamedTuple):
    """Codes and the grid they stand on: weight = (code - zero) * scale."""

    codes: Tensor
    """(O, I) uint8."""
    scale: Tensor
    """(O, G) bfloat16."""
    zero: Tensor
    """(O, G) uint8: the code of zero."""


def quantize_weight(weight_OI: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Round a weight to codes of a few bits.

    Args:
        weight_OI: (O, I) floating point, finite.
        bits: bits per code, 1 to 8.
        group_size: weights along the input that share a grid.

    Raises:
        ShapeError: group_size does not divide I.
    """
    num_outputs, num_inputs = weight_OI.shape
    if num_inputs % group_size:
        raise ShapeError(
            f"compress.group_size={group_size} does not divide a layer's {num_inputs} inputs; "
            "choose a divisor such as 32 or 64"
        )
    highest = 2**bits - 1
    groups_OGS = weight_OI.float().reshape(num_outputs, -1, group_size)
    low_OG = groups_OGS.amin(dim=2).clamp(max=0.0)
    high_OG = groups_OGS.amax(dim=2).clamp(min=0.0)
    # Rounded first to what is stored, so that codes are chosen for the grid as it will be read.
    scale_OG = ((high_OG - low_OG) / highest).to(torch.bfloat16)
    scale_OG = torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)
    step_OG = scale_OG.float()
    zero_OG = (-low_OG / step_OG).round().clamp(0, highest)
    codes_OGS = (groups_OGS / step_OG[..., None]).round() + zero_OG[..., None]
    codes_OI = codes_OGS.clamp(0, highest).to(torch.uint8).reshape(num_outputs, num_inputs)
    return QuantizedWeight(codes_OI, scale_OG, zero_OG.to(torch.uint8))
