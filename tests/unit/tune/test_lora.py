"""Adapters: the start changes nothing, states travel unchanged, merging is W + (α/r) B A."""

import numpy as np
import pytest
import torch

from mutirao.artifact import read_manifest, write_artifact
from mutirao.errors import FormatError, ShapeError
from mutirao.formats.huggingface import load_causal_lm, save_causal_lm
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import (
    adapter_state,
    attach_lora,
    frozen_sha256,
    load_adapter_state,
    merge_adapter,
    save_adapter,
    state_to_vector,
    vector_to_state,
)

CONFIG = LoRAConfig(rank=2, alpha=4, target_modules=("q_proj", "down_proj"), num_layers=1)


@pytest.fixture
def adapted(tiny_model_directory):
    model, tokenizer = load_causal_lm(tiny_model_directory, dtype="float32")
    return attach_lora(model, CONFIG, seed=3), tokenizer


def _fill(peft_model, value=0.05):
    state = {name: torch.full_like(t, value) for name, t in adapter_state(peft_model).items()}
    load_adapter_state(peft_model, state)
    return state


def test_only_the_last_layer_and_only_b_is_trained(adapted):
    names = list(adapter_state(adapted[0]))
    assert names
    assert all("lora_B" in name for name in names)
    last = adapted[0].config.num_hidden_layers - 1
    assert all(f"layers.{last}." in name for name in names)


def test_both_factors_are_trained_when_a_is_not_frozen(tiny_model_directory):
    model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
    names = adapter_state(attach_lora(model, CONFIG.model_copy(update={"freeze_a": False}), seed=0))
    assert sum("lora_A" in name for name in names) == sum("lora_B" in name for name in names) > 0


def test_frozen_part_follows_the_seed(tiny_model_directory):
    def hashed(seed):
        model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
        return frozen_sha256(attach_lora(model, CONFIG, seed=seed))

    assert hashed(1) == hashed(1) != hashed(2)


def test_state_survives_the_way_through_a_vector(adapted):
    state = {name: torch.randn_like(t) for name, t in adapter_state(adapted[0]).items()}
    back = vector_to_state(state_to_vector(state), state)
    assert all(torch.equal(state[name], back[name]) for name in state)
    with pytest.raises(ShapeError):
        vector_to_state(np.zeros(3, np.float32), state)


def test_foreign_state_is_refused_and_changes_nothing(adapted):
    before = adapter_state(adapted[0])
    bad = {name: torch.zeros(1) for name in before}
    with pytest.raises(ShapeError, match="shape"):
        load_adapter_state(adapted[0], bad)
    with pytest.raises(ShapeError, match="other tensors"):
        load_adapter_state(adapted[0], {"x": torch.zeros(1)})
    after = adapter_state(adapted[0])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_layers_are_refused(tiny_model_directory):
    model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
    with pytest.raises(FormatError, match="nonsense"):
        attach_lora(model, LoRAConfig(target_modules=("nonsense",)), seed=0)


def test_merge_is_the_weight_plus_scaled_product(tmp_path, tiny_model_directory, adapted):
    peft_model, tokenizer = adapted
    _fill(peft_model)
    base = tmp_path / "base"
    with write_artifact(base, "model") as writer:
        model, _ = load_causal_lm(tiny_model_directory)
        save_causal_lm(model, tokenizer, writer.path)
    adapter = tmp_path / "adapter"
    with write_artifact(adapter, "adapter") as writer:
        save_adapter(peft_model, writer.path, base_model="base")
    merge_adapter(base, adapter, tmp_path / "merged")

    merged, _ = load_causal_lm(tmp_path / "merged", dtype="float32")
    layer = merged.model.layers[-1].self_attn.q_proj.weight
    before, _ = load_causal_lm(base, dtype="float32")
    weight = before.model.layers[-1].self_attn.q_proj.weight
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.default.weight"
    parameters = dict(peft_model.named_parameters())
    index = merged.config.num_hidden_layers - 1
    product = parameters[name.format(index, "B")] @ parameters[name.format(index, "A")]
    expected = (weight + CONFIG.alpha / CONFIG.rank * product).to(torch.bfloat16).float()
    assert torch.equal(layer, expected)
    assert set(read_manifest(tmp_path / "merged").parents) == {"base", "adapter"}
