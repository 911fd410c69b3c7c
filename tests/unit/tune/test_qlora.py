"""QLoRA: frozen layers in 4 bits, the adapter unchanged and still trained."""

import builtins

import pytest
import torch

from mutirao.data.tokenization import Example
from mutirao.errors import InputError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.config import TrainConfig
from mutirao.train.loop import train
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import adapter_state, attach_lora, frozen_sha256
from mutirao.tune.qlora import quantize_base

CONFIG = LoRAConfig(rank=2, target_modules=("q_proj", "down_proj"), num_layers=1)


@pytest.fixture
def model(tiny_model_directory):
    return attach_lora(load_causal_lm(tiny_model_directory)[0], CONFIG, seed=0)


def test_without_bitsandbytes_it_says_how_to_install_it(model, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **more):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'pip install "mutirao\[qlora\]"'):
        quantize_base(model)


def test_the_base_shrinks_and_the_adapter_learns(model):
    pytest.importorskip("bitsandbytes", reason="the extra 'qlora' is not installed")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
    frozen, start = frozen_sha256(model), adapter_state(model)
    assert quantize_base(model) == 2 * 7
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 64 // 2)
    with torch.no_grad():
        after = model(input_ids=ids).logits.float()
    error = float((after - before).norm() / before.norm())
    assert 0.01 < error < 0.5
    assert frozen_sha256(model) == frozen
    assert list(adapter_state(model)) == list(start)
    config = TrainConfig(learning_rate=1e-2, warmup_tokens=0, tokens_per_step=32)
    examples = [Example(tuple(range(5, 25)), 1)]
    losses = [train(model, examples, config, pad_id=0, seed=n).loss for n in range(8)]
    assert losses[-1] < losses[0]
