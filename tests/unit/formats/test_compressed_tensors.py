from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mutirao.errors import FormatError
from mutirao.formats.compressed_tensors import (
    expand_state,
    expand_weight,
    is_packed,
    load_packed,
    pack_codes,
    unpack_codes,
)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_survive_packing(num_bits: int, rows: int, columns: int, seed: int):
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**num_bits, (rows, columns)).astype(np.uint8)
    words = pack_codes(torch.from_numpy(codes), num_bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-columns * num_bits // 32))
    np.testing.assert_array_equal(unpack_codes(words, num_bits, columns).numpy(), codes)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_a_row_is_one_number_in_base_two_to_the_bits(num_bits: int):
    codes = np.random.default_rng(0).integers(0, 2**num_bits, 37)
    number = sum(int(code) << (num_bits * position) for position, code in enumerate(codes))
    words = pack_codes(torch.from_numpy(codes.astype(np.uint8))[None], num_bits)[0].tolist()
    assert sum((word % 2**32) << (32 * place) for place, word in enumerate(words)) == number


def test_expanding_agrees_with_a_loop():
    rng = np.random.default_rng(1)
    codes, zero = rng.integers(0, 8, (3, 12)), rng.integers(0, 8, (3, 4))
    scale = rng.uniform(0.1, 1, (3, 4)).astype(np.float32)
    expected = np.array(
        [[(codes[o, i] - zero[o, i // 3]) * scale[o, i // 3] for i in range(12)] for o in range(3)]
    )
    weight = expand_weight(
        pack_codes(torch.from_numpy(codes.astype(np.uint8)), 3),
        torch.from_numpy(scale),
        pack_codes(torch.from_numpy(zero.T.astype(np.uint8)), 3).T,
        (3, 12),
        3,
    )
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)


def test_words_that_do_not_suffice_are_refused():
    with pytest.raises(FormatError, match="expected 2 for 9 codes of 4 bits"):
        unpack_codes(torch.zeros(1, 1, dtype=torch.int32), 4, 9)


def test_scales_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match="do not fit together"):
        expand_weight(torch.zeros(2, 4, dtype=torch.int32), torch.ones(3, 2), None, (2, 32), 4)


def test_a_layer_without_scales_is_refused():
    tensors = {
        "a.weight_packed": torch.zeros(1, 4, dtype=torch.int32),
        "a.weight_shape": torch.tensor([1, 32]),
    }
    with pytest.raises(FormatError, match="weight_scale"):
        expand_state(tensors, 4, "float32")


def test_floats_are_scaled_by_their_rows():
    values = torch.tensor([[1.0, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn)
    tensors = {"a.weight": values, "a.weight_scale": torch.tensor([[2.0], [0.5]])}
    state = expand_state(tensors, 8, "float32")
    assert state.keys() == {"a.weight"}
    assert state["a.weight"].tolist() == [[2.0, -4.0], [224.0, 0.25]]


def test_floats_without_fitting_scales_are_refused():
    values = torch.ones(2, 3).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"no a\.weight_scale"):
        expand_state({"a.weight": values}, 8, "float32")
    with pytest.raises(FormatError, match=r"expected \(2, 1\)"):
        expand_state({"a.weight": values, "a.weight_scale": torch.ones(2)}, 8, "float32")


def test_plain_and_missing_models_are_not_packed(tiny_model_directory, tmp_path):
    assert not is_packed(tiny_model_directory)
    assert not is_packed(tmp_path / "nothing")


def test_another_way_of_compressing_is_refused(tiny_model_directory, tmp_path):
    for file in tiny_model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_packed(tmp_path)
    with pytest.raises(FormatError, match="of a kind that is not read here"):
        load_packed(tmp_path)
