"""Ways of rounding a model: their bytes, and the noise that each adds to its weights.

The noise is that of this model's weights, not of a distribution: every linear layer is rounded to
nearest, and the squared error is taken over the squared weight, over all layers together. Better
methods leave other errors on the same grids; the law's constant for a method takes that up.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from mutirao.compress.rounding.grid import quantize_weight

SCALE_BITS = 16


@dataclass(frozen=True)
class Way:
    """One way to round all linear layers of the blocks."""

    method: str
    bits: int
    group_size: int | None
    """None for one scale a row."""

    def __str__(self) -> str:
        where = f"groups of {self.group_size}" if self.group_size else "rows"
        return f"{self.bits} bits in {where} by {self.method}"


@dataclass(frozen=True)
class Shape:
    """What a model's bytes are counted from."""

    layers: Mapping[str, tuple[int, int]]
    """(O, I) of each linear layer of the blocks."""
    num_weights: int
    """All parameters, a tied head once."""

    @classmethod
    def of(cls, model: Any, layers: Mapping[str, nn.Linear]) -> Shape:
        """Read a model's shape."""
        return cls(
            {name: (each.out_features, each.in_features) for name, each in layers.items()},
            sum(each.numel() for each in model.parameters()),
        )

    @property
    def num_rounded(self) -> int:
        """Weights in linear layers: the law's N."""
        return sum(outputs * inputs for outputs, inputs in self.layers.values())

    @property
    def original_bytes(self) -> int:
        """All weights in bfloat16."""
        return 2 * self.num_weights

    def divides(self, group_size: int) -> bool:
        """Say whether every layer's inputs are whole groups."""
        return all(inputs % group_size == 0 for _, inputs in self.layers.values())

    def count_bytes(
        self, bits: int | Mapping[str, int], group_size: int | None, *, shape_bytes: int = 16
    ) -> int:
        """Return the bytes of all tensors as ``mutirao compress`` stores them.

        Args:
            bits: of a code, or of each layer's codes.
            group_size: weights that share a scale of 16 bits and a zero point; None for a row.
            shape_bytes: of the note that each layer has of its shape.
        """
        total = self.original_bytes - 2 * self.num_rounded
        for name, (outputs, inputs) in self.layers.items():
            width = bits if isinstance(bits, int) else bits[name]
            groups = inputs // (group_size or inputs)
            total += outputs * 4 * math.ceil(inputs * width / 32)
            total += outputs * groups * SCALE_BITS // 8
            total += 4 * math.ceil(outputs * width / 32) * groups + shape_bytes
        return total


class Squares(NamedTuple):
    """What rounding does to one layer."""

    error: float
    """Sum of the squared differences."""
    power: float
    """Sum of the squared weights."""


def layer_squares(
    layers: Mapping[str, nn.Linear], bits: int, group_size: int | None
) -> dict[str, Squares]:
    """Return what rounding to nearest does to each layer, which stays as it is.

    Raises:
        ShapeError: the group size does not divide a layer's inputs.
    """
    found = {}
    for name, layer in layers.items():
        weight_OI = layer.weight.detach().float()
        rounded_OI = quantize_weight(weight_OI, bits, group_size).expand()
        error = float((rounded_OI - weight_OI).double().square().sum())
        found[name] = Squares(error, float(weight_OI.double().square().sum()))
    return found


def noise_of(squares: Iterable[Squares]) -> float:
    """Return the squared error of some layers over their squared weights."""
    known = list(squares)
    return sum(each.error for each in known) / sum(each.power for each in known)


def relative_noise(layers: Mapping[str, nn.Linear], bits: int, group_size: int | None) -> float:
    """Return the squared error of rounding to nearest over the squared weights.

    Raises:
        ShapeError: the group size does not divide a layer's inputs.
    """
    return noise_of(layer_squares(layers, bits, group_size).values())
