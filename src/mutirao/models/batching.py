"""Put sequences of different lengths into padded batches that waste little.

Used by training and evaluation alike. Packing several records into one sequence is left
out on purpose: nothing is learned or scored across records.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mutirao.errors import InputError


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that neighbours in length share a batch.

    Args:
        lengths: tokens of each sequence.
        max_tokens: largest padded area (sequences x longest length) of a batch, in tokens;
            a sequence that is longer by itself gets a batch of its own.

    Returns:
        Batches of indices, shortest sequences first; ties keep their order, so that the
        result depends on the arguments alone.

    Raises:
        InputError: max_tokens is below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} is not accepted (expected at least 1)")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Lengths rise, so the newcomer is the longest and sets the width.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_sequences(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack sequences, filling shorter ones on the right.

    Args:
        sequences: token ids, at least one sequence.
        pad_id: token that fills.

    Returns:
        (B, T) int64 token ids, and (B, T) int64 attention mask: 1 for tokens, 0 for filling.

    Raises:
        InputError: there are no sequences.
    """
    if not sequences:
        raise InputError("no sequence was given to make a batch of (expected at least one)")
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids_BT = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        attention_mask_BT[row, : len(sequence)] = 1
    return ids_BT, attention_mask_BT
