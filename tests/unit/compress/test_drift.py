from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.learned_chain import learn, load, make_windows
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from mutirao.compress.blocks import linear_layers, walk_blocks
from mutirao.compress.config import SharingConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.rounding import drift as drift_module
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.drift import STREAM_SHARE, Drift, target_weight, walk_parts
from mutirao.compress.rounding.gptq import damped_factor, gptq_weight
from mutirao.compress.rounding.grid import best_grid
from mutirao.compress.shrinking.sharing import share_blocks
from mutirao.errors import DataError, FormatError, ShapeError
from mutirao.formats.huggingface import load_causal_lm

IDS = torch.arange(5, 5 + 6 * 12).reshape(6, 12) % 90
PARTS = [
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    {"self_attn.o_proj"},
    {"mlp.gate_proj", "mlp.up_proj"},
    {"mlp.down_proj"},
]


def _begin_nothing(prefix, block, observe):
    return {}


def _gemma():
    """Its layers' outputs pass a norm before they are added to the stream."""
    config = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_local_base_freq=100.0,
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def _seen_by(model, names):
    """Return what comes into modules when the whole model runs."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1).double()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("kind", "kept_bytes"), [("llama", 2**29), ("shared", 2**29), ("gemma3", 40_000), ("llama", 0)]
)
def test_drift_is_that_between_two_whole_models(
    kind, kept_bytes, tiny_model_directory, monkeypatch
):
    monkeypatch.setattr(drift_module, "KEPT_BYTES", kept_bytes)
    model = _gemma() if kind == "gemma3" else load_causal_lm(tiny_model_directory, "float32")[0]
    if kind == "shared":
        share_blocks(model, SharingConfig(every=2))
    original = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    changed, parts = set(), []

    def visit(prefix, block, drifts):
        parts.append(set(drifts))
        for name, drift in drifts.items():
            stream = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}.get(
                name.split(".")[-1]
            )
            names = [f"{prefix}.{name}", f"{prefix}.{stream}"][: 2 if stream else 1]
            was, now = _seen_by(original, names), _seen_by(model, names)
            x = now[names[0]]
            torch.testing.assert_close(drift.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            gap = (was[names[0]] - x).T @ x / len(x)
            torch.testing.assert_close(drift.inputs.double(), gap, rtol=1e-3, atol=1e-5)
            if kind == "gemma3" or not stream:
                assert drift.stream is None
            else:
                gap = (was[names[1]] - now[names[1]]).T @ x / len(x)
                torch.testing.assert_close(drift.stream.double(), gap, rtol=1e-3, atol=1e-5)
        for name in drifts:
            weight = block.get_submodule(name).weight
            if id(weight) not in changed:
                changed.add(id(weight))
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))

    walk_parts(model, IDS, _begin_nothing, visit, windows_per_pass=4)  # the last pass is short
    assert parts == PARTS * (len(linear_layers(model)) // 7)
    assert changed == {id(layer.weight) for layer in linear_layers(model).values()}


def test_what_inputs_were_divided_by_is_no_drift(tiny_model_directory):
    model = load_causal_lm(tiny_model_directory, "float32")[0]
    seen = []

    def begin(prefix, block, observe):
        assert set(observe()) == set().union(*PARTS)
        block.input_layernorm.weight.div_(4)
        for name in PARTS[0]:
            block.get_submodule(name).weight.mul_(4)
        return {name: torch.full((block.self_attn.q_proj.in_features,), 4.0) for name in PARTS[0]}

    def visit(prefix, block, drifts):
        seen.extend(float(drift.inputs.abs().max()) for drift in drifts.values())

    walk_parts(model, IDS, begin, visit)
    assert seen
    assert max(seen) < 1e-5


@pytest.mark.parametrize("has_stream", [False, True])
def test_the_target_is_that_of_least_squares_over_tokens(has_stream):
    generator = np.random.default_rng(0)
    num, inputs, outputs, damping = 200, 12, 5, 0.05
    x = generator.normal(size=(num, inputs)) @ generator.normal(size=(inputs, inputs))
    was = x + 0.3 * generator.normal(size=x.shape)
    gap = generator.normal(size=(num, outputs))
    weight = generator.normal(size=(outputs, inputs))
    asked = was @ weight.T + (STREAM_SHARE * gap if has_stream else 0)
    # The distance to the layer's own weight as rows of their own, one for each input.
    pull = np.sqrt(damping * num * np.diag(x.T @ x / num).mean()) * np.eye(inputs)
    want = np.linalg.lstsq(np.vstack([x, pull]), np.vstack([asked, pull @ weight.T]))[0].T
    gram = torch.tensor(x.T @ x / num).float()
    drift = Drift(
        gram,
        damped_factor(gram, damping),
        torch.tensor((was - x).T @ x / num).float(),
        torch.tensor(gap.T @ x / num).float() if has_stream else None,
    )
    got = target_weight(torch.tensor(weight).float(), drift)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", range(4))
def test_a_drift_that_is_not_finite_is_refused(part):
    drift = [torch.eye(3), torch.eye(3), torch.zeros(3, 3), torch.zeros(2, 3)]
    drift[part] = drift[part] + torch.inf
    with pytest.raises(DataError, match="not finite"):
        target_weight(torch.ones(2, 3), Drift(*drift))


def test_inputs_that_are_never_on_ask_for_nothing(tiny_model_directory):
    model = load_causal_lm(tiny_model_directory, "float32")[0]
    first = model.model.layers[0].mlp
    first.up_proj.weight.data.zero_()
    before = first.down_proj.weight.detach().clone()
    round_by_blocks(model, "gptq", 8, 16, IDS)
    after = first.down_proj.weight.detach().float()
    assert float((after - before).abs().max()) < 0.02


def test_groups_that_do_not_divide_some_inputs_are_refused_before_anything_changes(
    tiny_model_directory,
):
    model = load_causal_lm(tiny_model_directory, "float32")[0]
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(40, 64)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ShapeError, match="40 inputs"):
        round_by_blocks(model, "gptq", 4, 16, IDS)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_model_keeps_more_than_if_each_layer_kept_its_outputs():
    weights, ids, heldout = learn(), make_windows(64), make_windows(64, seed=1)
    original = load(weights)

    def divergence(rounded):
        return measure_loss(original, rounded.float(), heldout).divergence

    def visit(prefix, block, grams):
        for name, gram in grams.items():
            layer = block.get_submodule(name)
            grid = best_grid(layer.weight, 2, 16, gram.diagonal())
            layer.weight.copy_(gptq_weight(layer.weight, gram, grid, 2).expand())

    plain, mended = load(weights), load(weights)
    walk_blocks(plain, ids, visit)
    round_by_blocks(mended, "gptq", 2, 16, ids)
    assert divergence(mended) < 0.8 * divergence(plain)


def test_layers_that_were_changed_run_once_more_only_if_there_is_room(
    tiny_model_directory, monkeypatch
):
    times = {}
    for kept_bytes in (0, 2**29):
        monkeypatch.setattr(drift_module, "KEPT_BYTES", kept_bytes)
        model = load_causal_lm(tiny_model_directory, "float32")[0]
        layer = model.model.layers[0].self_attn.q_proj
        weight, calls = layer.weight, []
        layer.register_forward_hook(
            lambda module, *_, weight=weight, calls=calls: calls.append(
                module.weight is weight and "forward" not in vars(module)
            )
        )
        walk_parts(model, IDS, _begin_nothing, lambda *_: None, windows_per_pass=4)
        assert "forward" not in vars(layer)
        times[kept_bytes] = sum(calls)
    # Two passes: once to enter, then up to each of four parts and to the end, or once for all.
    assert times == {0: 2 * (1 + 4), 2**29: 2 * (1 + 1)}


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_does_not_run_once_is_refused(times, tiny_model_directory):
    model = load_causal_lm(tiny_model_directory, "float32")[0]
    model.model.layers[1].mlp = _Repeated(model.model.layers[1].mlp, times)
    with pytest.raises(FormatError, match=rf"layers.1.mlp.inner.\w+ runs {times} times"):
        walk_parts(model, IDS, _begin_nothing, lambda *_: None)


class _Repeated(torch.nn.Module):
    def __init__(self, inner, times):
        super().__init__()
        self.inner = inner
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x
