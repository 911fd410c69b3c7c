from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.rounding.nf4 import quantize_nf4
from mutirao.errors import InputError
from mutirao.formats.compressed_tensors import load_packed
from mutirao.formats.nf4 import expand_nf4

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 200, 40]])


@pytest.fixture
def functional():
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def _levels():
    """The 16 points of Dettmers et al. 2023, appendix E, from normal quantiles."""
    offset = 0.9677083
    upper = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([upper, [0], lower]))
    return levels / levels.max()


@pytest.mark.usefixtures("functional")
def test_each_weight_goes_to_the_nearest_point_of_its_blocks_grid():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = {f"a.{key}": part for key, part in quantize_nf4(weight).items()}
    got = expand_nf4("a.weight", stored).double()
    scales = weight.double().abs().amax(dim=1)  # a row is a block here
    grids = _levels() * scales.numpy()[:, None]
    nearest = np.abs(weight.double().numpy()[..., None] - grids[:, None]).min(axis=2)
    # Scales are rounded to 8 bits themselves, so that points move by up to a few per cent.
    error = np.abs(got.numpy() - weight.double().numpy())
    assert np.mean(error) == pytest.approx(np.mean(nearest), rel=0.03)
    assert np.max(np.abs(error - nearest) / scales.numpy()[:, None]) < 0.05


def test_the_own_reader_agrees_with_bitsandbytes(functional):
    weight = torch.randn(33, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    stored = quantize_nf4(weight)  # 36.1 blocks: the last one is not full
    parts = {key.removeprefix("weight."): part for key, part in stored.items() if key != "weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    expected = functional.dequantize_4bit(stored["weight"], state)
    got = expand_nf4("weight", stored)
    torch.testing.assert_close(got.bfloat16(), expected, rtol=2**-7, atol=0)
    assert float((got.bfloat16() == expected).float().mean()) > 0.99


def test_scales_that_are_not_quantized_are_read_too(functional):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    got = expand_nf4("weight", {"weight": packed, **stored})
    torch.testing.assert_close(got, functional.dequantize_4bit(packed, state), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("functional")
@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_the_folder_and_predicts_the_same(tiny_model_directory, tmp_path):
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    text.write_text("fever and cough for three days. " * 400)
    metrics = compress_model(
        tiny_model_directory,
        tmp_path / "small",
        CompressConfig(method="nf4"),
        text=text,
        text_config=TextConfig(window_tokens=32, calibration_windows=8, heldout_windows=6),
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits.float()
        got = load_packed(tmp_path / "small")[0](input_ids=IDS).logits.float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0.06)
    assert metrics["heldout.divergence"] > 0
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert metrics["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert metrics["weight_bits"] == 4
    layer = [t.nbytes for n, t in tensors.items() if "layers.0.mlp.up_proj" in n]
    # Codes, a byte for each block's scale, one float for these; tables; a JSON text.
    assert {96 * 64 // 2, 96, 4, 4 * 16, 4 * 256} <= set(layer)
    assert len(layer) == 6


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"nf4 needs bitsandbytes.*mutirao\[qlora\]"):
        compress_model(tmp_path / "nowhere", tmp_path / "out", CompressConfig(method="nf4"))
    assert not (tmp_path / "out").exists()
