"""FP8: weights as 8-bit floating point, E4M3, with one scale per output channel.

A scale brings the largest weight of its row to the largest number of the format, 448. Other than
integer codes, the format's steps are finer near zero; no text is needed. Inputs stay in bfloat16
(W8A16): what is saved is bytes, not arithmetic.

Shapes: O outputs, I inputs.

References:
    Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 448.0
"""Largest number of E4M3 without infinities (Micikevicius et al. 2022, table 1)."""


class FloatWeight(NamedTuple):
    """A weight in few bits of floating point: value times scale."""

    values: Tensor
    """(O, I) float8_e4m3fn."""
    scale: Tensor
    """(O, 1) bfloat16."""

    def expand(self) -> Tensor:
        """Return the (O, I) float32 weight that is stood for."""
        return self.values.float() * self.scale.float()


def quantize_fp8(weight_OI: Tensor) -> FloatWeight:
    """Round a weight to E4M3 with a scale per output.

    Args:
        weight_OI: (O, I) floating point, finite.
    """
    weight_OI = weight_OI.float()
    # Rounded first to what is stored, so that values are chosen for the scale as it will be read.
    scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True) / LARGEST).to(torch.bfloat16)
    scale_O1 = torch.where(scale_O1 == 0, torch.ones_like(scale_O1), scale_O1)
    values_OI = (weight_OI / scale_O1.float()).clamp(-LARGEST, LARGEST)
    return FloatWeight(values_OI.to(torch.float8_e4m3fn), scale_O1)
