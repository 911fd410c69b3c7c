"""The sum of products in a PEFT adapter's files."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mutirao.errors import ShapeError
from mutirao.federated.coordinator.low_rank_result import CONFIG_NAME, replace_by_sum
from mutirao.federated.coordinator.state_files import StateFile, writing
from mutirao.tune.config import LoRAConfig

LORA = LoRAConfig(rank=2, alpha=6, freeze_a=False)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"base.{module}.lora_{letter}.weight": rng.normal(size=shape).astype("f4")
        for module in ("q", "v")
        for letter, shape in (("A", (2, 5)), ("B", (4, 2)))
    }
    save_file({**tensors, "base.norm.weight": np.ones(3, "f4")}, str(tmp_path / WEIGHTS))
    config = {"r": 2, "lora_alpha": 6, "rank_pattern": {"q": 3}, "task_type": "CAUSAL_LM"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    return tmp_path


def _state(path, modules):
    rng = np.random.default_rng(1)
    tensors = {}
    for module in modules:
        tensors[f"base.{module}.history_A"] = rng.normal(size=(3, 5)).astype("f4")
        tensors[f"base.{module}.history_B"] = rng.normal(size=(4, 3)).astype("f4")
    with writing(path, {n: v.shape for n, v in tensors.items()}, "F32") as file:
        for name, values in tensors.items():
            file.write(name, values)
    return StateFile(path), tensors


def test_layers_that_learned_nothing_are_zero_at_the_new_rank(folder, tmp_path):
    state, tensors = _state(tmp_path / "state.safetensors", ["q"])
    assert replace_by_sum(folder, WEIGHTS, state, LORA) == 3
    weights = load_file(str(folder / WEIGHTS))
    product = weights["base.q.lora_B.weight"] @ weights["base.q.lora_A.weight"]
    expected = tensors["base.q.history_B"] @ tensors["base.q.history_A"]
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)
    assert weights["base.v.lora_A.weight"].shape == (3, 5)
    assert weights["base.v.lora_B.weight"].shape == (4, 3)
    assert not weights["base.v.lora_B.weight"].any()
    assert (weights["base.norm.weight"] == 1).all()
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config == {
        "r": 3,
        "lora_alpha": 3,
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": "CAUSAL_LM",
    }


def test_a_history_of_no_layer_is_refused(folder, tmp_path):
    state, _ = _state(tmp_path / "state.safetensors", ["q", "elsewhere"])
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(ShapeError, match="elsewhere"):
        replace_by_sum(folder, WEIGHTS, state, LORA)
    assert (folder / WEIGHTS).read_bytes() == before
