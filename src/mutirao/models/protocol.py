"""What the rest of the project may ask of a language model.

Everything that measures a model goes through these few questions, so that another engine
can stand behind them. Training and text generation are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class LanguageModel(Protocol):
    """A causal model over token ids, with the tokenizer that belongs to it."""

    name: str
    """What people call it."""
    eos_id: int
    """Token that ends a text."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        ...

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[NDArray[np.float64]]:
        """Score given tokens.

        Args:
            sequences: token ids, each at least one token.
            starts: per sequence, the first position that is scored, at least 1.

        Returns:
            Per sequence, the natural log-probabilities of its tokens from ``starts`` on,
            each given all tokens before it; empty where nothing stands there.

        Raises:
            InputError: a sequence is empty or longer than the model's context, or a
                start is below 1.
        """
        ...

    def next_token_logprobs(
        self, contexts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float64]]:
        """Score tokens that could follow.

        Args:
            contexts: token ids, each at least one token.
            candidates: per context, token ids.

        Returns:
            Per context, the natural log-probability of each candidate right after it, over
            the whole vocabulary (candidates are not renormalised).

        Raises:
            InputError: a context is empty or longer than the model's context.
        """
        ...
