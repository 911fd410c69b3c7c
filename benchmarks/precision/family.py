"""The family of models that the sweep trains: Llama-shaped, four blocks, growing in width.

N counts the matrices that are rounded: those of the blocks. Embedding and head, which are one, see
256 byte values and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from precision.text import VOCABULARY, WINDOW

HEAD_WIDTH = 32
NUM_BLOCKS = 4


@dataclass(frozen=True)
class Size:
    """One member."""

    width: int

    @property
    def hidden(self) -> int:
        """Width between the two halves of a block's network: 8/3, in whole groups of 32."""
        return -(-self.width * 8 // 3 // 32) * 32

    @property
    def num_parameters(self) -> int:
        """N."""
        return NUM_BLOCKS * (4 * self.width**2 + 3 * self.width * self.hidden)

    @property
    def learning_rate(self) -> float:
        """Peak rate of AdamW: falls with width, as in Yang et al. 2022, arXiv:2203.03466; the
        constant is within 0.01 nats of the best of three at width 64 and of two at 128
        (docs/log.md)."""
        return 4e-3 * 64 / self.width


SIZES = {"64": Size(64), "96": Size(96), "128": Size(128), "192": Size(192), "256": Size(256)}


def make_model(size: Size, seed: int) -> Any:
    """Return a member with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=NUM_BLOCKS,
            num_attention_heads=size.width // HEAD_WIDTH,
            num_key_value_heads=size.width // HEAD_WIDTH,
            max_position_embeddings=WINDOW,
            initializer_range=0.5 / size.width**0.5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
