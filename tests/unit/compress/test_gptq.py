from __future__ import annotations

import numpy as np
import pytest
import torch

from mutirao.compress.rounding.gptq import SHORTEST, fit_scales, fitted_gptq, gptq_weight
from mutirao.compress.rounding.grid import (
    best_grid,
    full_grid,
    output_error,
    quantize_weight,
    round_to_grid,
)
from mutirao.errors import DataError


def _inputs(num_tokens, num_inputs, seed=0):
    """Correlated, with energies apart."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_inputs, num_inputs, generator=generator)
    scales = torch.rand(num_inputs, generator=generator) * 3
    return torch.randn(num_tokens, num_inputs, generator=generator) @ mix * scales


def _naive(weight, gram, grid, bits, damping=0.01, pruned=None):
    """Optimal brain compression, one input at a time: the remaining inverse is downdated."""
    weight, gram = weight.double().numpy().copy(), gram.double().numpy().copy()
    scale, zero = (each.double().numpy() for each in grid)
    size = weight.shape[1] // scale.shape[1]
    order = list(np.argsort(-np.diag(gram), kind="stable"))
    inverse = np.linalg.inv(gram + damping * np.diag(gram).mean() * np.eye(len(gram)))
    rounded = np.empty_like(weight)
    for index, i in enumerate(order):
        step, centre = scale[:, i // size], zero[:, i // size]
        code = np.clip(np.rint(weight[:, i] / step) + centre, 0, 2**bits - 1)
        rounded[:, i] = (code - centre) * step
        if pruned is not None:
            rounded[pruned[:, i].numpy(), i] = 0
        error = (weight[:, i] - rounded[:, i]) / inverse[i, i]
        for j in order[index + 1 :]:
            weight[:, j] -= error * inverse[i, j]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, None), (4, 32)])
def test_agrees_with_one_input_at_a_time_in_float64(bits, group_size):
    x = _inputs(400, 160)  # more inputs than a block holds
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    gram = x.T @ x / len(x)
    grid = full_grid(weight, bits, group_size)
    got = gptq_weight(weight, gram, grid, bits).expand().numpy()
    want = _naive(weight, gram, grid, bits)
    # A tie of float32 may fall on the other side, and moves what comes after it.
    assert np.mean(np.isclose(got, want, rtol=1e-5, atol=1e-5)) > 0.99


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    x = _inputs(400, 160)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(6, 160, generator=generator)
    pruned = torch.rand(6, 160, generator=generator) < 0.5
    weight[pruned] = 0
    gram = x.T @ x / len(x)
    grid = full_grid(weight, 4, 32)
    got = gptq_weight(weight, gram, grid, 4, pruned_OI=pruned).expand()
    assert bool((got[pruned] == 0).all())
    assert not bool((gptq_weight(weight, gram, grid, 4).expand()[pruned] == 0).all())
    want = _naive(weight, gram, grid, 4, pruned=pruned)
    assert np.mean(np.isclose(got.numpy(), want, rtol=1e-5, atol=1e-5)) > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_changes_the_output_less_than_rounding_to_nearest(bits):
    x = _inputs(500, 96)
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    gram = x.T @ x / len(x)
    grid = best_grid(weight, bits, 32, gram.diagonal())

    def output_error(rounded):
        return float(((rounded - weight) @ x.T).square().mean())

    nearest = output_error(round_to_grid(weight, grid, bits).expand())
    assert output_error(gptq_weight(weight, gram, grid, bits).expand()) < 0.7 * nearest
    assert nearest < 1.05 * output_error(quantize_weight(weight, bits, 32).expand())


def test_inputs_that_are_not_correlated_are_rounded_to_nearest():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    grid = full_grid(weight, 4, 16)
    got = gptq_weight(weight, torch.eye(32), grid, 4)
    assert torch.equal(got.codes, round_to_grid(weight, grid, 4).codes)


def test_an_input_that_is_never_on_does_no_harm():
    x = _inputs(300, 64)
    x[:, 7] = 0
    x[:, 20] = x[:, 21]  # and two that are always the same
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    result = gptq_weight(weight, x.T @ x / len(x), full_grid(weight, 3, 32), 3)
    assert bool(torch.isfinite(result.expand()).all())


def test_inputs_that_are_not_finite_are_refused():
    gram = torch.eye(32)
    gram[3, 4] = torch.nan
    weight = torch.zeros(2, 32)
    with pytest.raises(DataError, match="not finite"):
        gptq_weight(weight, gram, full_grid(weight, 4, 32), 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_best_grid_is_at_least_as_good_as_the_full_one(bits):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(6))

    def error(grid):
        gaps = round_to_grid(weight, grid, bits).expand() - weight
        return (gaps.square() * importance).reshape(16, 2, 32).sum(dim=2)

    best, full = error(best_grid(weight, bits, 32, importance)), error(full_grid(weight, bits, 32))
    assert bool((best <= full + 1e-7).all())
    if bits == 2:
        assert float(best.sum()) < 0.8 * float(full.sum())


@pytest.mark.parametrize("group_size", [8, None])
def test_fitted_scales_are_those_of_least_squares(group_size, monkeypatch):
    monkeypatch.setattr("mutirao.compress.rounding.gptq.NUMBERS_AT_ONCE", 500)  # a few rows
    x = _inputs(300, 32).double()
    weight = torch.randn(7, 32, generator=torch.Generator().manual_seed(8))
    rounded = quantize_weight(weight, 2, group_size)
    got = fit_scales(weight, rounded, (x.T @ x / len(x)).float())
    assert torch.equal(got.codes, rounded.codes)
    assert torch.equal(got.zero, rounded.zero)
    steps = (
        rounded.codes.reshape(7, -1, group_size or 32).double() - rounded.zero[..., None]
    ).numpy()
    for row in range(7):
        effects = np.stack(
            [
                x[:, g * steps.shape[2] :][:, : steps.shape[2]].numpy() @ steps[row, g]
                for g in range(steps.shape[1])
            ],
            axis=1,
        )
        want = np.linalg.lstsq(effects, x.numpy() @ weight[row].double().numpy())[0]
        is_usable = want > 0
        np.testing.assert_allclose(
            got.scale[row].float().numpy()[is_usable], want[is_usable], rtol=5e-3
        )
        kept = rounded.scale[row].float().numpy()[~is_usable]
        np.testing.assert_array_equal(got.scale[row].float().numpy()[~is_usable], kept)


def test_scales_of_groups_without_weights_stay():
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(9))
    weight[:, 8:16] = 0
    rounded = quantize_weight(weight, 3, 8)
    got = fit_scales(weight, rounded, torch.eye(32))
    assert torch.equal(got.scale[:, 1], rounded.scale[:, 1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_grids_leave_less_error(bits):
    x = _inputs(500, 96)
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(10))
    gram = x.T @ x / len(x)
    grid = best_grid(weight, bits, 32, gram.diagonal(), shortest=SHORTEST)
    once = output_error(gptq_weight(weight, gram, grid, bits).expand() - weight, gram)
    fitted = fitted_gptq(weight, gram, bits, 32)
    assert output_error(fitted.expand() - weight, gram) < 0.97 * once
    assert fitted.scale.dtype == torch.bfloat16
    assert int(fitted.codes.max()) < 2**bits


def test_pruned_weights_stay_zero_on_fitted_grids():
    x = _inputs(400, 64)
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(6, 64, generator=generator)
    pruned = torch.rand(6, 64, generator=generator) < 0.5
    got = fitted_gptq(weight, x.T @ x / len(x), 3, 32, pruned_OI=pruned).expand()
    assert bool((got[pruned] == 0).all())
