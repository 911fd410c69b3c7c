"""Grids that learn once codes are fixed: all scales of a rounded model, trained end to end.

Rounding looks at one layer, or one block, at a time. Here the whole rounded model follows the
predictions of its original, and learns the scale of each group, which is stored anyway, so that
nothing gets larger; codes and zero points stay (the second phase of EfficientQAT, Chen et al. 2024,
arXiv:2407.11062, which learns from the text's next tokens). A group's scale is trained as a factor
of what it was, so that one learning rate, a share of a scale per step, suits all.

Shapes: W windows, T tokens, O outputs, I inputs, G groups of inputs, S weights in a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutirao.compress.blocks import linear_layers, replaced_layers
from mutirao.compress.config import TuneConfig
from mutirao.compress.rounding.grid import QuantizedWeight
from mutirao.compress.training.following import check_request, follow_teacher

PASSES = 2
"""Passes over the windows where no number of steps is given. Assumption: at 2 bits, the second
lowers the rise by a tenth, at twice the time (docs/log.md)."""
RATE_TIMES_WIDTH = 2.0
"""Learning rate times the model's channels where none is given. Assumption: 0.01 was best at width
192, and 0.003 better than 0.01 at 576 (docs/log.md); what a step of all scales does to a sum grows
with the number of its terms."""


def tune_grids(
    model: Any,
    codes: Mapping[str, QuantizedWeight],
    teacher: Any,
    ids_WT: Tensor,
    config: TuneConfig,
    *,
    seed: int = 0,
) -> dict[str, QuantizedWeight]:
    """Train the scales of a rounded model to follow a teacher.

    Args:
        model: a transformers causal model; its rounded layers get the weights that the new codes
            stand for.
        codes: of all linear layers of its blocks, by name; layers that share a weight share them.
        teacher: another with the same vocabulary, unchanged.
        ids_WT: (W, T) token ids.
        config: how to train.
        seed: of the order of windows.

    Returns:
        The same codes and zero points, with other scales.

    Raises:
        InputError: a number is not accepted, or TRL is not installed.
        DataError: too few windows, or the loss is no longer finite.
    """
    windows_per_step = min(config.windows_per_step, max(1, len(ids_WT)))
    steps = config.steps or max(1, PASSES * len(ids_WT) // windows_per_step)
    check_request(ids_WT, steps=steps, windows_per_step=windows_per_step)
    layers = linear_layers(model)
    # Codes are one object for all layers that share a weight.
    factors = {
        id(each.codes): nn.Parameter(torch.ones(each.scale.shape)) for each in codes.values()
    }
    grids: dict[str, nn.Module] = {
        name: _GridLinear(codes[name], layer.bias, factors[id(codes[name].codes)])
        for name, layer in layers.items()
    }
    with replaced_layers(model, grids), _without_weights(layers, codes):
        follow_teacher(
            model,
            teacher,
            ids_WT,
            steps=steps,
            learning_rate=config.learning_rate or RATE_TIMES_WIDTH / model.config.hidden_size,
            windows_per_step=windows_per_step,
            seed=seed,
            description="tune scales",
            learning=list(factors.values()),
        )
    tuned = {}
    for name, before in codes.items():
        scale_OG = before.scale.float() * factors[id(before.codes)].detach()
        tuned[name] = before._replace(scale=scale_OG.to(torch.bfloat16))
        layers[name].weight.data.copy_(tuned[name].expand())
    return tuned


@contextmanager
def _without_weights(
    layers: Mapping[str, nn.Linear], codes: Mapping[str, QuantizedWeight]
) -> Iterator[None]:
    """Free layers' weights for a while; afterwards they are what their codes stand for."""
    weights = {id(layer.weight): (layer.weight, codes[name]) for name, layer in layers.items()}
    dtypes = {key: weight.dtype for key, (weight, _) in weights.items()}
    for weight, _ in weights.values():
        weight.data = weight.data.new_empty(0)
    try:
        yield
    finally:
        for key, (weight, each) in weights.items():
            weight.data = each.expand().to(dtypes[key])


class _GridLinear(nn.Module):
    """A layer whose weight comes from codes that stay and a factor of each group's scale."""

    def __init__(
        self, codes: QuantizedWeight, bias: Tensor | None, factor_OG: nn.Parameter
    ) -> None:
        super().__init__()
        for name, part in codes._asdict().items():  # as buffers, which move with the model
            self.register_buffer(name, part)
        self.factor_OG = factor_OG
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        codes = QuantizedWeight(*(self.get_buffer(name) for name in QuantizedWeight._fields))
        y: Tensor = _GridProduct.apply(x, self.factor_OG, codes)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _GridProduct(torch.autograd.Function):
    """The product with a weight that is never kept: the way back expands it again.

    Computed in the number format that comes back, which autocast may have chosen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor_OG: Tensor, codes: QuantizedWeight) -> Tensor:
        ctx.save_for_backward(x, factor_OG)
        ctx.codes = codes
        return functional.linear(x, _scaled(codes, factor_OG).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, factor_OG = ctx.saved_tensors
        (gradient,) = gradients
        of_weight_OI = gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)
        of_factors_OGS = of_weight_OI.float().reshape(*factor_OG.shape, -1) * _unscaled(ctx.codes)
        of_factors_OG = of_factors_OGS.sum(dim=2) * ctx.codes.scale.float()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _scaled(ctx.codes, factor_OG).to(gradient.dtype)).to(x.dtype)
        return of_x, of_factors_OG, None


def _scaled(codes: QuantizedWeight, factor_OG: Tensor) -> Tensor:
    """Return the (O, I) weight with each group's scale times its factor."""
    scale_OG = codes.scale.float() * factor_OG
    return (_unscaled(codes) * scale_OG[..., None]).flatten(1)


def _unscaled(codes: QuantizedWeight) -> Tensor:
    """Return (O, G, S) how many steps each weight is from zero."""
    codes_OGS = codes.codes.reshape(*codes.scale.shape, -1)
    return codes_OGS.float() - codes.zero.float()[..., None]
