"""Pruning: in every output row of every layer, the weights that matter least become zero.

What a weight matters is its magnitude ('magnitude'), or its magnitude times the root mean square
of its input on calibration text ('wanda'): a small weight on a loud input may matter more than a
large one on a quiet input. The weights that stay are as they were.

Left out: moving what was pruned to the weights that stay (SparseGPT, arXiv:2301.00774).

Shapes: W windows, T tokens, O outputs, I inputs, G groups of inputs, S weights in a group.

References:
    Sun et al. 2023, Wanda, arXiv:2306.11695, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import PruneConfig
from mutirao.compress.shrinking.layers import change_layers, check_finite
from mutirao.console import track
from mutirao.errors import ShapeError


@torch.no_grad()
def prune(model: Any, ids_WT: Tensor | None, config: PruneConfig) -> None:
    """Set weights of all linear layers in the decoder's blocks to zero, in place.

    Args:
        model: a transformers causal model, of any floating-point type.
        ids_WT: (W, T) token ids of calibration text; 'magnitude' does not look at it.
        config: see ``PruneConfig``.

    Raises:
        DataError: weights, or inputs on the text, are not finite.
        FormatError: the model is of a kind that is not supported.
        ShapeError: the pattern is 2:4 and a layer's inputs are no multiple of 4.
    """
    layers = linear_layers(model)
    for name, layer in layers.items():
        if config.pattern == "2:4" and layer.in_features % 4:
            raise ShapeError(
                f"{name} has {layer.in_features} inputs, which 4 does not divide; "
                "take compress.prune.pattern=free"
            )
    if config.method == "magnitude":
        check_finite(layers)
        for layer in track(layers.values(), "pruning by magnitude", len(layers)):
            _prune_layer(layer, layer.weight.abs(), config)
        return
    assert ids_WT is not None

    def change(layer: nn.Linear, gram_II: Tensor) -> None:
        score_OI = layer.weight.float().abs() * gram_II.diagonal().sqrt()
        _prune_layer(layer, score_OI, config)

    change_layers(model, ids_WT, "pruning by wanda", change)


def kept_mask(score_OI: Tensor, group_size: int, num_dropped: int) -> Tensor:
    """Say which weights stay: all but those of the lowest scores in each group of a row.

    Args:
        score_OI: (O, I) what each weight matters; among equals, earlier inputs are dropped first.
        group_size: S, neighbours along the input among which to choose; divides I.
        num_dropped: how many of them go.

    Returns:
        (O, I) bool.
    """
    groups_OGS = score_OI.reshape(len(score_OI), -1, group_size)
    dropped_OGN = groups_OGS.argsort(dim=2, stable=True)[..., :num_dropped]
    kept_OGS = torch.ones_like(groups_OGS, dtype=torch.bool).scatter_(2, dropped_OGN, False)
    return kept_OGS.reshape(score_OI.shape)


def _prune_layer(layer: nn.Linear, score_OI: Tensor, config: PruneConfig) -> None:
    num_inputs = layer.in_features
    if config.pattern == "2:4":
        kept_OI = kept_mask(score_OI, 4, 2)
    else:
        kept_OI = kept_mask(score_OI, num_inputs, round(config.sparsity * num_inputs))
    layer.weight.masked_fill_(~kept_OI, 0.0)
