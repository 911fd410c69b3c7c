from __future__ import annotations

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from mutirao.compress.blocks import decoder_blocks, linear_layers, walk_blocks
from mutirao.errors import FormatError
from mutirao.formats.huggingface import load_causal_lm

IDS = torch.arange(5, 5 + 6 * 12).reshape(6, 12) % 200


@pytest.fixture
def model(tiny_model_directory):
    return load_causal_lm(tiny_model_directory, dtype="float32")[0]


def test_layers_are_those_of_the_blocks(model):
    names = set(linear_layers(model))
    assert "model.layers.0.mlp.down_proj" in names
    assert not any("lm_head" in name for name in names)
    assert len(names) == 7 * len(decoder_blocks(model))


def _gemma():
    """Blocks of two kinds, with masks and positions of their own."""
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_local_base_freq=100.0,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_grams_are_those_of_a_plain_forward_pass(kind, request):
    model = _gemma() if kind == "gemma3" else request.getfixturevalue("model")
    seen = {}

    def visit(prefix, block, grams):
        seen.update({f"{prefix}.{name}": gram for name, gram in grams.items()})

    inputs = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    walk_blocks(model, IDS, visit, windows_per_pass=4)  # two passes, the last one short
    assert set(seen) == set(inputs)
    for name, gram in seen.items():
        x = inputs[name].reshape(-1, inputs[name].shape[-1]).double()
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_later_blocks_see_what_was_changed_before_them(model):
    seen = []

    def visit(prefix, block, grams):
        seen.append(grams["self_attn.q_proj"].clone())
        with torch.no_grad():
            block.mlp.down_proj.weight.zero_()

    walk_blocks(model, IDS, visit)
    again = []
    walk_blocks(model, IDS, lambda prefix, block, grams: again.append(grams["self_attn.q_proj"]))
    for first, second in zip(seen, again, strict=True):
        torch.testing.assert_close(first, second)


def test_other_kinds_of_layers_are_refused():
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)
    with pytest.raises(FormatError, match="gpt2"):
        decoder_blocks(GPT2LMHeadModel(config))


def test_a_matrix_that_is_in_no_linear_layer_is_refused(model):
    model.model.layers[0].mlp.extra = torch.nn.Conv1d(2, 2, 1)
    with pytest.raises(FormatError, match="Conv1d"):
        decoder_blocks(model)
