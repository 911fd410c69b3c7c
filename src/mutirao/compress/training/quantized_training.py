"""Training for rounding: weights that learn while each pass sees them as they will be rounded.

The model follows the predictions of its own unrounded copy, which keep more of what it knows than
the text's next tokens alone (LLM-QAT: Liu et al. 2023, arXiv:2305.17888); it is given text here,
where the paper lets the model write it. What comes out is a plain model with weights of full
precision, which lie well for the rounding that follows. Activations and the key-value cache are not
rounded, nor is the output head.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import SUPPORTED_BITS, QatConfig
from mutirao.compress.training.following import check_request, follow_teacher, import_optional
from mutirao.errors import InputError, ShapeError

WINDOWS_PER_STEP = 8
"""Windows that a step sees, where there are so many. Assumption: as in distillation."""


def train_quantized(model: Any, ids_WT: Tensor, config: QatConfig, *, seed: int = 0) -> None:
    """Train all parameters of a model, in place, for weights on grids of a few bits.

    Args:
        model: a transformers causal model; plain again afterwards, its names and dtype unchanged,
            and its weights as they were where training fails.
        ids_WT: (W, T) token ids.
        config: the rounding that follows, and how to train.
        seed: of the order of windows.

    Raises:
        InputError: a number is not accepted, or torchao or TRL is not installed.
        ShapeError: the group size does not divide a layer's inputs.
        DataError: too few windows, or the loss is no longer finite.
    """
    windows_per_step = min(WINDOWS_PER_STEP, max(1, len(ids_WT)))
    check_request(ids_WT, steps=config.steps, windows_per_step=windows_per_step)
    layers = linear_layers(model)
    _check_grid(layers, config)
    fake_rounding = import_optional("fake_rounding", "torchao")
    original = copy.deepcopy(model).eval()
    try:
        with fake_rounding.rounded_layers(model, layers, config.bits, config.group_size):
            follow_teacher(
                model,
                original,
                ids_WT,
                steps=config.steps,
                learning_rate=config.learning_rate,
                windows_per_step=windows_per_step,
                seed=seed,
                description="train for rounding",
            )
    except BaseException:
        with torch.no_grad():
            pairs = zip(model.parameters(), original.parameters(), strict=True)
            for parameter, before in pairs:
                parameter.copy_(before)
        raise


def _check_grid(layers: dict[str, Any], config: QatConfig) -> None:
    if config.bits not in SUPPORTED_BITS:
        accepted = ", ".join(map(str, SUPPORTED_BITS))
        raise InputError(f"bits={config.bits} is not supported (expected one of {accepted})")
    for name, layer in layers.items():
        if layer.in_features % config.group_size:
            raise ShapeError(
                f"group_size={config.group_size} does not divide the {layer.in_features} inputs of "
                f"{name}; choose a divisor such as 32 or 64"
            )
