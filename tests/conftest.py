"""Fixtures that several test packages share: a tiny random model, saved as people save them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mutirao.environment import silence

silence()
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: each has a core, not all of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for size in ("COLUMNS", "LINES"):  # of the terminal, which workers do not write to
        os.environ.pop(size, None)


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: two-layer Llama with tied embeddings, random, in bfloat16.

    Hidden size 64, MLP size 96, context of 128 tokens, byte-level BPE with chat template.
    Weights are larger than usual, so that predictions differ clearly from uniform.
    """
    import torch
    from tiny_tokenizer import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
