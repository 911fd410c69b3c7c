"""What a model with fewer weights would take where each matrix is stored as is best for it.

Files that any reader opens hold dense matrices; these figures say what a format for pruned,
low-rank and shared ones would hold, in parameters of 16 bits, so that methods can be compared.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SPARSE_SHARE = 0.25
"""Share of zeros from which a matrix is stored as its other weights and a mask. Assumption: it
saves from a sixteenth on, but nobody would for so little."""
PARAMETER_BITS = 16
ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bfloat16."""


def remember_rank(layer: nn.Module, rank: int) -> None:
    """Note that a layer's weight is a product of factors of a rank; copies of it know too."""
    noted: Any = layer
    noted.stored_rank = rank


@torch.no_grad()
def stored_parameters(model: nn.Module) -> int:
    """Count what is to be stored, in parameters of 16 bits, rounded up.

    A weight whose rank R is remembered counts as its factors, R (O + I), as long as it is of that
    rank up to rounding to bfloat16: not after training or rounding to few bits. A matrix with at
    least a quarter of zeros counts as its other weights and one bit per place for where they are.
    (2:4 takes the same: 2 bits for each of 2 kept weights are 4 bits for 4 places.) Shared and
    tied parameters count once. Ranks are not in files: count a model before it is written.
    """
    ranks: dict[int, Any] = {
        id(module.weight): module.stored_rank
        for module in model.modules()
        if isinstance(module, nn.Linear) and hasattr(module, "stored_rank")
    }
    bits = 0
    for parameter in model.parameters():
        rank = ranks.get(id(parameter))
        if rank is not None and _has_rank(parameter, rank):
            bits += PARAMETER_BITS * rank * sum(parameter.shape)
        else:
            bits += _stored_bits(parameter)
    return -(-bits // PARAMETER_BITS)


def _has_rank(weight_OI: Tensor, rank: int) -> bool:
    """Say whether all but the largest R singular values are no more than rounding brings in."""
    weight_OI = weight_OI.double()
    if weight_OI.shape[0] > weight_OI.shape[1]:
        weight_OI = weight_OI.T
    squares = torch.linalg.eigvalsh(weight_OI @ weight_OI.T)  # of singular values, ascending
    rest = squares[: len(squares) - rank].sum()
    return bool(rest <= ROUNDING**2 * squares.sum())


def _stored_bits(weight: Tensor) -> int:
    """Return the bits of a parameter that is stored dense or by its non-zeros."""
    total = weight.numel()
    num_kept = int(torch.count_nonzero(weight))
    if weight.dim() != 2 or total - num_kept < SPARSE_SHARE * total:
        return PARAMETER_BITS * total
    return PARAMETER_BITS * num_kept + total
