"""Bits layer by layer: which parts of a model bear few, and what a mix of bits is worth.

Each block's attention and each block's network is rounded alone, at a few bits, and the divergence
of the model's predictions from its own is taken on some of the windows that methods may look at:
divergences are far less noisy than losses. To second order divergences add up and go with the
noise, which gives every part's cost at every number of bits; bits then go where a byte saves most.
What the mix is worth is measured on held-out windows, beside the same number of bits for all.

References:
    Dong et al. 2020, HAWQ-V2, arXiv:1911.03852: bits by sensitivity times squared error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mutirao.advise.measuring import Bench
from mutirao.advise.ways import Shape, relative_noise
from mutirao.compress.config import SUPPORTED_BITS
from mutirao.compress.loss import CompressionLoss

PROBED_BITS = 3


@dataclass(frozen=True)
class Part:
    """A block's attention or network."""

    name: str
    layers: tuple[str, ...]
    divergence: float
    """Nats per token, with this part alone at ``PROBED_BITS``."""


@dataclass(frozen=True)
class Mix:
    """Bits of each part, and what they cost beside the same bits for all."""

    bits: dict[str, int]
    """By layer."""
    group_size: int
    total_bytes: int
    uniform_bits: int
    mixed: CompressionLoss
    """Rounded to nearest."""
    uniform: CompressionLoss
    """Rounded to nearest too, so that only the bits differ."""

    @property
    def is_better(self) -> bool:
        """Whether it diverges less by a tenth at least."""
        return self.mixed.divergence < 0.9 * self.uniform.divergence


def probe_parts(bench: Bench, group_size: int, num_windows: int) -> Iterator[Part]:
    """Yield all parts; the model is as it was after each."""
    bench.keep_probed(max(num_windows, 2))
    by_part: dict[str, list[str]] = {}
    for name in bench.layers:
        by_part.setdefault(name.rpartition(".")[0], []).append(name)
    for part, names in by_part.items():
        try:
            bench.round_layers(dict.fromkeys(names, PROBED_BITS), group_size)
            divergence = bench.probe()
        finally:
            bench.restore()
        yield Part(part, tuple(names), max(divergence, 0.0))


def mix_bits(
    bench: Bench, shape: Shape, parts: list[Part], uniform_bits: int, group_size: int
) -> Mix:
    """Give bits to parts within the bytes of the same bits for all, and measure both."""
    bits = _share_out(bench, shape, parts, uniform_bits, group_size)
    try:
        bench.round_layers(bits, group_size)
        mixed = bench.score()
        bench.restore()
        bench.round_layers(dict.fromkeys(bits, uniform_bits), group_size)
        uniform = bench.score()
    finally:
        bench.restore()
    return Mix(bits, group_size, shape.count_bytes(bits, group_size), uniform_bits, mixed, uniform)


def _share_out(
    bench: Bench, shape: Shape, parts: list[Part], uniform_bits: int, group_size: int
) -> dict[str, int]:
    """Return bits by layer: from the fewest up, each time where a byte lowers the cost most."""
    costs = {part.name: _costs(bench, part, group_size) for part in parts}
    chosen = {part.name: min(SUPPORTED_BITS) for part in parts}
    budget = shape.count_bytes(uniform_bits, group_size)

    def by_layer(by_part: Mapping[str, int]) -> dict[str, int]:
        return {layer: by_part[part.name] for part in parts for layer in part.layers}

    size = shape.count_bytes(by_layer(chosen), group_size)
    while True:
        steps = []
        for name, now in chosen.items():
            for more in (each for each in SUPPORTED_BITS if each > now):
                raised = shape.count_bytes(by_layer(chosen | {name: more}), group_size)
                if raised <= budget:
                    gain = costs[name][now] - costs[name][more]
                    steps.append((gain / (raised - size), name, more, raised))
        if not steps:
            return by_layer(chosen)
        _, name, more, size = max(steps)
        chosen[name] = more


def _costs(bench: Bench, part: Part, group_size: int) -> dict[int, float]:
    """Return a part's divergence by bits: in proportion to its noise."""
    layers = {name: bench.layers[name] for name in part.layers}
    noise = {bits: relative_noise(layers, bits, group_size) for bits in SUPPORTED_BITS}
    return {bits: part.divergence * noise[bits] / noise[PROBED_BITS] for bits in SUPPORTED_BITS}
