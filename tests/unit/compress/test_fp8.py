from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.compress.rounding.fp8 import quantize_fp8
from mutirao.formats.compressed_tensors import load_packed
from mutirao.formats.huggingface import load_causal_lm

E4M3 = np.array(
    [
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)  # no number
    ]
)
"""All positive numbers of the format, from its definition."""


def test_each_weight_goes_to_the_nearest_number_of_its_row():
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).double()
    weight *= torch.tensor([1e-6, 1e-3, 1.0, 3.0, 50.0, 1e4], dtype=torch.double)[:, None]
    got = quantize_fp8(weight)
    assert E4M3.max() == 448
    for row, expanded, scale in zip(weight, got.expand().double(), got.scale[:, 0], strict=True):
        assert float(scale) == pytest.approx(float(row.abs().max()) / 448, rel=2**-8)
        numbers = np.concatenate([-E4M3, E4M3]) * float(scale)
        nearest = np.abs(row.numpy()[:, None] - numbers).min(axis=1)
        np.testing.assert_allclose(
            (expanded - row).abs().numpy(), nearest, atol=1e-6 * float(row.abs().max())
        )


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_rows_survive(value):
    expanded = quantize_fp8(torch.full((2, 16), value)).expand()
    torch.testing.assert_close(expanded, torch.full((2, 16), value), rtol=2**-7, atol=0)


def test_zero_stays_zero():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    weight[:, ::5] = 0
    assert (quantize_fp8(weight).expand()[:, ::5] == 0).all()


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_the_folder_and_predicts_the_same(tiny_model_directory, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(method="fp8"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 200, 40]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        got = load_packed(tmp_path / "small")[0](input_ids=ids).logits
        original = load_causal_lm(tiny_model_directory)[0](input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not torch.equal(got, original)


def test_metrics_count_a_byte_per_weight_and_scales(tiny_model_directory, tmp_path):
    metrics = compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(method="fp8"))
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    layer = {n: t.nbytes for n, t in tensors.items() if "layers.0.mlp.up_proj" in n}
    assert sorted(layer.values()) == [96 * 2, 96 * 64]
    assert metrics["weight_bits"] == 8
    assert metrics["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert "FP8" in (tmp_path / "small" / "README.md").read_text()
