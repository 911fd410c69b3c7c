"""Neighbouring blocks that use one set of matrices: fewer to store, as many to compute.

Models that are trained so from the start lose little (MobileLLM). Sharing after training, by the
mean of what the blocks had, costs much, and is meant as a start for distillation: the blocks
hold the same parameter, so that training afterwards keeps them alike. Norms and biases, which
are small, stay each block's own.

Shapes: O outputs, I inputs, B blocks of a group.

References:
    Liu et al. 2024, MobileLLM, arXiv:2402.14905, section 2.3 (block-wise sharing of neighbours).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import decoder_blocks
from mutirao.compress.config import SharingConfig
from mutirao.errors import FormatError, InputError


@torch.no_grad()
def share_blocks(model: Any, config: SharingConfig) -> None:
    """Let every few neighbouring blocks use the mean of their matrices, in place.

    The last group is smaller where the number of blocks is no multiple.

    Args:
        model: a transformers causal model.
        config: see ``SharingConfig``.

    Raises:
        FormatError: neighbouring blocks differ in their matrices' names or shapes, or the model
            is of a kind that is not supported.
        InputError: the model has a single block.
    """
    blocks = decoder_blocks(model)
    names, layers = list(blocks), [_linear_layers(block) for block in blocks.values()]
    if len(names) == 1:
        raise InputError(
            "the model has a single block and nothing to share its matrices with; leave out "
            "the step share"
        )
    starts = range(0, len(names), config.every)
    for start in starts:
        for name, others in list(zip(names, layers, strict=True))[start : start + config.every]:
            if _shapes(others) != _shapes(layers[start]):
                raise FormatError(
                    f"{names[start]} and {name} cannot share their matrices: names or shapes "
                    "differ (expected blocks that are alike)"
                )
    for start in starts:
        group = layers[start : start + config.every]
        for name in group[0]:
            _share([each[name] for each in group])


def named_weights(model: Any) -> dict[str, Tensor]:
    """Return all parameters by all names, for a file that readers without sharing open.

    A parameter that several names share is copied for all but the first, since safetensors holds
    every tensor by itself; a head that is tied to the embedding is left out, as readers expect.

    Args:
        model: a transformers causal model.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    tied = {f"{name}.weight" for name, each in model.named_modules() if is_tied and each is head}
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            weight = parameter.detach().contiguous()
            weights[name] = weight.clone() if id(parameter) in seen else weight
            seen.add(id(parameter))
    return weights


def _linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in block.named_modules() if isinstance(each, nn.Linear)}


def _shapes(layers: dict[str, nn.Linear]) -> dict[str, torch.Size]:
    return {name: layer.weight.shape for name, layer in layers.items()}


def _share(layers: list[nn.Linear]) -> None:
    """Give all layers the first one's parameter, set to the mean of theirs."""
    weights_BOI = torch.stack([layer.weight.float() for layer in layers])
    shared = layers[0].weight
    shared.copy_(weights_BOI.mean(dim=0))
    for layer in layers:
        layer.weight = shared
