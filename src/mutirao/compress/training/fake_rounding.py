"""Linear layers that compute with rounded weights and learn as if they did not; on torchao.

The layer and the straight-through estimate of its gradient (Bengio et al. 2013, arXiv:1308.3432)
are torchao's; the grid is ``full_grid``, computed afresh in each pass, so that what is trained for
is, to the bit, what rounding to the nearest will make of the weights. The asymmetric grids that
torchao 0.18 would compute are others: with zero points in floating point they need not hold zero;
with integers, its default, they are off by 71 % of random weights' norm at any number of bits.

Imported by ``quantized_training`` alone, for torchao is optional.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

from mutirao.compress.blocks import replaced_layers
from mutirao.compress.rounding.grid import full_grid


class GridFakeQuantizer(IntxFakeQuantizer):  # type: ignore[misc]
    """Rounds weights to the grid that they will stand on; gradients pass."""

    def __init__(self, bits: int, group_size: int) -> None:
        """Make one.

        Args:
            bits: bits per code, 2 to 8.
            group_size: weights along the input that share a grid.
        """
        codes = getattr(torch, f"uint{bits}")
        super().__init__(
            IntxFakeQuantizeConfig(
                codes, group_size=group_size, is_symmetric=False, is_dynamic=False
            )
        )
        self.bits = bits

    def forward(self, weight_OI: Tensor) -> Tensor:
        grid = full_grid(weight_OI.detach(), self.bits, self.config.group_size)
        self.scale, self.zero_point = grid.scale.float(), grid.zero.int()
        rounded_OI: Tensor = super().forward(weight_OI)
        return rounded_OI


def rounded_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], bits: int, group_size: int
) -> AbstractContextManager[None]:
    """Let layers compute with rounded weights; afterwards the model has its own ones back.

    Both use the same parameters, so that what is learned stays, and sharing too.
    """
    rounded = {name: _rounded(layer, bits, group_size) for name, layer in layers.items()}
    return replaced_layers(model, rounded)


def _rounded(linear: nn.Linear, bits: int, group_size: int) -> Any:
    with torch.random.fork_rng():  # torchao draws weights before it takes the given ones
        layer = FakeQuantizedLinear.from_linear(linear)
    layer.weight_fake_quantizer = GridFakeQuantizer(bits, group_size)
    return layer
