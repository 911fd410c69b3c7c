from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import LowRankConfig, PruneConfig, SharingConfig
from mutirao.compress.shrinking.low_rank import lower_rank
from mutirao.compress.shrinking.pruning import prune
from mutirao.compress.shrinking.sharing import share_blocks
from mutirao.compress.shrinking.sizes import stored_parameters
from mutirao.formats.huggingface import load_causal_lm

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import bench_shrinking

IDS = (torch.arange(40 * 12).reshape(40, 12) * 7) % 200
BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
"""Parameters of the linear layers of a block."""


@pytest.fixture(params=["float32", "bfloat16"])
def model(tiny_model_directory, request):
    return load_causal_lm(tiny_model_directory, dtype=request.param)[0]


@pytest.fixture
def others(model):
    """Parameters outside of the blocks' matrices: embeddings, tied to the head, and five norms."""
    return model.config.vocab_size * 64 + 5 * 64


def test_a_model_as_it_is_counts_each_parameter_once(model, others):
    assert stored_parameters(model) == others + 2 * BLOCK


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"sparsity": 0.75}, 1 / 4 + 1 / 16),
        ({"sparsity": 0.25}, 3 / 4 + 1 / 16),
        ({"pattern": "2:4"}, 1 / 2 + 1 / 2 * 2 / 16),  # half, and 2 bits for each of them
        ({"sparsity": 0.125}, 1),  # too few zeros for a mask
    ],
)
def test_zeros_are_stored_as_a_mask(model, others, settings, share):
    prune(model, None, PruneConfig(method="magnitude", **settings))
    assert stored_parameters(model) == others + 2 * BLOCK * share


def test_low_rank_is_stored_as_factors(model, others):
    lower_rank(model, IDS, LowRankConfig(kept=0.5))
    # Ranks by hand: 64 x 64 / 256 = 16, 64 x 32 / 192 = 10.7, 64 x 96 / 320 = 19.2.
    factors = 2 * 16 * 128 + 2 * 10 * 96 + 3 * 19 * 160
    assert stored_parameters(model) == others + 2 * factors
    assert stored_parameters(copy.deepcopy(model)) == others + 2 * factors
    assert stored_parameters(model.bfloat16()) == others + 2 * factors


@torch.no_grad()
def test_a_weight_that_was_changed_since_is_dense_again(model, others):
    lower_rank(model, IDS, LowRankConfig(kept=0.5))
    before = stored_parameters(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight += 0.02 * layer.weight.std() * torch.randn(96, 64)
    assert stored_parameters(model) == before - 19 * 160 + 96 * 64
    share_blocks(model, SharingConfig())  # the mean of two of rank R is none of rank R
    assert stored_parameters(model) == others + BLOCK


def test_shared_matrices_count_once(model, others):
    share_blocks(model, SharingConfig())
    assert stored_parameters(model) == others + BLOCK
    prune(model, IDS, PruneConfig())  # twice, once by what comes into each block
    assert stored_parameters(model) == others + BLOCK * (1 / 2 + 1 / 16)
    assert len({id(layer.weight) for layer in linear_layers(model).values()}) == 7


def test_the_benchmark_prints_all_methods(tiny_model_directory, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The patient has a fever and a cough. " * 400)
    options = "--window-tokens 16 --calibration-windows 12 --heldout-windows 4 --threads 1"
    arguments = [str(tiny_model_directory), str(tmp_path / "text.txt"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["bench_shrinking.py", *arguments])
    assert bench_shrinking.main() == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == list(bench_shrinking.METHODS)
    assert len({row["original"] for row in rows.values()}) == 1  # the original is not changed
    assert len({row["compressed"] for row in rows.values()}) == len(rows)
    others = found["num_weights"] - 2 * BLOCK
    assert found["original_bytes"] == 2 * (others + 2 * BLOCK)
    assert rows["wanda, 2:4"]["ideal_bytes"] == 2 * others + 2 * BLOCK * 9 // 8
    # Of each 32 codes, one scale of 16 bits and one zero point.
    assert rows["gptq, 4 bits"]["ideal_bytes"] == 2 * others + 2 * BLOCK * (4 + 20 / 32) / 8
    assert rows["gptq, 8 bits"]["rise"] < rows["gptq, 3 bits"]["rise"]


def test_the_benchmark_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_shrinking.py", str(tmp_path), str(tmp_path)])
    assert bench_shrinking.main() == 2
    assert str(tmp_path) in capsys.readouterr().err
