"""Low rank by what comes in: each weight becomes the product that changes its outputs least.

The error that counts is that of a layer's output on calibration text, trace(E G E^T) with the
Gram matrix G of its inputs. With the Cholesky factor S of G it is |E S|^2, so that cutting the
singular value decomposition of W S is best (Eckart and Young), and the error is the sum of the
squares of the singular values that were cut. As the left singular vectors U_R are orthonormal,
U_R S_R V_R^T S^-1 is U_R U_R^T W: a projection of the outputs, which needs no inverse.

The product is put in place as a dense weight, so that any reader opens the model; its rank is
remembered for ``sizes``. Training such a weight afterwards makes it dense in earnest.

Left out: fitting the factors anew to the inputs that earlier cuts changed (the paper's second
step), and ranks that differ by layer in anything but their shape.

Shapes: W windows, T tokens, O outputs, I inputs, R rank.

References:
    Wang et al. 2024, SVD-LLM, arXiv:2403.07378, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import LowRankConfig
from mutirao.compress.shrinking.layers import change_layers
from mutirao.compress.shrinking.sizes import remember_rank
from mutirao.errors import InputError

DAMPING = 1e-6
"""Added to the Gram matrix's diagonal, as a share of its mean, so that it can be factored where
inputs depend on each other. In float64, and far below what calibration text tells apart."""


@torch.no_grad()
def lower_rank(model: Any, ids_WT: Tensor, config: LowRankConfig) -> None:
    """Replace all linear layers' weights in the decoder's blocks by low-rank ones, in place.

    Args:
        model: a transformers causal model, of any floating-point type.
        ids_WT: (W, T) token ids of calibration text; more tokens than a layer has inputs.
        config: see ``LowRankConfig``.

    Raises:
        DataError: weights, or inputs on the text, are not finite.
        FormatError: the model is of a kind that is not supported.
        InputError: so few parameters make no rank of 1.
    """
    for name, layer in linear_layers(model).items():
        if not rank_for(layer.out_features, layer.in_features, config.kept):
            raise InputError(
                f"compress.low_rank.kept={config.kept:g} leaves {name} no rank at all (its "
                f"weight is {layer.out_features} x {layer.in_features}); keep more"
            )

    def change(layer: nn.Linear, gram_II: Tensor) -> None:
        rank = rank_for(layer.out_features, layer.in_features, config.kept)
        layer.weight.copy_(truncate_weight(layer.weight, gram_II, rank))
        remember_rank(layer, rank)

    change_layers(model, ids_WT, f"lowering ranks to {config.kept:.0%}", change)


def rank_for(num_outputs: int, num_inputs: int, kept: float) -> int:
    """Return the largest rank whose factors have at most a share of the weight's parameters."""
    return int(kept * num_outputs * num_inputs / (num_outputs + num_inputs))


def truncate_weight(weight_OI: Tensor, gram_II: Tensor, rank: int) -> Tensor:
    """Return the weight of a rank whose outputs are closest to a weight's.

    Args:
        weight_OI: (O, I) floating point, finite.
        gram_II: (I, I) mean of x x^T over calibration tokens, x the layer's input; finite.
        rank: R, at most O and I.

    Returns:
        (O, I) float64.

    References:
        See the module; the damped Gram matrix is what the result is optimal for.
    """
    weight_OI = weight_OI.double()
    whitened_OI = weight_OI @ _cholesky_factor(gram_II.double())
    left_OR: Tensor = torch.linalg.svd(whitened_OI, full_matrices=False).U[:, :rank]
    return left_OR @ (left_OR.T @ weight_OI)


def _cholesky_factor(gram_II: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a Gram matrix, damped as much as it takes."""
    mean = float(gram_II.diagonal().mean()) or 1.0  # no input is ever on: any weight will do
    share = DAMPING
    while True:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(share * mean)
        factor_II: Tensor
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not int(failed):
            return factor_II
        share *= 10  # the matrix was summed in float32
