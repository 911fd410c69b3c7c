"""Bits layer by layer: which parts of a model bear few, and what a mix of bits is worth.

Each block's attention and each block's network is rounded alone, at a few bits, and the divergence
of the model's predictions from its own is taken on some of the windows that methods may look at:
divergences are far less noisy than losses. To second order divergences add up and go with the
noise, which gives every part's cost at every number of bits; bits then go where a byte saves most.
What the mix is worth is measured on held-out windows, beside the same number of bits for all. Both
measures and all probes are kept for the next advice.

References:
    Dong et al. 2020, HAWQ-V2, arXiv:1911.03852: bits by sensitivity times squared error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutirao.advise.kept import KeptLines
from mutirao.advise.measuring import Bench, measure_ways
from mutirao.advise.noises import Noises
from mutirao.advise.ways import Shape, Way
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


@dataclass(frozen=True)
class Found:
    """Where is kept what was found of a model on some windows."""

    ways: Path
    """See ``measuring.measure_ways``."""
    parts: KeptLines
    mixes: KeptLines


def probe_parts(bench: Bench, group_size: int, num_windows: int, kept: KeptLines) -> Iterator[Part]:
    """Yield all parts; the model is as it was after each.

    Args:
        bench: see ``Bench``.
        group_size: weights that share a scale.
        num_windows: that parts are probed on.
        kept: parts that were probed before, of the same model and windows.

    Raises:
        DiskFullError: no room to keep a part; those before it are kept.
    """
    num_windows = max(num_windows, 2)
    asked = {"group_size": group_size, "bits": PROBED_BITS, "num_windows": num_windows}
    known = {_key(line): line["divergence"] for line in kept.read() if _is_part(line)}
    is_ready = False
    by_part: dict[str, list[str]] = {}
    for name in bench.layers:
        by_part.setdefault(name.rpartition(".")[0], []).append(name)
    for part, names in by_part.items():
        line = {"name": part, "layers": names, **asked}
        if _key(line) not in known:
            if not is_ready:
                bench.keep_probed(num_windows)
                is_ready = True
            known[_key(line)] = _probe(bench, names, group_size)
            kept.add({**line, "divergence": known[_key(line)]})
        yield Part(part, tuple(names), known[_key(line)])


def _probe(bench: Bench, names: list[str], group_size: int) -> float:
    try:
        bench.round_layers(dict.fromkeys(names, PROBED_BITS), group_size)
        return max(bench.probe(), 0.0)
    finally:
        bench.restore()


def _is_part(line: dict[str, Any]) -> bool:
    return isinstance(line.get("divergence"), float)


def _key(line: dict[str, Any]) -> str:
    """Return what a line is about: all but what was found."""
    about = {name: each for name, each in line.items() if name not in ("divergence", "loss")}
    return json.dumps(about, sort_keys=True)


def mix_bits(
    bench: Bench, shape: Shape, parts: list[Part], uniform: Way, noises: Noises, found: Found
) -> Mix:
    """Give bits to parts within the bytes of the same bits for all, and measure both.

    Args:
        bench: see ``Bench``.
        shape: of the same model.
        parts: all of them.
        uniform: the same bits for all, rounded to nearest, in groups.
        noises: of the same model.
        found: where both measures are kept.

    Raises:
        DiskFullError: no room to keep what is found.
    """
    size = uniform.group_size
    assert size is not None
    assert uniform.method == "rtn"
    bits = _share_out(shape, parts, uniform, noises)
    mixed = _measure_mix(bench, bits, size, found.mixes)
    (same,) = measure_ways(bench, [uniform], found.ways)
    num_bytes = shape.count_bytes(bits, size)
    return Mix(bits, size, num_bytes, uniform.bits, mixed, same.loss)


def _measure_mix(
    bench: Bench, bits: dict[str, int], group_size: int, kept: KeptLines
) -> CompressionLoss:
    line = {"bits": bits, "group_size": group_size}
    for each in kept.read():
        if _key(each) == _key(line):
            try:
                return CompressionLoss(**each["loss"])
            except (TypeError, KeyError):
                continue
    try:
        bench.round_layers(bits, group_size)
        loss = bench.score()
    finally:
        bench.restore()
    kept.add({**line, "loss": loss._asdict()})
    return loss


def _share_out(shape: Shape, parts: list[Part], uniform: Way, noises: Noises) -> dict[str, int]:
    """Return bits by layer: from the fewest up, each time where a byte lowers the cost most."""
    group_size = uniform.group_size
    costs = {part.name: _costs(noises, part, group_size) for part in parts}
    chosen = {part.name: min(SUPPORTED_BITS) for part in parts}
    budget = shape.count_bytes(uniform.bits, group_size)

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


def _costs(noises: Noises, part: Part, group_size: int | None) -> dict[int, float]:
    """Return a part's divergence by bits: in proportion to its noise."""
    noise = {bits: noises.find(bits, group_size, part.layers) for bits in SUPPORTED_BITS}
    return {bits: part.divergence * noise[bits] / noise[PROBED_BITS] for bits in SUPPORTED_BITS}
