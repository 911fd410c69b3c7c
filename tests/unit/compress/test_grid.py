from __future__ import annotations

import numpy as np
import pytest
import torch

from mutirao.compress.rounding.grid import quantize_weight
from mutirao.errors import ShapeError


def _expand(quantized, group_size):
    codes = quantized.codes.double().reshape(len(quantized.codes), -1, group_size)
    steps = quantized.scale.double()[..., None]
    return ((codes - quantized.zero.double()[..., None]) * steps).reshape(quantized.codes.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_agree_with_a_float64_loop(bits):
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, bits, 16)
    for o in range(5):
        for g in range(2):
            group = weight[o, 16 * g : 16 * g + 16].double().numpy()
            step = float(quantized.scale[o, g])
            exact = (max(group.max(), 0) - min(group.min(), 0)) / (2**bits - 1)
            assert step == pytest.approx(exact, rel=2**-8)  # bfloat16 keeps 8 bits
            zero = np.rint(-min(group.min(), 0) / step)
            codes = np.clip(np.rint(group / step) + zero, 0, 2**bits - 1)
            assert quantized.zero[o, g] == zero
            np.testing.assert_array_equal(quantized.codes[o, 16 * g : 16 * g + 16], codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_weight_goes_to_the_nearest_point_of_its_grid(bits):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    quantized = quantize_weight(weight, bits, 32)
    levels = torch.arange(2**bits)[None, None] - quantized.zero.double()[..., None]
    grid = levels * quantized.scale.double()[..., None]
    distances = (weight.double().reshape(8, 2, 32, 1) - grid[:, :, None, :]).abs()
    error = (_expand(quantized, 32) - weight.double()).abs().reshape(8, 2, 32)
    torch.testing.assert_close(error, distances.amin(dim=-1), atol=1e-6, rtol=0)


def test_more_bits_lose_less():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    errors = [
        float((_expand(quantize_weight(weight, bits, 32), 32) - weight).square().mean())
        for bits in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[3]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_groups_survive(value):
    weight = torch.full((2, 16), value)
    np.testing.assert_allclose(_expand(quantize_weight(weight, 4, 16), 16), weight, rtol=2**-8)


def test_zero_stays_zero():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    weight[:, ::5] = 0
    assert (_expand(quantize_weight(weight, 3, 16), 16)[:, ::5] == 0).all()


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ShapeError, match=r"compress.group_size=24 .* 64 inputs"):
        quantize_weight(torch.zeros(2, 64), 4, 24)
