"""Floats split into codes and rests, against the cells written out number by number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.inference.store.planes import dequantize, floats_of, pack, unpack
from mutirao.inference.store.split_floats import SplitError, join, split
from mutirao.inference.store.store_build import build_store
from mutirao.inference.store.weight_store import WeightStore

NAMES = {"BF16_SPLIT": 7, "F16_SPLIT": 10}


def numbers_of(name, values):
    """Bits of float32 values, rounded to a format."""
    values = np.asarray(values, np.float32)
    if name == "F16_SPLIT":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def values_of(name, numbers):
    values = floats_of(numbers.tobytes(), name.removesuffix("_SPLIT"))
    return values.reshape(numbers.shape).astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 56))
def test_bits_come_back(name, seed, num_blocks, num_octaves):
    rng = np.random.default_rng(seed)
    shape = (3, 32 * num_blocks)
    values = rng.normal(size=shape) * np.exp2(rng.uniform(-num_octaves, 0, shape))
    values[rng.random(shape) < 0.1] = 0.0
    values[rng.random(shape) < 0.1] = -0.0
    numbers = numbers_of(name, values)
    exponents, codes, rests = split(numbers, NAMES[name])
    assert codes.max(initial=0) < 64
    assert rests.max(initial=0) < 1 << (8 if name == "BF16_SPLIT" else 10)
    np.testing.assert_array_equal(join(exponents, codes, rests, NAMES[name]), numbers)


def test_every_half_precision_number_comes_back_beside_any_other():
    numbers = np.arange(1 << 16, dtype=np.uint16)
    for seed in range(3):
        some = np.random.default_rng(seed).permutation(numbers).reshape(-1, 32)
        np.testing.assert_array_equal(join(*split(some, 10), 10), some)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_cells_that_numbers_lie_in(name):
    """Of all but the smallest: between s and 32 s."""
    values = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    numbers = numbers_of(name, values)
    exponents, codes, _ = split(numbers, NAMES[name])
    told = 0
    for row, column in np.ndindex(numbers.shape):
        block = slice(column // 32 * 32, column // 32 * 32 + 32)
        largest = np.abs(values_of(name, numbers)[row, block]).max()
        scale = 2.0 ** (math.frexp(largest)[1] - 1 - 4)
        assert 2.0 ** (int(exponents[row, column // 32]) - 127) == scale
        value = values_of(name, numbers)[row, column]
        if abs(value) >= scale:
            cell = int(abs(value) / scale)
            assert codes[row, column] == (31 - cell if value < 0 else 32 + cell)
            told += 1
    assert told > 0.9 * numbers.size


@pytest.mark.parametrize(("name", "most"), [("BF16_SPLIT", 0.055), ("F16_SPLIT", 0.12)])
def test_codes_alone_are_near(name, most):
    """Root mean square, relative; rounding to 6 bits with the same scales would err by 0.03."""
    values = np.random.default_rng(1).normal(scale=0.02, size=(64, 1024)).astype(np.float32)
    numbers = numbers_of(name, values)
    scales, planes = pack(numbers.tobytes(), name, *values.shape)
    errors = []
    for num_planes in (4, 3, 2):
        draft = dequantize(scales, planes[:num_planes], name, *values.shape)
        errors.append(float(np.sqrt(np.mean((draft - values) ** 2)) / values.std()))
    assert errors[0] < most
    assert errors == sorted(errors)
    whole = dequantize(scales, planes, name, *values.shape)
    np.testing.assert_array_equal(whole, values_of(name, numbers))


@pytest.mark.parametrize("name", NAMES)
def test_infinities_and_nan_come_back(name):
    values = np.array([[np.inf, -np.inf, np.nan, 1.0, 0.0, -0.0, 0.5, -2.0] * 4], np.float32)
    numbers = numbers_of(name, values)
    if name == "BF16_SPLIT":  # 1.0 is too far below infinity
        with pytest.raises(SplitError):
            split(numbers, 7)
        return
    scales, planes = pack(numbers.tobytes(), name, 1, 32)
    assert unpack(scales, planes, name, 1, 32) == numbers.tobytes()


def test_a_matrix_that_cannot_be_split_is_stored_whole(tmp_path, caplog):
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    state = LlamaForCausalLM(config).bfloat16().state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][5, 7] = 1e-30
    folder = tmp_path / "model"
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(
        {key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mutirao.inference.text.tokenizer_files.write_tokenizer", lambda *arguments: None
        )
        build_store(folder, tmp_path / "store", lambda done, total: None)
    store = WeightStore.open(tmp_path / "store")
    kept = {tensor.format for tensor in store.tensors.values()}
    assert kept == {"BF16_SPLIT", "BF16"}
    assert store.tensors["blk.1.ffn_up"].format == "BF16"
    assert "blk.1.ffn_up is stored whole" in caplog.text
    tensor = store.tensors["blk.1.ffn_up"]
    scales, planes = store.load("blk.1.ffn_up")
    weights = dequantize(scales, planes, tensor.format, tensor.num_rows, tensor.num_columns)
    np.testing.assert_array_equal(weights, state[name].float().numpy())
