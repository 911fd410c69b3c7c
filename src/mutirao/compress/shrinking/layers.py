"""The linear layers of a decoder, changed in turn by what comes into them.

Shapes: W windows, T tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import decoder_blocks, linear_layers, walk_blocks
from mutirao.console import step_progress
from mutirao.errors import DataError

Change = Callable[[nn.Linear, Tensor], None]
"""Called with a layer, to be changed in place, and the (I, I) mean of x x^T of its inputs x."""


def change_layers(model: Any, ids_WT: Tensor, label: str, change: Change) -> None:
    """Change block after block; each sees what the changed ones before it make of the text.

    Args:
        model: a transformers causal model.
        ids_WT: (W, T) token ids of calibration text.
        label: what the progress bar says.
        change: see ``Change``; layers with the same input get the same matrix, to be only read.

    Raises:
        DataError: weights, or inputs on the text, are not finite.
        FormatError: the model is of a kind that is not supported.
    """
    check_finite(linear_layers(model))
    with step_progress() as progress:
        bar = progress.add_task(label, total=len(decoder_blocks(model)))

        def visit(prefix: str, block: nn.Module, grams: Mapping[str, Tensor]) -> None:
            for name, gram_II in grams.items():
                layer: Any = block.get_submodule(name)
                if not bool(torch.isfinite(gram_II).all()):
                    raise DataError(
                        f"inputs of {prefix}.{name} on the calibration text are not finite; "
                        "check the model's weights"
                    )
                change(layer, gram_II)
            progress.advance(bar)

        walk_blocks(model, ids_WT, visit)


def check_finite(layers: Mapping[str, nn.Linear]) -> None:
    """Raise DataError for weights that are not finite."""
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise DataError(f"weights of {name} are not finite; the model is damaged")
