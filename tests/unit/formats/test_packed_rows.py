"""Compressed layers by rows against the reader that takes them whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.errors import FormatError
from mutirao.formats.compressed_tensors import expand_state
from mutirao.formats.packed_rows import find_layer, packed_bits, to_bfloat16
from mutirao.formats.safetensors_reader import SafeTensor, read_safetensors


def read_rows(tensor: SafeTensor, begin: int, end: int) -> np.ndarray:
    size = tensor.num_bytes // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + begin * size)
        return np.frombuffer(file.read((end - begin) * size), np.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_those_of_the_whole(tiny_model_directory: Path, tmp_path: Path, bits: int) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "compressed"
    compress_model(tiny_model_directory, out, CompressConfig(bits=bits, group_size=32))
    whole = expand_state(load_file(out / "model.safetensors"), bits, "bfloat16")
    tensors = read_safetensors(out / "model.safetensors")
    declared = packed_bits(json.loads((out / "config.json").read_text()))
    assert declared is not None
    num_layers = 0
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed"):
            prefix = name.removesuffix(".weight_packed")
            expected = whole[f"{prefix}.weight"]
            assert declared.of(prefix) == bits
            layer = find_layer(tensors, prefix, tuple(expected.shape), bits)
            for begin, end in ((0, 16), (16, 32), (0, len(expected)), (5, 6)):
                came = layer.read_rows(read_rows, begin, end).view(np.uint16)
                wanted = expected[begin:end].view(torch.uint16).numpy().reshape(-1)
                np.testing.assert_array_equal(came, wanted)
            num_layers += 1
            assert tensor.dtype == "I32"
    assert num_layers == 14


def test_rounding_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000]
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bfloat16(values).view(np.uint16), expected)
    assert np.isnan(
        torch.from_numpy(to_bfloat16(np.array([np.nan], np.float32)).copy())
        .view(torch.bfloat16)
        .float()
        .numpy()
    ).all()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        "compressed",
        {},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [1]},
    ],
)
def test_other_quantizations_are_refused(quantization: object) -> None:
    with pytest.raises(FormatError, match="quantized in a way that is not read here"):
        packed_bits({"quantization_config": quantization})
    assert packed_bits({}) is None


def test_parts_that_do_not_fit_are_refused() -> None:
    def part(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, SafeTensor]:
        return name, SafeTensor(name, dtype, shape, Path("x"), 0, 0)

    good = dict(
        [
            part("l.weight_packed", "I32", (8, 4)),
            part("l.weight_scale", "BF16", (8, 1)),
            part("l.weight_zero_point", "I32", (1, 1)),
        ]
    )
    find_layer(good, "l", (8, 32), 4)
    for name, dtype, shape in (
        ("l.weight_packed", "I32", (8, 5)),
        ("l.weight_packed", "I64", (8, 4)),
        ("l.weight_scale", "BF16", (7, 1)),
        ("l.weight_scale", "BF16", (8, 3)),
        ("l.weight_scale", "BF16", (8, 0)),
        ("l.weight_scale", "I32", (8, 1)),
        ("l.weight_scale", "BF16", (8,)),
        ("l.weight_zero_point", "I32", (8, 1)),
    ):
        with pytest.raises(FormatError, match="compressed layer l is damaged"):
            find_layer(good | dict([part(name, dtype, shape)]), "l", (8, 32), 4)
    with pytest.raises(FormatError, match="compressed layer l is damaged"):
        find_layer({"l.weight_packed": good["l.weight_packed"]}, "l", (8, 32), 4)
