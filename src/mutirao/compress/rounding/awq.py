"""AWQ: inputs that are loud get larger weights before rounding, and are made quieter by as much.

Of two weights with the same step, the one on a louder input does more harm when it is rounded.
Multiplying the weights of an input by a scale, and dividing the input by it, changes nothing but
the share of the grid that the input gets. Scales are the loudness of an input to a power that a
grid search picks by the output error of all layers that share the input. What divides the input
is the norm, or the linear layer, that it comes from; its rows and the new norm are stored.

An error E of a weight changes a layer's outputs by trace(E G E^T) in the mean, G the Gram matrix
of its inputs, so that the search needs no text, only G. Loudness is the root mean square of an
input, the root of G's diagonal; the paper takes the mean magnitude. The grids are shortened by
``grid.best_grid``; the paper clips weights by a search of its own.

A pair is folded where that leaves the block's outputs as they were: it is tried beforehand, with
powers of two, in which floating point is exact. Left out: values under grouped-query attention,
where several outputs' inputs come from one value, as in the authors' code.

Shapes: O outputs, I inputs, D channels.

References:
    Lin et al. 2023, AWQ, arXiv:2306.00978, sections 3.2 and 3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mutirao.compress.rounding.grid import full_grid, output_error, round_to_grid

logger = logging.getLogger(__name__)

NUM_POWERS = 20
"""Powers that are tried, from 0 (no scale) to just below 1: as many as in the authors' code."""
QUIETEST = 1e-4
"""Least loudness, as a share of the loudest input's. Assumption: it bounds scales where an input
is never on."""


class Pair(NamedTuple):
    """Linear layers with the same input, and what their input comes from."""

    source: str
    """A norm, or a linear layer each of whose outputs feeds one input."""
    sinks: tuple[str, ...]


PAIRS = (
    Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Pair("self_attn.v_proj", ("self_attn.o_proj",)),
    Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Pair("mlp.up_proj", ("mlp.down_proj",)),
)
"""Those of Llama's blocks, by their names within a block."""


class Scaled(NamedTuple):
    """A block's linear layers after folding, by name."""

    weights: dict[str, Tensor]
    """(O, I) float32: not rounded even to bfloat16, so that folding by itself costs nothing."""
    grams: dict[str, Tensor]
    """(I, I) of the inputs as they are now."""
    divisors: dict[str, Tensor]
    """(I,) what the inputs were divided by, of the layers whose inputs were."""


@torch.no_grad()
def scale_block(
    block: nn.Module,
    grams: Mapping[str, Tensor],
    bits: int | Mapping[str, int],
    group_size: int | None,
    pairs: tuple[Pair, ...],
) -> Scaled:
    """Choose scales for a block and fold them; norms and biases change in place.

    The block's linear weights are left as they are, since their own number format may be too
    coarse: with those that are returned in their place, its outputs are what they were.

    Args:
        block: of a decoder.
        grams: Gram matrix of each linear layer's inputs, as ``blocks.walk_blocks`` gives them.
        bits: bits per code, 1 to 8, or those of each layer, by its name in the block.
        group_size: weights along the input that share a grid; None for a whole row.
        pairs: those that can be folded, see ``foldable_pairs``.

    Raises:
        ShapeError: group_size does not divide a layer's inputs.
    """
    layers: dict[str, Any] = {name: block.get_submodule(name) for name in grams}
    weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
    scaled = Scaled(weights, dict(grams), {})
    for pair in pairs:
        scale_I = best_scale(
            [weights[name] for name in pair.sinks],
            grams[pair.sinks[0]],
            bits if isinstance(bits, int) else [bits[name] for name in pair.sinks],
            group_size,
        )
        scale_I = _divide_source(block, pair.source, scale_I, weights)
        gram_II = grams[pair.sinks[0]] / (scale_I[:, None] * scale_I)
        for name in pair.sinks:
            weights[name] = weights[name] * scale_I
            scaled.grams[name] = gram_II
            scaled.divisors[name] = scale_I
    return scaled


