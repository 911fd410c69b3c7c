"""Rounding that looks at text, block after block: GPTQ, AWQ, and AWQ with GPTQ's rounding.

Each block is rounded by what it sees of the text behind the rounded ones; GPTQ also mends what
they have done, see ``drift``. Weights that are zero stay zero, so that what was pruned before
stays pruned. A weight that several blocks share is rounded once, by what the first of them sees,
and stays shared; AWQ then scales nothing, because the scales would be the first block's alone.

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
from mutirao.compress.rounding.drift import Drift, target_weight, walk_parts
from mutirao.compress.rounding.gptq import fitted_gptq
from mutirao.compress.rounding.grid import (
    QuantizedWeight,
    best_grid,
    check_group_size,
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
    layers = linear_layers(model)
    for layer in layers.values():
        check_group_size(layer.in_features, group_size)
    by_layer = dict.fromkeys(layers, bits) if isinstance(bits, int) else bits
    uses = Counter(id(layer.weight) for layer in layers.values())
    can_scale = "awq" in method and max(uses.values()) == 1
    if "awq" in method and not can_scale:
        logger.warning("awq scales no inputs: the model's blocks share weights")
    blocks = decoder_blocks(model)
    model.to(getattr(torch, fast_dtype()))
    with step_progress() as progress, _Latest(blocks) as latest:
        label = f"compressing to {name_bits(by_layer.values())}"
        bar = progress.add_task(label, total=len(blocks))
        rounding = _Rounding(
            by_layer,
            group_size,
            latest if can_scale else None,
            lambda: progress.advance(bar),
        )
        if "gptq" in method:
            walk_parts(model, ids_WT, rounding.begin, rounding.round_part)
            progress.update(bar, completed=len(blocks))
        else:
            walk_blocks(model, ids_WT, rounding.round_block)
    return rounding.quantized


class _Rounding:
    """Rounds blocks as they come."""

    def __init__(
        self,
        bits: Mapping[str, int],
        group_size: int | None,
        latest: _Latest | None,
        advance: Callable[[], None],
    ) -> None:
        """Prepare it.

        Args:
            bits: of each layer.
            group_size: weights along the input that share a grid; None for a whole row.
            latest: runs a block again, to see which inputs AWQ can scale; None for no AWQ.
            advance: called for each block.
        """
        self.quantized: dict[str, QuantizedWeight] = {}
        self._bits = bits
        self._group_size = group_size
        self._latest = latest
        self._advance = advance
        self._by_weight: dict[int, QuantizedWeight] = {}
        self._told: set[Pair] = set()
        self._scaled = Scaled({}, {}, {})

    def round_block(self, prefix: str, block: nn.Module, grams: Mapping[str, Tensor]) -> None:
        """Scale a block's weights, and round each to nearest."""
        scaled = self._scale(prefix, block, grams)
        for name, gram_II in scaled.grams.items():
            bits, weight_OI = self._bits[f"{prefix}.{name}"], scaled.weights[name]
            grid = best_grid(weight_OI, bits, self._group_size, gram_II.diagonal())
            self._replace(prefix, block, name, round_to_grid(weight_OI, grid, bits))
        self._advance()

    def begin(
        self, prefix: str, block: nn.Module, observe: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Scale a block's weights, where AWQ comes before GPTQ."""
        self._scaled = Scaled({}, {}, {})
        if self._latest is not None:
            self._scaled = self._scale(prefix, block, observe())
        if self.quantized:  # those of the block before
            self._advance()
        return self._scaled.divisors

    def round_part(self, prefix: str, block: nn.Module, drifts: Mapping[str, Drift]) -> None:
        """Round layers with the same input by GPTQ, those of the same width as one."""
        by_bits: dict[int, list[str]] = {}
        for name in drifts:
            layer: Any = block.get_submodule(name)
            if (codes := self._by_weight.get(id(layer.weight))) is None:
                by_bits.setdefault(self._bits[f"{prefix}.{name}"], []).append(name)
            else:
                self._replace(prefix, block, name, codes)
        for bits, names in by_bits.items():
            weights = [self._weight(block, name) for name in names]
            targets = [
                target_weight(weight_OI, drifts[name])
                for name, weight_OI in zip(names, weights, strict=True)
            ]
            pruned_OI = torch.cat(weights) == 0
            codes = fitted_gptq(
                torch.cat(targets),
                drifts[names[0]].gram,
                bits,
                self._group_size,
                pruned_OI=pruned_OI if bool(pruned_OI.any()) else None,
            )
            sizes = list(map(len, weights))
            each = zip(names, *(torch.split(part, sizes) for part in codes), strict=True)
            for name, *own in each:
                self._replace(prefix, block, name, QuantizedWeight(*own))

    def _weight(self, block: nn.Module, name: str) -> Tensor:
        """Return a layer's (O, I) float32 weight, as AWQ left it."""
        if name in self._scaled.weights:
            return self._scaled.weights[name]
        layer: Any = block.get_submodule(name)
        weight_OI: Tensor = layer.weight.detach().float()
        return weight_OI

    def _scale(self, prefix: str, block: nn.Module, grams: Mapping[str, Tensor]) -> Scaled:
        pairs: tuple[Pair, ...] = ()
        if self._latest is not None:
            pairs = foldable_pairs(block, self._latest.run(block), self._told)
        bits = {name: self._bits[f"{prefix}.{name}"] for name in grams}
        return scale_block(block, grams, bits, self._group_size, pairs)

    def _replace(self, prefix: str, block: nn.Module, name: str, codes: QuantizedWeight) -> None:
        """Let codes stand for a layer's weight, unless others already stand for it."""
        layer: Any = block.get_submodule(name)
        codes = self._by_weight.setdefault(id(layer.weight), codes)
        layer.weight.data.copy_(codes.expand())
        self.quantized[f"{prefix}.{name}"] = codes


class _Latest:
    """Remembers what each block was last called with, to run it on the same again."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __enter__(self) -> _Latest:
        def keep(_: nn.Module, args: tuple[Any, ...], others: dict[str, Any]) -> None:
            self._call = (args, others)

        self._handles = [
            block.register_forward_pre_hook(keep, with_kwargs=True)
            for block in self._blocks.values()
        ]
        return self

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
