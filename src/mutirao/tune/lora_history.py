"""What earlier rounds learned, beside an adapter that is still being trained.

For aggregation 'stacked' and 'fedex' (``federated.aggregation.low_rank_rounds``) a site holds,
for each adapted layer, frozen factors of all that was learned so far. They are a second path,
y + B (A x) in float32, put on by a forward hook: the layer's own weight is never written, so it
may be in bfloat16 or 4 bits, and every site has the same sum to the bit of its factors. Costs
R (O + I) multiplications a token for a history of rank R, which grows with the rounds.

``merge_history`` folds the factors into float32 weights where the second path is not wanted.
Quantized weights cannot take it, nor bfloat16 ones: a small change vanishes against a large
weight there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutirao.errors import FormatError, ShapeError

_NAME = "history_path"
_HOOK = "_history_hook"

History = Mapping[str, tuple[Tensor, Tensor]]
"""(O, R) B and (R, I) A by module, named as the adapter's tensors are, up to ``.lora_A``."""


class HistoryPath(nn.Module):
    """A frozen low-rank product, B A x."""

    b: Tensor
    a: Tensor

    def __init__(self, b_OR: Tensor, a_RI: Tensor) -> None:
        super().__init__()
        # Buffers move with the model; not persistent, so that no checkpoint holds them twice.
        self.register_buffer("b", b_OR.detach().float(), persistent=False)
        self.register_buffer("a", a_RI.detach().float(), persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return the product for (..., I) inputs of any float type, in float32."""
        return functional.linear(functional.linear(x_BTI.float(), self.a), self.b)


def set_history(model: nn.Module, history: History) -> None:
    """Put a history beside a model's layers, in place of the one before; empty takes it off.

    Args:
        model: with or without adapters; its weights and trained parameters stay as they are.
        history: by module; each must be a linear layer or one that wraps it.

    Raises:
        ShapeError: a module is not there, or has another size; the model is unchanged.
    """
    layers = {name: _find(model, name, *factors) for name, factors in history.items()}
    clear_history(model)
    for name, layer in layers.items():
        b_OR, a_RI = history[name]
        if not b_OR.shape[1]:
            continue
        device = next((p.device for p in layer.parameters()), b_OR.device)
        setattr(layer, _NAME, HistoryPath(b_OR, a_RI).to(device))
        object.__setattr__(layer, _HOOK, layer.register_forward_hook(_add_path))


def clear_history(model: nn.Module) -> None:
    """Take the history off a model's layers."""
    for layer in list(model.modules()):
        if (hook := getattr(layer, _HOOK, None)) is not None:
            hook.remove()
            delattr(layer, _HOOK)
            delattr(layer, _NAME)


def merge_history(model: nn.Module, history: History) -> None:
    """Fold a history into the weights of a float32 model.

    Raises:
        ShapeError: a module is not there, or has another size.
        FormatError: a weight is not float32; nothing was changed.
    """
    weights = {name: _weight(_find(model, name, *both)) for name, both in history.items()}
    for name, weight in weights.items():
        if weight is None or weight.dtype != torch.float32:
            kind = getattr(weight, "dtype", "of no known kind")
            raise FormatError(
                f"the weight of {name} is {kind} and cannot take a history (expected "
                "torch.float32); keep it as a second path"
            )
    with torch.no_grad():
        for name, (b_OR, a_RI) in history.items():
            if (weight := weights[name]) is not None:
                weight += (b_OR.double() @ a_RI.double()).to(weight.device, torch.float32)


def _add_path(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    path: HistoryPath = getattr(layer, _NAME)
    added: Tensor = path(inputs[0])
    return (output.float() + added).to(output.dtype)


def _find(model: nn.Module, name: str, b_OR: Tensor, a_RI: Tensor) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ShapeError(f"a history came for {name}, which this model does not have") from None
    base = getattr(layer, "base_layer", layer)
    size = (getattr(base, "out_features", None), getattr(base, "in_features", None))
    if (b_OR.shape[0], a_RI.shape[1]) != size or b_OR.shape[1] != a_RI.shape[0]:
        raise ShapeError(
            f"the history of {name} has factors {tuple(b_OR.shape)} and {tuple(a_RI.shape)} "
            f"(expected a product of shape {size})"
        )
    return layer


def _weight(layer: nn.Module) -> Tensor | None:
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    return weight if isinstance(weight, Tensor) else None
