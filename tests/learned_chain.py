"""A small decoder that has learned which token follows which: what rounds it must forget some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 40


def make_windows(num_windows: int, length: int = 32, seed: int = 0) -> Tensor:
    """Windows in which each token names the next one, but for one in ten."""
    follower = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (num_windows, length), generator=generator)
    is_free = torch.rand(num_windows, length, generator=generator) < 0.1
    for t in range(1, length):
        ids[:, t] = torch.where(is_free[:, t], ids[:, t], follower[ids[:, t - 1]])
    return ids


def make_model(seed: int = 0) -> Any:
    """Return one with random weights: two blocks, 48 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()


def learn() -> dict[str, Tensor]:
    """Return the weights of one that has learned what can be learned, in seconds."""
    model, ids = make_model(), make_windows(2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = ids[torch.randint(0, len(ids), (16,), generator=generator)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(weights: dict[str, Tensor]) -> Any:
    """Return a model with given weights."""
    model = make_model()
    model.load_state_dict(weights)
    return model
