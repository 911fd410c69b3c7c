"""Windows of text for a model: some for a method to look at, others to measure its result on.

The documents of a folder or file follow each other, each ended by the end-of-text token. What is
measured on lies in the last fifth, which methods never see.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mutirao.compress.config import TextConfig
from mutirao.data.readers.folder import read_file, read_folder
from mutirao.errors import DataError, InputError

HELDOUT_SHARE = 0.2


class Encoder(Protocol):
    """What turns text into tokens; ``CausalModel`` is one."""

    eos_id: int
    context_tokens: int | None
    """Longest window that its model takes; None for any."""

    def encode(self, text: str) -> list[int]: ...


class Windows(NamedTuple):
    """What ``read_windows`` returns."""

    calibration: Tensor
    """(W, T) token ids that methods may look at."""
    heldout: Tensor
    """(W, T) token ids to measure on."""


def read_windows(path: Path, encoder: Encoder, config: TextConfig) -> Windows:
    """Cut text into windows.

    Args:
        path: a folder, or a file, of a kind that ``data.readers`` reads.
        encoder: the model's own.
        config: how many windows, how long.

    Raises:
        DataError: there is too little text; the message says how much is needed.
        InputError: the model takes no windows so long.
    """
    context = encoder.context_tokens
    if context is not None and config.window_tokens > context:
        raise InputError(
            f"windows of {config.window_tokens} tokens are longer than the model takes (at most "
            f"{context}); lower --window-tokens"
        )
    ids: list[int] = []
    for record in read_folder(path) if path.is_dir() else read_file(path):
        ids += [*encoder.encode(record.text), encoder.eos_id]
    num_heldout = int(len(ids) * HELDOUT_SHARE)
    width = config.window_tokens
    needed = max(
        config.heldout_windows * width / HELDOUT_SHARE,
        config.calibration_windows * width / (1 - HELDOUT_SHARE),
    )
    if len(ids) < needed:
        raise DataError(
            f"{path} has {len(ids):,} tokens (at least {needed:,.0f} are needed for "
            f"{config.calibration_windows} windows of {width} tokens to look at and "
            f"{config.heldout_windows} others to measure on); give more text or ask for fewer"
        )
    tokens = torch.tensor(ids)
    return Windows(
        _spread(tokens[: len(ids) - num_heldout], config.calibration_windows, width),
        _spread(tokens[len(ids) - num_heldout :], config.heldout_windows, width),
    )


def _spread(tokens: Tensor, num_windows: int, width: int) -> Tensor:
    """Return windows that do not overlap, from all over the tokens."""
    starts = torch.linspace(0, len(tokens) - width, num_windows, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(width)]
