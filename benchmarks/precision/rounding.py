"""What rounding does to one checkpoint: paired loss differences on held-out text."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mutirao.compress.blocks import linear_layers, walk_blocks
from mutirao.compress.rounding.gptq import gptq_weight
from mutirao.compress.rounding.grid import best_grid, quantize_weight
from precision.text import Text

HELDOUT_WINDOWS = 512
"""131,072 bytes."""
CALIBRATION_WINDOWS = 64
BITS = {"rtn": (2, 3, 4, 5), "gptq": (2, 3, 4)}
"""From 6 bits on, rises of such models drown in the error of 131,072 bytes."""
GROUPS = {"channel": None, "g32": 32}


@dataclass(frozen=True)
class Rounding:
    """One way to round all blocks' matrices."""

    method: str
    group: str
    bits: int


ALL = [
    Rounding(method, group, bits)
    for method, all_bits in BITS.items()
    for group in GROUPS
    for bits in all_bits
]
STABLE = [each for each in ALL if each.method == "rtn" and each.bits in (3, 4)]
"""What is measured before the rate has decayed."""


@torch.inference_mode()
def window_losses(model: Any, ids_WT: Tensor) -> Tensor:
    """Return (W,) the mean loss of each window, in nats per byte, computed in float32."""
    losses = []
    for ids in torch.split(ids_WT, 32):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(each.double().mean(dim=1))
    return torch.cat(losses)


def measure(model: Any, text: Text, wanted: list[Rounding]) -> Iterator[dict[str, Any]]:
    """Yield, for each way of rounding, the loss, its rise and the rise's standard error."""
    model.eval()
    ids_WT = text.heldout(HELDOUT_WINDOWS)
    base_W = window_losses(model, ids_WT)
    for rounding in wanted:
        rounded = copy.deepcopy(model)
        apply(rounded, rounding, text)
        rises_W = window_losses(rounded, ids_WT) - base_W
        yield {
            "method": rounding.method,
            "group": rounding.group,
            "bits": rounding.bits,
            "loss": float(base_W.mean()),
            "delta": float(rises_W.mean()),
            "standard_error": float(rises_W.std()) / math.sqrt(len(rises_W)),
        }


@torch.no_grad()
def apply(model: Any, rounding: Rounding, text: Text) -> None:
    """Replace the blocks' matrices by what their codes stand for."""
    group = GROUPS[rounding.group]
    if rounding.method == "rtn":
        for layer in linear_layers(model).values():
            layer.weight.copy_(quantize_weight(layer.weight, rounding.bits, group).expand())
        return

    def visit(_: str, block: Any, grams: Any) -> None:
        for name, gram_II in grams.items():
            layer = block.get_submodule(name)
            grid = best_grid(layer.weight, rounding.bits, group, gram_II.diagonal())
            layer.weight.copy_(gptq_weight(layer.weight, gram_II, grid, rounding.bits).expand())

    walk_blocks(model, text.calibration(CALIBRATION_WINDOWS), visit, windows_per_pass=16)
