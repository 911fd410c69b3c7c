"""Round-to-nearest against PyTorch's own fake quantization, on the same scales."""

from __future__ import annotations

import pytest
import torch

from mutirao.compress.rounding.grid import quantize_weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_agrees_with_torch(bits):
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(bits))
    quantized = quantize_weight(weight, bits, 32)
    expected = torch.fake_quantize_per_channel_affine(
        weight, quantized.scale[:, 0].float(), quantized.zero[:, 0].int(), 0, 0, 2**bits - 1
    )
    zero = quantized.zero.float()
    got = (quantized.codes.float() - zero) * quantized.scale.float()
    # torch multiplies by 1 / scale: a weight halfway between two codes may fall either way.
    differs = (got - expected).abs() > 1e-6
    assert differs.float().mean() < 0.005
