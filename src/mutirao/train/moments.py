"""Second moments in a base model's folder: where an AdamW begins in place of zero.

AdamW divides each step by the root of the mean squared gradient, the second moment. One that
begins from zero knows no more than the steps it has seen, and in steps of a few hundred tokens
most of a vocabulary has not been seen: the first gradient of a rare token then moves its row by
many times the learning rate. ``federated.moments`` measures them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mutirao.errors import InputError
from mutirao.train.config import TrainConfig
from mutirao.train.loop import make_optimizer

MOMENTS_PATH = Path("training", "second_moments.safetensors")
"""Where a model's folder has them, apart from its weights: float32, by parameter."""
_SETTLED = 40
"""Bias corrections are for moments of so many times the memory, where they are 1 to the bit."""


def find_moments(model: Path) -> Path:
    """Return where a model has its second moments.

    Raises:
        InputError: it has none.
    """
    path = model / MOMENTS_PATH
    if not path.exists():
        raise InputError(
            f"{model} has no second moments, which federated.second_moments needs; make them "
            "with `mutirao federate moments`"
        )
    return path


def start_optimizer(
    model: nn.Module, folder: Path, config: TrainConfig, *, fused: bool = False
) -> dict[str, Any]:
    """Return the state of an AdamW that has a base model's second moments, and no momentum.

    The moments count as settled: no bias correction makes the first steps larger, and ``beta2``
    alone says how fast gradients of its own replace them.

    Args:
        model: what is trained.
        folder: the base model's.
        config: of the training to come.
        fused: as the AdamW is that will go on from the state.

    Raises:
        InputError: the moments are not there, or not those of the model.
    """
    path = find_moments(folder)
    try:
        moments = load_file(path)
    except (OSError, SafetensorError):
        raise InputError(f"{path} is damaged; measure the second moments anew") from None
    parameters, optimizer = make_optimizer(model, config, fused=fused)
    names = trained_names(model)
    for name, parameter in zip(names, parameters, strict=True):
        _check(path, name, moments.get(name), parameter)
    step = float(math.ceil(_SETTLED / (1 - max(config.beta1, config.beta2))))
    state = optimizer.state_dict()
    state["state"] = {
        index: {
            "step": torch.tensor(step),
            "exp_avg": torch.zeros_like(moments[name]),
            "exp_avg_sq": moments[name],
        }
        for index, name in enumerate(names)
    }
    return state


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of what is trained, in AdamW's order."""
    return [name for name, each in model.named_parameters() if each.requires_grad]


def _check(path: Path, name: str, moment: Tensor | None, parameter: Tensor) -> None:
    if moment is None or moment.shape != parameter.shape or moment.dtype != torch.float32:
        raise InputError(f"{path} is not of this model (tensor {name!r}); measure it anew")
    if not (torch.isfinite(moment).all() and (moment >= 0).all()):
        raise InputError(f"{path} has no mean square in tensor {name!r}; measure it anew")
