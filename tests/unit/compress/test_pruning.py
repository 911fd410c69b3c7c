from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mutirao.compress.blocks import linear_layers, walk_blocks
from mutirao.compress.config import CompressConfig, PruneConfig
from mutirao.compress.shrinking.pruning import kept_mask, prune
from mutirao.errors import DataError, RecipeError, ShapeError
from mutirao.formats.huggingface import load_causal_lm

IDS = torch.arange(5, 5 + 6 * 12).reshape(6, 12) % 200


@pytest.fixture
def model(tiny_model_directory):
    """With inputs of very different loudness."""
    model = load_causal_lm(tiny_model_directory, dtype="float32")[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                order = torch.randperm(len(parameter), generator=torch.Generator().manual_seed(0))
                parameter.copy_(torch.logspace(-1, 1, len(parameter))[order])
    return model


def _weights(model):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}


def _naive_mask(weight, loudness, num_dropped, size):
    """One weight at a time, in float64: drop the least of what is left."""
    kept = np.ones(weight.shape, bool)
    for o in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], size):
            for _ in range(num_dropped):
                left = [i for i in range(begin, begin + size) if kept[o, i]]
                kept[o, min(left, key=lambda i: abs(weight[o, i]) * loudness[i])] = False
    return kept


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(("sparsity", "zeros"), [(0.5, {64: 32, 96: 48}), (0.3, {64: 19, 96: 29})])
def test_every_row_has_as_many_zeros_as_were_asked_for(model, method, sparsity, zeros):
    before = _weights(model)
    prune(model, IDS, PruneConfig(method=method, sparsity=sparsity))
    for name, layer in linear_layers(model).items():
        counts = (layer.weight == 0).sum(dim=1)
        assert set(counts.tolist()) == {zeros[layer.in_features]}
        stays = layer.weight != 0
        assert torch.equal(layer.weight[stays], before[name][stays])


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_two_of_every_four_neighbours_stay(model, method):
    prune(model, IDS, PruneConfig(method=method, pattern="2:4"))
    for layer in linear_layers(model).values():
        assert set((layer.weight.reshape(-1, 4) != 0).sum(dim=1).tolist()) == {2}


@pytest.mark.parametrize(("pattern", "size"), [("free", 64), ("2:4", 4)])
def test_wanda_agrees_with_a_naive_loop_over_the_first_block(model, pattern, size):
    before = _weights(model)
    name = "model.layers.0.self_attn.q_proj"
    inputs = []
    handle = linear_layers(model)[name].register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())
    )
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    loudness = np.linalg.norm(inputs[0].reshape(-1, 64).double().numpy(), axis=0)
    prune(model, IDS, PruneConfig(pattern=pattern))
    weight = before[name].double().numpy()
    want = _naive_mask(weight, loudness, size // 2, size)
    assert np.array_equal(linear_layers(model)[name].weight.detach().numpy() != 0, want)
    assert not np.array_equal(want, _naive_mask(weight, np.ones(64), size // 2, size))


def test_magnitude_agrees_with_a_naive_loop_in_all_blocks_and_needs_no_text(model):
    before = _weights(model)
    prune(model, None, PruneConfig(method="magnitude", sparsity=0.25))
    for name, layer in linear_layers(model).items():
        size = layer.in_features
        want = _naive_mask(before[name].double().numpy(), np.ones(size), size // 4, size)
        assert np.array_equal(layer.weight.detach().numpy() != 0, want)


def test_later_blocks_are_pruned_by_what_pruned_ones_make(model):
    before = _weights(model)
    prune(model, IDS, PruneConfig())
    seen = {}
    walk_blocks(
        model,
        IDS,
        lambda prefix, _, grams: seen.update({f"{prefix}.{k}": v for k, v in grams.items()}),
    )
    name = "model.layers.1.self_attn.q_proj"  # its input is not changed by its own block
    score = before[name].abs() * seen[name].diagonal().sqrt()
    assert torch.equal(linear_layers(model)[name].weight != 0, kept_mask(score, 64, 32))


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_wanda_changes_outputs_less_than_magnitude_where_inputs_differ(model, pattern):
    grams, errors = {}, {}
    before = _weights(model)
    walk_blocks(
        model,
        IDS,
        lambda prefix, _, found: grams.update({f"{prefix}.{k}": v for k, v in found.items()}),
    )
    for method in ("wanda", "magnitude"):
        for name, layer in linear_layers(model).items():
            layer.weight.data.copy_(before[name])
        prune(model, IDS, PruneConfig(method=method, pattern=pattern))
        names = [name for name in before if name.endswith(("0.self_attn.q_proj", "0.mlp.up_proj"))]
        gaps = {name: linear_layers(model)[name].weight.detach() - before[name] for name in names}
        errors[method] = {n: float(torch.trace(e @ grams[n] @ e.T)) for n, e in gaps.items()}
    for name, error in errors["wanda"].items():
        assert error < 0.7 * errors["magnitude"][name]


def test_pruning_again_changes_nothing(model):
    prune(model, IDS, PruneConfig())
    once = _weights(model)
    prune(model, IDS, PruneConfig())
    assert all(torch.equal(each, once[name]) for name, each in _weights(model).items())


def test_ties_leave_the_counts_exact():
    assert kept_mask(torch.zeros(3, 8), 8, 3).sum(dim=1).tolist() == [5, 5, 5]
    assert kept_mask(torch.zeros(1, 8), 4, 2).tolist() == [[False, False, True, True] * 2]


def test_inputs_that_four_does_not_divide_are_refused_before_anything_changes(model):
    model.model.layers[1].mlp.down_proj = nn.Linear(90, 64)
    before = _weights(model)
    with pytest.raises(ShapeError, match=r"layers.1.mlp.down_proj has 90 inputs"):
        prune(model, IDS, PruneConfig(method="magnitude", pattern="2:4"))
    assert all(torch.equal(each, before[name]) for name, each in _weights(model).items())


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_weights_that_are_not_finite_are_refused(model, method):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(DataError, match=r"layers.1.mlp.up_proj are not finite"):
        prune(model, IDS, PruneConfig(method=method))


def test_inputs_that_are_not_finite_are_refused(model):
    model.model.embed_tokens.weight.data[IDS[0, 0]] = torch.inf
    with pytest.raises(DataError, match=r"inputs of model.layers.0.self_attn"):
        prune(model, IDS, PruneConfig())


@pytest.mark.parametrize("method", ["wanda", "magnitude,rtn"])
def test_a_method_that_contradicts_the_steps_is_refused(method):
    step = method.partition(",")[0]
    other = {"wanda": "magnitude", "magnitude": "wanda"}[step]
    sentence = rf"compress.prune.method={other} contradicts .*={method} \(expected {step}\); leave"
    for prune_config in ({"method": other}, PruneConfig(method=other)):
        with pytest.raises(RecipeError, match=sentence):
            CompressConfig(method=method, prune=prune_config)


def test_a_method_that_agrees_or_is_left_out_is_accepted():
    for given in (None, {"sparsity": 0.3}, {"method": "magnitude"}, PruneConfig(sparsity=0.3)):
        assert CompressConfig(method="magnitude", prune=given).prune.method == "magnitude"
    both = CompressConfig(method="wanda,magnitude", prune={"method": "magnitude"})
    assert CompressConfig(**both.model_dump()) == both
