"""What compression cost: the rise of the loss on held-out text, and the divergence.

Both models score the same windows, so that what makes a window hard cancels out of the
difference; windows, not tokens, count as independent.

Shapes: W windows, T tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mutirao.evaluate.losses import TextResult, paired_difference
from mutirao.models.head import hidden_states, split_model

ROWS_PER_CHUNK = 256
"""Rows of logits held at a time: 50 MB per model in float32 at V = 49,152."""


class CompressionLoss(NamedTuple):
    """The rise of the loss, and the divergence of the predictions."""

    original: float
    """Loss of the original, in nats per token."""
    compressed: float
    """Loss of the compressed model, in nats per token."""
    rise: float
    """Compressed minus original, in nats per token."""
    standard_error: float
    """Of the rise, over windows, in nats per token."""
    divergence: float
    """Mean Kullback-Leibler divergence of the compressed predictions from the original's, in nats
    per token."""
    num_tokens: int
    """Scored tokens."""


@torch.inference_mode()
def window_states(model: Any, ids_WT: Tensor, *, windows_per_pass: int = 4) -> Tensor:
    """Return the (W, T - 1, D) states from which a model predicts all tokens but the first."""
    decoder, _ = split_model(model)
    parts = []
    for ids in torch.split(ids_WT[:, :-1], windows_per_pass):
        parts.append(hidden_states(decoder, ids, torch.ones_like(ids)))
    return torch.cat(parts)


@torch.inference_mode()
def measure_loss(original: Any, compressed: Any, ids_WT: Tensor) -> CompressionLoss:
    """Compare two models that share a tokenizer.

    Args:
        original: a transformers causal model.
        compressed: another.
        ids_WT: (W, T) token ids of held-out text, W at least 2.
    """
    return compare_losses(
        *compare_states(
            (split_model(original)[1], window_states(original, ids_WT)),
            (split_model(compressed)[1], window_states(compressed, ids_WT)),
            ids_WT,
        )
    )


def compare_losses(losses_WT: tuple[Tensor, Tensor], divergence_WT: Tensor) -> CompressionLoss:
    """Sum up what ``compare_states`` returned."""
    first, second = (_text_result(each) for each in losses_WT)
    rise = paired_difference(second, first)
    return CompressionLoss(
        first.loss,
        second.loss,
        rise.mean,
        rise.standard_error,
        float(divergence_WT.mean()),
        divergence_WT.numel(),
    )


def _text_result(losses_WT: Tensor) -> TextResult:
    """Return losses with windows as records."""
    return TextResult(
        loss=float(losses_WT.mean()),
        num_tokens=losses_WT.numel(),
        record_losses=tuple(losses_WT.sum(dim=1).tolist()),
        record_tokens=(losses_WT.shape[1],) * len(losses_WT),
    )


def compare_states(
    original: tuple[Any, Tensor], compressed: tuple[Any, Tensor], ids_WT: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return both losses and the divergence of every token, from heads and (W, T - 1, D) states.

    Returns:
        Two (W, T - 1) float64 losses, and the (W, T - 1) float64 divergence, all in nats.
    """
    shape = original[1].shape[:2]
    targets_N = ids_WT[:, 1:].reshape(-1)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, len(targets_N), ROWS_PER_CHUNK):
        end = begin + ROWS_PER_CHUNK
        first_NV, second_NV = (
            head(states.flatten(0, 1)[begin:end]).float().log_softmax(dim=1)
            for head, states in (original, compressed)
        )
        targets = targets_N[begin:end]
        divergence = functional.kl_div(second_NV, first_NV, log_target=True, reduction="none")
        rows.append(
            (
                functional.nll_loss(first_NV, targets, reduction="none"),
                functional.nll_loss(second_NV, targets, reduction="none"),
                divergence.sum(dim=1),
            )
        )
    first, second, apart = (
        torch.cat(each).double().reshape(shape) for each in zip(*rows, strict=True)
    )
    return (first, second), apart
