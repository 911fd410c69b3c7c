from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mutirao.compress.blocks import walk_blocks
from mutirao.compress.rounding.awq import (
    PAIRS,
    best_scale,
    foldable_pairs,
    scale_block,
)
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.grid import full_grid, output_error, quantize_weight, round_to_grid

IDS = torch.randint(0, 90, (6, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def _llama(num_key_value_heads=4, **others):
    """With loud channels in what the norms and the MLP give, as trained models have them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(**SIZES, num_key_value_heads=num_key_value_heads, **others)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for block in model.model.layers:
                for parameter in block.parameters():
                    parameter.mul_(8) if parameter.dim() > 1 else None
                for norm in (block.input_layernorm, block.post_attention_layernorm):
                    norm.weight.copy_((torch.rand(64) * 4 - 2).exp())
                block.mlp.up_proj.weight.mul_((torch.rand(96, 1) * 4 - 2).exp())
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
                parameter.copy_(parameter.bfloat16())  # as they are stored
    model.requires_grad_(False)
    return model


def _fold(model, bits=3, group_size=32):
    """Scale every block of a float32 model, with the scaled weights put in place."""
    folded = []

    def visit(prefix, block, grams):
        # The block's own outputs for random states do not matter here: all pairs are tried below.
        pairs = PAIRS if grams["self_attn.o_proj"].shape == grams["self_attn.v_proj"].shape else ()
        scaled = scale_block(block, grams, bits, group_size, pairs)
        folded.append((grams, scaled))
        with torch.no_grad():
            for name, weight in scaled.weights.items():
                block.get_submodule(name).weight.copy_(weight)

    walk_blocks(model, IDS, visit)
    return folded


@pytest.mark.parametrize("has_biases", [False, True])
def test_folding_leaves_the_models_function_as_it_was(has_biases):
    model = _llama(attention_bias=has_biases, mlp_bias=has_biases)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(input_ids=IDS).logits
    _fold(model)
    after = model.state_dict()
    for part in ("input_layernorm.weight", "mlp.down_proj.weight", "self_attn.o_proj.weight"):
        name = f"model.layers.1.{part}"
        assert float((after[name] / before[name]).std()) > 0.01  # something was folded
    # Norms come out in bfloat16 and the scales follow them, so that nothing is lost.
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-3)


def test_scaled_grams_are_those_of_the_scaled_models_inputs():
    model = _llama()
    grams, scaled = _fold(model)[0]
    seen = {}
    walk_blocks(model, IDS, lambda prefix, block, found: seen.setdefault(prefix, found))
    for name, gram in seen["model.layers.0"].items():
        largest = float(gram.abs().max())
        torch.testing.assert_close(scaled.grams[name], gram, rtol=1e-3, atol=1e-4 * largest)
    assert not torch.allclose(grams["self_attn.q_proj"], scaled.grams["self_attn.q_proj"])


def test_the_search_agrees_with_one_that_runs_the_inputs_through():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 32, generator=generator) * torch.randn(32, generator=generator).exp()
    weights = [torch.randn(rows, 32, generator=generator) for rows in (8, 12)]
    got = best_scale(weights, x.T @ x / len(x), 3, 16)
    loudness = x.double().square().mean(0).sqrt()
    errors, scales = [], []
    for step in range(20):
        scale = (loudness / loudness.max()) ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scales.append(scale)
        change = 0.0
        for weight in weights:
            rounded = quantize_weight((weight * scale).float(), 3, 16).expand().double() / scale
            change += float(((rounded - weight) @ x.double().T).square().sum(0).mean())
        errors.append(change)
    best = int(np.argmin(errors))
    assert 0 < best < 19
    torch.testing.assert_close(got.double(), scales[best], rtol=1e-4, atol=1e-6)


def test_scales_that_do_no_good_are_left_out():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(best_scale([weight], torch.eye(32), 4, 16), torch.ones(32))


def test_an_input_that_is_never_on_does_no_harm():
    gram = torch.diag(torch.arange(32.0))
    scale = best_scale([torch.randn(4, 32)], gram, 3, 16)
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_change_less_than_without_scales(bits):
    model = _llama()
    plain = {
        name: layer.weight.clone()
        for name, layer in model.model.layers[0].named_modules()
        if hasattr(layer, "weight")
    }
    grams, scaled = _fold(model, bits)[0]
    name = "mlp.down_proj"
    errors = []
    for weight, gram in ((plain[name], grams[name]), (scaled.weights[name], scaled.grams[name])):
        rounded = round_to_grid(weight, full_grid(weight, bits, 32), bits).expand()
        errors.append(output_error(rounded - weight, gram))
    assert errors[1] < 0.9 * errors[0]


def test_grouped_query_attention_folds_all_but_values(caplog):
    model = _llama(num_key_value_heads=2)
    quantized = round_by_blocks(model, "awq", 4, 32, IDS)
    assert len(quantized) == 14
    assert not caplog.records  # nothing to point out
    own = _llama(num_key_value_heads=2).model.layers[0]
    states = torch.randn(2, 5, 64)
    rotary = model.model.rotary_emb(states, torch.arange(5)[None])
    found = foldable_pairs(
        own, lambda: own(states, position_embeddings=rotary, attention_mask=None), set()
    )
    assert [pair.source for pair in found] == [
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.up_proj",
    ]


def test_trying_leaves_the_block_as_it_was():
    block = _llama().model.layers[0]
    before = copy.deepcopy(block.state_dict())
    states = torch.randn(2, 5, 64)
    rotary = _llama().model.rotary_emb(states, torch.arange(5)[None])
    found = foldable_pairs(
        block, lambda: block(states, position_embeddings=rotary, attention_mask=None), set()
    )
    assert found == PAIRS
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_blocks_that_use_their_norms_otherwise_are_not_scaled(caplog):
    """Gemma's norms multiply by one plus their weight, and one stands after the attention."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16)
        model = Gemma3ForCausalLM(config).eval()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        round_by_blocks(model, "awq", 8, 32, IDS)
    told = [record.message for record in caplog.records]
    assert len(told) == 2  # once, not for every block
    assert all("used in another way than in Llama" in message for message in told)
    name = "model.layers.0.input_layernorm.weight"
    assert torch.equal(model.state_dict()[name], before[name])
    logits = model(input_ids=IDS).logits
    model.load_state_dict(before)
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", ["awq", "awq,gptq"])
def test_the_rounded_model_is_close_to_the_original(method):
    """Norms that were divided and codes that were multiplied belong together."""
    logits = _llama()(input_ids=IDS).logits
    spread = float(logits.std())
    model = _llama()
    quantized = round_by_blocks(model, method, 8, 32, IDS)
    got = model.float()(input_ids=IDS).logits
    assert float((got - logits).std()) < 0.05 * spread
    layer = model.model.layers[1].mlp.down_proj
    expected = quantized["model.layers.1.mlp.down_proj"].expand()
    torch.testing.assert_close(layer.weight.data, expected, rtol=2**-8, atol=1e-6)


def test_weights_that_blocks_share_stay_shared(caplog):
    model = _llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    quantized = round_by_blocks(model, "awq", 3, 32, IDS)
    assert "share weights" in caplog.text
    first, second = (quantized[f"model.layers.{index}.mlp.up_proj"] for index in (0, 1))
    assert torch.equal(first.codes, second.codes)
    assert model.model.layers[1].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize("method", ["gptq", "awq", "awq,gptq"])
def test_what_was_pruned_stays_pruned(method):
    model = _llama()
    pruned = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                pruned[name] = torch.rand_like(layer.weight) < 0.5
                layer.weight[pruned[name]] = 0
    for name, codes in round_by_blocks(model, method, 4, 32, IDS).items():
        assert bool((codes.expand()[pruned[name]] == 0).all())
