"""Tiny random models of several families, saved as people save them, for tests of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from small_vocabularies import sentencepiece
from tiny_tokenizer import train_tokenizer

from mutirao.formats.gguf_tokenizer import convert_gguf_tokenizer
from mutirao.formats.huggingface import without_progress_bars

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def save_tiny(
    folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16, **settings: Any
) -> Path:
    """Save a two-layer model of a family, all of its parameters random; return the folder."""
    tokenizer = train_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = getattr(transformers, f"{family}Config")(**SIZES | ids | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.2)
    with without_progress_bars():
        model.to(dtype).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def save_sentencepiece(folder: Path) -> None:
    """Give a model a vocabulary in SentencePiece's manner, with a token for each byte."""
    document, config = convert_gguf_tokenizer(sentencepiece())
    (folder / "tokenizer.json").write_text(json.dumps(document))
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
