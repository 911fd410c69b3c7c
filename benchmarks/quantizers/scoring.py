"""Losses on the held-out windows, of the original once and of every result beside it.

Sums are kept for each window, so that any two settings can be compared on the same windows.

Shapes: W windows, T tokens, D channels.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutirao.compress.loss import compare_states, window_states
from mutirao.errors import DataError
from mutirao.formats.huggingface import Dtype
from mutirao.models.causal import CausalModel
from mutirao.models.head import split_model

ROUND_DECIMALS = 5
"""Of a window's sum, in nats."""


class Scorer:
    """Scores model directories; holds the original's head and states, not its blocks."""

    def __init__(self, original: Any, ids_WT: Tensor, dtype: Dtype, kept: Path) -> None:
        """Prepare it.

        Args:
            original: a transformers causal model.
            ids_WT: (W, T) held-out token ids.
            dtype: of the models that are scored.
            kept: file of the original's states; written where it is missing.
        """
        if not kept.is_file():
            part = kept.with_suffix(".part")
            torch.save(window_states(original, ids_WT), part)
            part.replace(kept)
        self._states_WTD: Tensor = torch.load(kept, weights_only=True)
        self._head = split_model(original)[1]
        self._ids_WT = ids_WT
        self._dtype = dtype

    def score_original(self) -> dict[str, Any]:
        """Return the original's own figures, in the fields of ``score``."""
        return self._compare(self._head, self._states_WTD)

    def score(self, folder: Path) -> dict[str, Any]:
        """Open a model directory, plain or compressed, and return its sums for each window.

        Raises:
            DataError: a loss is not finite.
            FormatError: the directory is damaged, or is not supported.
        """
        model = CausalModel.open(folder, self._dtype).model
        figures = self._compare(split_model(model)[1], window_states(model, self._ids_WT))
        del model
        gc.collect()
        return figures

    @torch.inference_mode()
    def _compare(self, head: Any, states_WTD: Tensor) -> dict[str, Any]:
        (_, losses_WT), divergence_WT = compare_states(
            (self._head, self._states_WTD), (head, states_WTD), self._ids_WT
        )
        if not bool(torch.isfinite(losses_WT).all()):
            raise DataError("a loss on held-out text is not finite")
        return {
            "window_losses": _sums(losses_WT),
            "window_divergences": _sums(divergence_WT),
            "window_tokens": losses_WT.shape[1],
        }


def _sums(values_WT: Tensor) -> list[float]:
    return [round(each, ROUND_DECIMALS) for each in values_WT.sum(dim=1).tolist()]