def best_scale(
    weights: list[Tensor], gram_II: Tensor, bits: int | Sequence[int], group_size: int | None
) -> Tensor:
    """Return the scales of an input's channels with the least output error.

    Args:
        weights: (O, I) floating point, each of a layer that has this input.
        gram_II: (I, I) mean of x x^T over calibration tokens.
        bits: bits per code, 1 to 8, of all weights or of each.
        group_size: weights along the input that share a grid; None for a whole row.

    Returns:
        (I,) float32, positive; their largest times their smallest is 1.

    Raises:
        ShapeError: group_size does not divide I.
    """
    gram_II = gram_II.float()
    loudness_I = gram_II.diagonal().clamp(min=0).sqrt()
    loudness_I = (loudness_I / loudness_I.max().clamp(min=1e-30)).clamp(min=QUIETEST)
    widths = [bits] * len(weights) if isinstance(bits, int) else bits
    best_I, least = torch.ones_like(loudness_I), torch.inf
    for step in range(NUM_POWERS):
        scale_I = loudness_I ** (step / NUM_POWERS)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        error = 0.0
        for weight_OI, width in zip(weights, widths, strict=True):
            scaled_OI = weight_OI.float() * scale_I
            rounded = round_to_grid(scaled_OI, full_grid(scaled_OI, width, group_size), width)
            error += output_error((rounded.expand() - scaled_OI) / scale_I, gram_II)
        if error < least:
            best_I, least = scale_I, error
    return best_I


def foldable_pairs(
    block: nn.Module, run: Callable[[], Tensor], told: set[Pair]
) -> tuple[Pair, ...]:
    """Return the pairs that can be folded without a change of the block's outputs.

    Args:
        block: of a decoder; as it was on return.
        run: returns the block's outputs for some input.
        told: pairs that a warning was given for, added to; one is enough for all blocks.
    """
    foldable = []
    for pair in PAIRS:
        reason = _obstacle(block, pair, run)
        if reason is None:
            foldable.append(pair)
        elif reason and pair not in told:
            told.add(pair)
            logger.warning("awq does not scale the inputs of %s: %s", ", ".join(pair.sinks), reason)
    return tuple(foldable)


def _obstacle(block: nn.Module, pair: Pair, run: Callable[[], Tensor]) -> str | None:
    """Return why a pair cannot be folded, empty where that is nothing to point out, or None."""
    modules = dict(block.named_modules())
    if missing := [name for name in (pair.source, *pair.sinks) if name not in modules]:
        return f"the model's blocks have no {missing[0]}"
    source: Any = modules[pair.source]
    sinks: list[Any] = [modules[name] for name in pair.sinks]
    if getattr(source, "weight", None) is None:
        return f"{pair.source} has no weight"
    if any(sink.in_features != len(source.weight) for sink in sinks):
        is_grouped_query_attention = pair.source == "self_attn.v_proj"
        return "" if is_grouped_query_attention else f"{pair.source} has another size"
    if not _is_unchanged_by_folding(source, sinks, run):
        return f"what comes from {pair.source} is used in another way than in Llama"
    return None


@torch.no_grad()
def _is_unchanged_by_folding(source: Any, sinks: list[Any], run: Callable[[], Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale_I = 2.0 ** torch.randint(-1, 2, (len(source.weight),), generator=generator)
    before = run()
    changed = (*source.parameters(), *(sink.weight for sink in sinks))
    kept = [(each, each.detach().clone()) for each in changed]
    for parameter in source.parameters():
        scale = scale_I.to(parameter).reshape(-1, *(1,) * (parameter.dim() - 1))
        parameter.copy_(parameter / scale)
    for sink in sinks:
        sink.weight.mul_(scale_I.to(sink.weight))
    after = run()
    for parameter, value in kept:
        parameter.copy_(value)
    return torch.equal(before, after)


def _divide_source(
    block: nn.Module, name: str, scale_I: Tensor, weights: dict[str, Tensor]
) -> Tensor:
    """Divide what an input comes from; return the scales as they came out in its number format."""
    source: Any = block.get_submodule(name)
    if name in weights:
        weights[name] = weights[name] / scale_I[:, None]
    else:
        weight_I = source.weight.detach().to(torch.bfloat16)
        divided_I = (weight_I.float() / scale_I).to(torch.bfloat16)
        scale_I = torch.where(divided_I == 0, scale_I, weight_I.float() / divided_I.float())
        source.weight.copy_(divided_I)
    if getattr(source, "bias", None) is not None:
        source.bias.copy_(source.bias.float() / scale_I)
    return scale_I
