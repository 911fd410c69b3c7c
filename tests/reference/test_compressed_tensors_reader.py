"""Our compressed folders against the package that defines the layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.formats.compressed_tensors import expand_state, load_packed, pack_codes

helpers = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized.helpers",
    reason="compressed-tensors is not installed",
)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_the_same(bits):
    codes = torch.randint(0, 2**bits, (6, 75), generator=torch.Generator().manual_seed(0))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_codes(codes.to(torch.uint8), bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_opens_the_folder_and_reads_the_same_weights(
    tiny_model_directory, tmp_path, bits
):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(bits=bits))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    own = expand_state(tensors, bits, "bfloat16")
    theirs = model.state_dict()
    for name, weight in own.items():
        torch.testing.assert_close(weight, theirs[name], atol=0, rtol=2**-7)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_each_layer_in_its_own_bits(tiny_model_directory, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    block = "model.layers.1"
    layer_bits = {f"{block}.self_attn.{name}_proj": 8 for name in "qkvo"}
    layer_bits |= {f"{block}.mlp.up_proj": 2, f"{block}.mlp.down_proj": 3}
    compress_model(
        tiny_model_directory, tmp_path / "small", CompressConfig(bits=4, layer_bits=layer_bits)
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    own, _ = load_packed(tmp_path / "small", dtype="float32")
    weights = theirs.state_dict()
    for name, weight in own.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=0, rtol=2**-7)
    ids = torch.arange(5, 37)[None]
    with torch.inference_mode():
        expected, got = (model(input_ids=ids).logits for model in (theirs, own))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-2)
