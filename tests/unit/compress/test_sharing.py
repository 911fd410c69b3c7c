from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mutirao.compress.blocks import decoder_blocks, linear_layers
from mutirao.compress.config import SharingConfig
from mutirao.compress.shrinking.sharing import named_weights, share_blocks
from mutirao.errors import FormatError, InputError

IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _model(num_blocks=5, tied=True, kind=(LlamaConfig, LlamaForCausalLM)):
    config = kind[0](
        **SIZES, num_hidden_layers=num_blocks, tie_word_embeddings=tied, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind[1](config).eval()
        for parameter in model.parameters():  # norms and biases that differ from block to block
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


@torch.no_grad()
def _logits(model):
    return model(input_ids=IDS).logits


def test_neighbours_use_the_mean_of_their_matrices():
    model = _model()
    before = copy.deepcopy(model)
    share_blocks(model, SharingConfig(every=2))
    layers, old = linear_layers(model), linear_layers(before)
    for name in (name.removeprefix("model.layers.0.") for name in old if ".0." in name):
        weights = [layers[f"model.layers.{i}.{name}"].weight for i in range(5)]
        olds = [old[f"model.layers.{i}.{name}"].weight for i in range(5)]
        assert weights[0] is weights[1]
        assert weights[2] is weights[3]
        assert weights[1] is not weights[2]
        torch.testing.assert_close(weights[0], (olds[0] + olds[1]) / 2)
        torch.testing.assert_close(weights[2], (olds[2] + olds[3]) / 2)
        assert torch.equal(weights[4], olds[4])  # has no neighbour left
    first, second = (block.input_layernorm.weight for block in model.model.layers[:2])
    assert not torch.equal(first, second)
    assert not torch.equal(_logits(model), _logits(before))


def test_it_computes_what_a_model_with_copies_computes():
    model = _model(num_blocks=4)
    copies = copy.deepcopy(model)
    share_blocks(model, SharingConfig(every=4))
    with torch.no_grad():
        for name, layer in linear_layers(copies).items():
            layer.weight.copy_(linear_layers(model)[name].weight)
    assert torch.equal(_logits(model), _logits(copies))


def test_training_a_copy_in_another_type_keeps_blocks_alike():
    model = _model(num_blocks=2)
    share_blocks(model, SharingConfig())
    model = copy.deepcopy(model).bfloat16().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    first, second = (block.mlp.up_proj.weight for block in model.model.layers)
    assert first is second
    assert not torch.equal(first, before)
    norms = [block.input_layernorm.weight for block in model.model.layers]
    assert not torch.equal(*norms)


@pytest.mark.parametrize("tied", [True, False])
def test_named_weights_make_a_folder_that_opens(tmp_path, tied):
    model = _model(tied=tied)
    share_blocks(model, SharingConfig(every=3))
    weights = named_weights(model)
    assert ("lm_head.weight" in weights) is not tied
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(str(tmp_path))
    again, said = LlamaForCausalLM.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.equal(_logits(again), _logits(model))


def test_the_writer_of_transformers_takes_named_weights(tmp_path):
    model = _model(num_blocks=2)
    share_blocks(model, SharingConfig())
    model.save_pretrained(str(tmp_path), state_dict=named_weights(model))
    assert set(load_file(tmp_path / "model.safetensors")) == set(named_weights(model))
    assert torch.equal(_logits(LlamaForCausalLM.from_pretrained(str(tmp_path))), _logits(model))


def test_named_weights_of_a_model_that_shares_nothing_are_its_parameters():
    model = _model(num_blocks=2, tied=True)
    weights = named_weights(model)
    assert set(weights) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(weights[name], each) for name, each in model.named_parameters())


def test_biases_stay_each_blocks_own():
    model = _model(num_blocks=2, kind=(Qwen2Config, Qwen2ForCausalLM))
    before = copy.deepcopy(model)
    share_blocks(model, SharingConfig())
    for name, layer in linear_layers(model).items():
        old = linear_layers(before)[name]
        if layer.bias is not None:
            assert torch.equal(layer.bias, old.bias)
    names = [name for name, each in linear_layers(model).items() if each.bias is not None]
    assert len(names) == 6


def test_blocks_that_differ_are_refused_before_anything_changes():
    model = _model(num_blocks=4)
    model.model.layers[3].mlp.up_proj = nn.Linear(16, 20, bias=False)
    before = named_weights(copy.deepcopy(model))
    with pytest.raises(FormatError, match=r"model.layers.2 and model.layers.3 cannot share"):
        share_blocks(model, SharingConfig())
    after = named_weights(model)
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert len({id(layer.weight) for layer in linear_layers(model).values()}) == 7 * 4


def test_a_single_block_is_refused():
    model = _model(num_blocks=1)
    with pytest.raises(InputError, match="single block"):
        share_blocks(model, SharingConfig())
    assert len(decoder_blocks(model)) == 1
