"""Greedy decoding with any transformers model, as little around it as there can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def greedy_tokens(model: Any, prompt: list[int]) -> Iterator[int]:
    """Yield the most probable next tokens for ever, each as soon as it is known."""
    inputs = torch.tensor([prompt])
    cache = None
    while True:
        with torch.inference_mode():
            output = model(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        cache = output.past_key_values
        inputs = output.logits[:, -1].argmax(-1, keepdim=True)
        yield int(inputs)
