"""Bits per code of each compressed layer, as ``quantization_config`` in config.json gives them.

One group holds for all layers, whatever it says of them. Of several, each names its layers, and
one may be for all others, under the class name ``Linear``; a name goes before the class, as in the
package compressed-tensors. Left out: patterns (``re:``), since a stranger's pattern can be made to
take forever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mutirao.errors import FormatError

EVERY_LAYER = "Linear"
"""The class that groups name for all layers that have no group of their own."""


@dataclass(frozen=True)
class LayerBits:
    """Bits per code by layer."""

    others: int | None
    """Of layers that are not named; None where each must be."""
    by_name: Mapping[str, int] = field(default_factory=dict)

    def of(self, layer: str) -> int:
        """Return the bits per code of a layer, 1 to 8.

        Args:
            layer: its name, without ``.weight_packed``.

        Raises:
            FormatError: no group is for it.
        """
        bits = self.by_name.get(layer, self.others)
        if bits is None:
            raise FormatError(
                f"config.json does not say in how many bits compressed layer {layer[:100]} is; "
                "make the model again"
            )
        return bits


def read_layer_bits(quantization: Mapping[str, Any]) -> LayerBits | None:
    """Return the bits of weights in format 'pack-quantized'.

    Args:
        quantization: ``quantization_config`` of a config.json.

    Returns:
        None where a group is not of integers of 1 to 8 bits that share scales in groups.

    Raises:
        FormatError: groups contradict each other, or give their layers by a pattern.
    """
    groups = quantization.get("config_groups")
    if quantization.get("format") != "pack-quantized" or not isinstance(groups, dict):
        return None
    widths = [_num_bits(group) for group in groups.values()]
    if not widths or None in widths:
        return None
    if len(widths) == 1:
        return LayerBits(widths[0])
    by_name: dict[str, int] = {}
    for group, width in zip(groups.values(), widths, strict=True):
        for target in _targets(group):
            if target in by_name:
                raise FormatError(
                    f"config.json has {target[:100]} in two groups of bits; make the model again"
                )
            by_name[target] = width or 0
    others = by_name.pop(EVERY_LAYER, None)
    return LayerBits(others, by_name)


def _num_bits(group: Any) -> int | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return None
    kind, bits = (weights.get("type"), weights.get("strategy")), weights.get("num_bits")
    is_read = kind == ("int", "group") and type(bits) is int and 1 <= bits <= 8
    return bits if is_read else None


def _targets(group: Mapping[str, Any]) -> Iterator[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise FormatError(
            "config.json has a group of bits without a list of its layers; make the model again"
        )
    for target in targets:
        if target.startswith("re:"):
            raise FormatError(
                f"config.json gives the layers of a group of bits by the pattern {target[:100]!r} "
                f"(expected their names, or {EVERY_LAYER!r} for all others)"
            )
        yield target
