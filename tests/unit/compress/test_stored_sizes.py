from __future__ import annotations

import copy

import pytest
import torch

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import LowRankConfig, PruneConfig, SharingConfig
from mutirao.compress.shrinking.low_rank import lower_rank
from mutirao.compress.shrinking.pruning import prune
from mutirao.compress.shrinking.sharing import share_blocks
from mutirao.compress.shrinking.sizes import stored_parameters
from mutirao.formats.huggingface import load_causal_lm

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
