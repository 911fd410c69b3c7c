"""The noise of a model's grids: each is rounded once, layer by layer, and kept for the next advice.

Noise is of the weights alone, whatever the text, so that its file bears their hash and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mutirao.advise.kept import KeptLines
from mutirao.advise.ways import Squares, layer_squares, noise_of


class Noises:
    """The noise of rounding a model's layers, or some of them, to nearest."""

    def __init__(self, layers: Mapping[str, nn.Linear], kept: KeptLines) -> None:
        """Read what was found before.

        Args:
            layers: with the model's own weights whenever a grid is asked for the first time.
            kept: of the same weights.
        """
        self._layers, self._kept = layers, kept
        self._known = dict(filter(None, (_grid(line, layers) for line in kept.read())))

    def find(self, bits: int, group_size: int | None, names: Iterable[str] | None = None) -> float:
        """Return the squared error over the squared weights; see ``ways.relative_noise``.

        Args:
            bits: of a code.
            group_size: weights that share a grid; None for a row.
            names: of the layers that count; None for all.

        Raises:
            ShapeError: the group size does not divide a layer's inputs.
            DiskFullError: no room to keep a grid; those before it are kept.
        """
        key = bits, group_size
        if key not in self._known:
            self._known[key] = layer_squares(self._layers, bits, group_size)
            squares = {name: tuple(each) for name, each in self._known[key].items()}
            self._kept.add({"bits": bits, "group_size": group_size, "squares": squares})
        found = self._known[key]
        return noise_of(found[name] for name in (found if names is None else names))


def _grid(
    line: Mapping[str, Any], layers: Mapping[str, nn.Linear]
) -> tuple[tuple[int, int | None], dict[str, Squares]] | None:
    """Return a line's grid and its layers' squares; None where it is no such line."""
    try:
        squares = {name: Squares(*map(float, line["squares"][name])) for name in layers}
        return (line["bits"], line["group_size"]), squares
    except (KeyError, TypeError, ValueError):
        return None
