"""The curvature baseline: what a second-order look at one checkpoint says of its rounding.

    cd benchmarks && python -m precision.curvature CHECKPOINT SIZE SEED OUT.json

δ ≈ ½ Σ F ε²: F the diagonal of the Fisher information on calibration text, ε what rounding changes
(LeCun, Denker and Solla 1990, Optimal Brain Damage; for bits of whole models: Xu et al. 2024,
arXiv:2410.12119). Nothing is fitted; the checkpoint is looked at, so that this foretells no model
that is not trained yet. F is a mean over bytes, of squared gradients of the loss with targets drawn
from the model itself: for each window its summed gradient squared, whose crossed terms vanish on
average for drawn targets.

Missed: the gradient's own term, all terms off the diagonal (GPTQ chooses errors that cancel in
them, so its δ should come out too high), and everything past second order (at 2 bits).
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mutirao.compress.blocks import linear_layers
from mutirao.environment import cache_directory
from precision.family import SIZES, make_model
from precision.rounding import ALL, apply
from precision.text import Text

NUM_WINDOWS = 256


def fisher_diagonal(model: Any, ids_WT: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return, for each rounded matrix, (O, I) the Fisher information of a byte's prediction."""
    layers = linear_layers(model)
    found = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for ids_T in ids_WT:
        model.zero_grad(set_to_none=True)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        drawn_T = torch.multinomial(logits_TV.detach().softmax(1), 1, generator=generator)[:, 0]
        functional.cross_entropy(logits_TV, drawn_T, reduction="sum").backward()
        for name, layer in layers.items():
            found[name] += layer.weight.grad**2
    return {name: total / ids_WT.numel() for name, total in found.items()}


def foretell(model: Any, text: Text) -> list[dict[str, Any]]:
    """Return the second-order rise of each way of rounding."""
    model.eval()
    windows = text.calibration(NUM_WINDOWS)
    fisher = fisher_diagonal(model, windows, torch.Generator().manual_seed(0))
    before = {name: layer.weight.detach() for name, layer in linear_layers(model).items()}
    found = []
    for rounding in ALL:
        rounded = copy.deepcopy(model)
        apply(rounded, rounding, text)
        after = linear_layers(rounded)
        rise = sum(
            float((fisher[name] * (after[name].weight.detach() - weight) ** 2).sum()) / 2
            for name, weight in before.items()
        )
        found.append({**vars(rounding), "curvature": rise})
    return found


def main() -> None:
    """Look at one checkpoint."""
    checkpoint, size, seed, out = sys.argv[1:]
    model = make_model(SIZES[size], int(seed))
    model.load_state_dict(torch.load(checkpoint))
    text = Text(cache_directory() / "bench-precision" / "text")
    Path(out).write_text(json.dumps(foretell(model, text), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
