"""Rounding that looks at text, block after block: GPTQ, AWQ, and AWQ with GPTQ's rounding.

Each block is rounded by what it sees of the text behind the rounded ones. Weights that are zero
stay zero, so that what was pruned before stays pruned. A weight that several blocks share is
rounded once, by what the first of them sees, and stays shared; AWQ then scales nothing, because
the scales would be the first block's alone.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import decoder_blocks, linear_layers, walk_blocks
from mutirao.compress.rounding.awq import Pair, Scaled, foldable_pairs, scale_block
from mutirao.compress.rounding.gptq import gptq_weight
from mutirao.compress.rounding.grid import (
    QuantizedWeight,
    best_grid,
    name_bits,
    round_to_grid,
)
from mutirao.console import step_progress
from mutirao.models.arithmetic import fast_dtype

logger = logging.getLogger(__name__)


def round_by_blocks(
    model: Any,
    method: str,
    bits: int | Mapping[str, int],
    group_size: int | None,
    ids_WT: Tensor,
) -> dict[str, QuantizedWeight]:
    """Round all linear layers of the decoder's blocks, in place.

    Args:
        model: a transformers causal model.
        method: 'gptq', 'awq' or 'awq,gptq'; AWQ changes norms and biases too.
        bits: bits per code, 1 to 8, or those of each layer.
        group_size: weights along the input that share a grid; None for a whole row.
        ids_WT: (W, T) token ids of calibration text.

    Returns:
        Codes by layer.

    Raises:
        DataError: a layer's inputs are not finite.
        FormatError: the model is of a kind that is not supported.
        ShapeError: the group size does not divide a layer's inputs.
    """
    quantized: dict[str, QuantizedWeight] = {}
    by_weight: dict[int, QuantizedWeight] = {}
    layers = linear_layers(model)
    by_layer = dict.fromkeys(layers, bits) if isinstance(bits, int) else bits
    uses = Counter(id(layer.weight) for layer in layers.values())
    can_scale = "awq" in method and max(uses.values()) == 1
    if "awq" in method and not can_scale:
        logger.warning("awq scales no inputs: the model's blocks share weights")
    told: set[Pair] = set()
    blocks = decoder_blocks(model)
    latest = _Latest(blocks)
    with step_progress() as progress, latest:
        label = f"compressing to {name_bits(by_layer.values())}"
        bar = progress.add_task(label, total=len(blocks))

        def visit(prefix: str, block: nn.Module, grams: Mapping[str, Tensor]) -> None:
            pairs = foldable_pairs(block, latest.run(block), told) if can_scale else ()
            widths = {name: by_layer[f"{prefix}.{name}"] for name in grams}
            scaled = scale_block(block, grams, widths, group_size, pairs)
            for name in grams:
                layer: Any = block.get_submodule(name)
                codes = by_weight.get(id(layer.weight))
                if codes is None:
                    width = widths[name]
                    codes = _round(scaled, name, width, group_size, is_gptq="gptq" in method)
                    by_weight[id(layer.weight)] = codes
                    layer.weight.data.copy_(codes.expand())
                quantized[f"{prefix}.{name}"] = codes
            progress.advance(bar)

        walk_blocks(model.to(getattr(torch, fast_dtype())), ids_WT, visit)
    return quantized


def _round(
    scaled: Scaled, name: str, bits: int, group_size: int | None, *, is_gptq: bool
) -> QuantizedWeight:
    weight_OI, gram_II = scaled.weights[name], scaled.grams[name]
    grid = best_grid(weight_OI, bits, group_size, gram_II.diagonal())
    if not is_gptq:
        return round_to_grid(weight_OI, grid, bits)
    pruned_OI = weight_OI == 0
    return gptq_weight(
        weight_OI, gram_II, grid, bits, pruned_OI=pruned_OI if bool(pruned_OI.any()) else None
    )


class _Latest:
    """Remembers what each block was last called with, to run it on the same again."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __enter__(self) -> None:
        def keep(_: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
            self._call = (args, others)

        self._handles = [
            block.register_forward_pre_hook(keep, with_kwargs=True)
            for block in self._blocks.values()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, block: nn.Module) -> Callable[[], Tensor]:
        """Return a function that gives the block's outputs."""
        args, others = self._call

        def outputs() -> Tensor:
            result = block(*args, **others)
            states: Tensor = result[0] if isinstance(result, tuple) else result
            return states

        return outputs
