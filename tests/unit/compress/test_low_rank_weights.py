from __future__ import annotations

import numpy as np
import pytest
import torch

from mutirao.compress.blocks import linear_layers, walk_blocks
from mutirao.compress.config import LowRankConfig
from mutirao.compress.shrinking.low_rank import lower_rank, rank_for, truncate_weight
from mutirao.errors import DataError, InputError
from mutirao.formats.huggingface import load_causal_lm

IDS = (torch.arange(40 * 12).reshape(40, 12) * 7) % 200


@pytest.fixture
def model(tiny_model_directory):
    return load_causal_lm(tiny_model_directory, dtype="float32")[0]


def _case(num_outputs, num_inputs, seed=0):
    """A weight, and the Gram matrix of inputs that are correlated, with energies apart."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(600, num_inputs)) @ draw.normal(size=(num_inputs, num_inputs))
    x *= draw.uniform(0.05, 3, num_inputs)
    weight = draw.normal(size=(num_outputs, num_inputs))
    return weight, x.T @ x / len(x)


def _error(got, weight, gram):
    gap = got - weight
    return np.trace(gap @ gram @ gap.T)


@pytest.mark.parametrize(("num_outputs", "num_inputs", "rank"), [(20, 32, 7), (48, 24, 11)])
def test_the_error_is_the_sum_of_the_squares_that_were_cut(num_outputs, num_inputs, rank):
    weight, gram = _case(num_outputs, num_inputs)
    got = truncate_weight(torch.tensor(weight), torch.tensor(gram), rank).numpy()
    values = np.linalg.svd(weight @ np.linalg.cholesky(gram), compute_uv=False)
    assert np.linalg.matrix_rank(got) == rank
    assert _error(got, weight, gram) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4)
    left, sigma, right = np.linalg.svd(weight)
    plain = left[:, :rank] * sigma[:rank] @ right[:rank]
    assert _error(got, weight, gram) < 0.8 * _error(plain, weight, gram)


@pytest.mark.parametrize(("num_outputs", "num_inputs", "rank"), [(20, 32, 7), (48, 24, 11)])
def test_agrees_with_the_product_of_the_paper_in_numpy(num_outputs, num_inputs, rank):
    weight, gram = _case(num_outputs, num_inputs, seed=1)
    damped = gram + 1e-6 * np.diag(gram).mean() * np.eye(num_inputs)
    factor = np.linalg.cholesky(damped)
    left, sigma, right = np.linalg.svd(weight @ factor)
    want = (left[:, :rank] * sigma[:rank] @ right[:rank]) @ np.linalg.inv(factor)
    got = truncate_weight(torch.tensor(weight), torch.tensor(gram), rank).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


def test_with_inputs_all_alike_it_is_plain_svd():
    weight, _ = _case(20, 32)
    left, sigma, right = np.linalg.svd(weight)
    got = truncate_weight(torch.tensor(weight), torch.eye(32), 9).numpy()
    np.testing.assert_allclose(got, left[:, :9] * sigma[:9] @ right[:9], atol=1e-6)


@pytest.mark.parametrize("num_on", [0, 5])
def test_inputs_that_are_never_on_or_always_alike_do_no_harm(num_on):
    draw = np.random.default_rng(2)
    x = np.zeros((100, 32))
    x[:, :num_on] = draw.normal(size=(100, 1))
    weight = draw.normal(size=(20, 32))
    gram = torch.tensor(x.T @ x / 100, dtype=torch.float32)
    got = truncate_weight(torch.tensor(weight), gram, 4).numpy()
    assert np.isfinite(got).all()
    scale = max(np.trace(weight @ gram.numpy() @ weight.T), 1e-12)
    assert _error(got, weight, gram.numpy()) < 1e-4 * scale  # one direction is on, and is kept


@pytest.mark.parametrize("kept", [0.3, 0.8])
def test_layers_get_the_largest_rank_whose_factors_fit(model, kept):
    lower_rank(model, IDS, LowRankConfig(kept=kept))
    for layer in linear_layers(model).values():
        num_outputs, num_inputs = layer.weight.shape
        rank = int(np.linalg.matrix_rank(layer.weight.detach().double().numpy(), rtol=1e-5))
        assert rank * (num_outputs + num_inputs) <= kept * num_outputs * num_inputs
        assert (rank + 1) * (num_outputs + num_inputs) > kept * num_outputs * num_inputs
        assert rank == rank_for(num_outputs, num_inputs, kept)


def test_later_blocks_are_cut_by_what_earlier_ones_make(model):
    name = "model.layers.1.self_attn.q_proj"
    before = linear_layers(model)[name].weight.detach().clone()
    lower_rank(model, IDS, LowRankConfig(kept=0.5))
    seen = {}
    walk_blocks(
        model,
        IDS,
        lambda prefix, _, grams: seen.update({f"{prefix}.{k}": v for k, v in grams.items()}),
    )
    want = truncate_weight(before, seen[name], rank_for(64, 64, 0.5))
    torch.testing.assert_close(linear_layers(model)[name].weight.double(), want, atol=1e-5, rtol=0)


def test_what_is_changed_is_in_place_and_only_the_blocks_matrices(model):
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "proj" not in n}
    parameters = dict(model.bfloat16().named_parameters())
    lower_rank(model, IDS, LowRankConfig(kept=0.5))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p is parameters[n] for n, p in model.named_parameters())
    for name, old in kept.items():
        assert torch.equal(parameters[name], old.bfloat16())


def test_a_share_that_leaves_no_rank_is_refused_before_anything_changes(model):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"low_rank.kept=0\.03 leaves model.layers.0.self_attn"):
        lower_rank(model, IDS, LowRankConfig(kept=0.03))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_weights_that_are_not_finite_are_refused(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        lower_rank(model, IDS, LowRankConfig())
