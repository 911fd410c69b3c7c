"""GGUF files that we write, read by transformers: same weights, same logits.

transformers 5.19 reads neither RoPE scaling, nor biases of the llama architecture, nor the size
of Qwen 3's heads (it takes 128); those are checked with the engine. Same sums in the same order:
logits of float types agree to the bit, those of codes to what float16 offsets change (0.015 at
the worst, of logits with a deviation of 3).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_exports import save_tiny

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.compress.export_check import directory_logits, gguf_logits
from mutirao.formats.gguf import check_gguf, convert_gguf
from mutirao.formats.gguf_plan import plan_gguf
from mutirao.formats.gguf_writer import write_gguf
from mutirao.formats.huggingface import load_causal_lm

WINDOWS = [list(range(20, 60)), [7, 300, 2]]
CASES = {
    "llama": ("Llama", {}),
    "llama-tied-odd": ("Llama", {"tie_word_embeddings": True, "vocab_size": 333}),
    "llama-wide-heads": ("Llama", {"head_dim": 32, "rms_norm_eps": 1e-2}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
    "qwen3": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_are_the_same(case, tmp_path):
    family, settings = case
    folder = save_tiny(tmp_path / "model", family, **settings)
    write_gguf(plan_gguf(folder), tmp_path / "m.gguf")
    expected = directory_logits(folder, WINDOWS)
    for first, second in zip(expected, gguf_logits(tmp_path / "m.gguf", WINDOWS), strict=True):
        assert first.std() > 0.3
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_codes_of_a_compressed_model(family, tmp_path):
    folder = save_tiny(tmp_path / "model", family)
    compress_model(folder, tmp_path / "small", CompressConfig(bits=4, group_size=32))
    write_gguf(plan_gguf(tmp_path / "small"), tmp_path / "m.gguf")
    assert check_gguf(tmp_path / "m.gguf").main_type == "Q4_1"
    expected = directory_logits(tmp_path / "small", WINDOWS)
    for first, second in zip(expected, gguf_logits(tmp_path / "m.gguf", WINDOWS), strict=True):
        np.testing.assert_allclose(second, first, atol=0.02)


def test_tokenizer_and_chat_template_come_back(tmp_path):
    folder = save_tiny(tmp_path / "model", "Llama")
    write_gguf(plan_gguf(folder), tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    model, tokenizer = load_causal_lm(folder)
    model_back, tokenizer_back = load_causal_lm(tmp_path / "back")
    text = "O paciente, 67 anos: fever & cough\n\n  39.2"
    assert tokenizer_back.encode(text) == tokenizer.encode(text)
    assert tokenizer_back.chat_template == tokenizer.chat_template
    assert tokenizer_back.eos_token == tokenizer.eos_token
    state = model_back.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight)
