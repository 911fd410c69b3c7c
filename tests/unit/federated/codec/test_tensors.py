"""Payloads of version 2: sizes known before, errors within bounds, the same bytes anywhere."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mutirao.errors import InputError, UpdateError
from mutirao.federated.codec import (
    CodecConfig,
    count_bytes,
    count_decode_bytes,
    count_payload_bytes,
    decode_tensor,
    decode_tensors,
    encode_tensor,
    encode_tensors,
)

FORMATS = ("fp32", "bf16", "int8", "int4", "int2")
VALUES = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
TENSORS = arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0), elements=VALUES)
CODECS = st.builds(
    CodecConfig,
    format=st.sampled_from(FORMATS),
    block_size=st.integers(1, 40),
    keep_one_in=st.integers(1, 7),
    rounding=st.sampled_from(["nearest", "stochastic"]),
)


def _round_trip(values, codec, seed=0):
    return decode_tensor("t", encode_tensor("t", values, codec, seed=seed), values.shape, codec)


def _largest_error(kept, codec):
    """Bound on the error of each kept value, by the words of the documentation."""
    if codec.format == "fp32":
        return np.zeros(kept.size)
    is_nearest = codec.rounding == "nearest"
    magnitudes = np.abs(kept.astype(np.float64))
    if codec.format == "bf16":
        return magnitudes * 2.0 ** (-8 if is_nearest else -7)
    steps_of = {"int8": 127, "int4": 7, "int2": 2 if is_nearest else 1.5}[codec.format]
    bounds = np.empty(kept.size)
    for start in range(0, kept.size, codec.block_size):
        block = slice(start, start + codec.block_size)
        step = magnitudes[block].max() / steps_of
        bounds[block] = step * (0.5 if is_nearest else 1) * (1 + 1e-4)
    return bounds + 1e-36


@settings(deadline=None, max_examples=300)
@given(TENSORS, CODECS, st.integers(0, 2**70))
def test_bytes_are_as_counted_and_errors_within_the_bound(values, codec, seed):
    payload = encode_tensor("t", values, codec, seed=seed)
    assert payload.dtype == np.uint8
    assert payload.shape == (count_payload_bytes(values.shape, codec),)
    assert payload.tobytes() == encode_tensor("t", values, codec, seed=seed).tobytes()
    decoded = decode_tensor("t", payload, values.shape, codec)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    flat, flat_decoded = values.reshape(-1), decoded.reshape(-1)
    num_kept = math.ceil(values.size / codec.keep_one_in)
    # An oracle for top-k by Python's own stable sort.
    kept = sorted(sorted(range(flat.size), key=lambda i: -abs(flat[i]))[:num_kept])
    errors = np.abs(flat_decoded[kept].astype(np.float64) - flat[kept])
    assert (errors <= _largest_error(flat[kept], codec)).all()
    assert not np.delete(flat_decoded, kept).any()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep_one_in", [1, 10])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block_size", [3, 256, 16_384])
def test_tensors_of_several_stretches(form, keep_one_in, rounding, block_size):
    codec = CodecConfig(
        format=form, keep_one_in=keep_one_in, rounding=rounding, block_size=block_size
    )
    values = np.random.default_rng(0).normal(size=(3, 50_001)).astype(np.float32)
    decoded = _round_trip(values, codec).reshape(-1)
    kept = np.sort(
        np.argsort(-np.abs(values.reshape(-1)), kind="stable")[: -(-values.size // keep_one_in)]
    )
    errors = np.abs(decoded[kept].astype(np.float64) - values.reshape(-1)[kept])
    assert (errors <= _largest_error(values.reshape(-1)[kept], codec)).all()


@pytest.mark.parametrize(
    ("form", "keep_one_in", "num_bytes"),
    [
        ("fp32", 1, 24 + 4000),
        ("bf16", 1, 24 + 2000),
        ("int8", 1, 24 + 8 * 4 + 1000),
        ("int4", 1, 24 + 8 * 4 + 500),
        ("int2", 1, 24 + 8 * 4 + 250),
        ("bf16", 10, 24 + 100 * 2 + 200),
        ("int8", 10, 24 + 100 * 2 + 4 + 100),
    ],
)
def test_bytes_by_hand(form, keep_one_in, num_bytes):
    codec = CodecConfig(format=form, block_size=128, keep_one_in=keep_one_in)
    assert count_payload_bytes((10, 100), codec) == num_bytes
    assert count_bytes({"a": (10, 100), "b": (1000,)}, codec) == 2 * num_bytes


def test_places_in_a_large_tensor_take_four_bytes():
    codec = CodecConfig(format="int8", keep_one_in=2)
    for size in (2**16, 2**16 + 2):
        values = np.arange(size, dtype=np.float32)
        assert _round_trip(values, codec)[-1] == pytest.approx(size - 1)
    assert (
        count_payload_bytes((2**16 + 2,), codec) - count_payload_bytes((2**16,), codec)
        == 2 * 2**15 + 4 + 1 + 4
    )


def test_a_tensor_too_large_for_places_is_refused():
    with pytest.raises(InputError, match="keep_one_in=1"):
        count_payload_bytes((2**33,), CodecConfig(keep_one_in=2))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_zeros_stay_zeros_and_the_largest_value_stays(form):
    values = np.zeros(300, np.float32)
    values[7] = -3
    decoded = _round_trip(values, CodecConfig(format=form, block_size=100))
    assert decoded == pytest.approx(values, rel=1e-6)


def test_two_bits_have_four_levels_and_a_block_of_zeros_stays_zero():
    values = np.array([-2, -1.5, -0.5, 0.4, 0.6, 1.2, 2, 0], np.float32)
    codec = CodecConfig(format="int2", block_size=8)
    assert _round_trip(values, codec) == pytest.approx([-1.5, -1.5, -0.5, 0.5, 0.5, 1.5, 1.5, 0.5])
    assert not _round_trip(np.zeros(20, np.float32), codec).any()


def test_two_bits_lose_less_of_a_bell_than_three_levels_would():
    values = np.random.default_rng(0).normal(size=(100, 256)).astype(np.float32)
    decoded = _round_trip(values, CodecConfig(format="int2", block_size=256))
    largest = np.abs(values).max(axis=1, keepdims=True)
    three_levels = np.rint(values / largest) * largest
    assert np.square(decoded - values).mean() < 0.5 * np.square(three_levels - values).mean()


def test_ties_go_to_even():
    values = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert _round_trip(values, CodecConfig(block_size=6)).tolist() == [127, 0, 2, 2, 0, -2]


@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False)))
def test_bfloat16_is_pytorchs(values):
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    is_kept = np.isfinite(expected)  # ours never rounds a finite value to infinity
    decoded = _round_trip(values, CodecConfig(format="bf16"))
    assert (decoded[is_kept] == expected[is_kept]).all()
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("form", ["bf16", "int8", "int4", "int2"])
def test_stochastic_rounding_is_right_on_average(form):
    codec = CodecConfig(format=form, rounding="stochastic", block_size=64)
    values = np.random.default_rng(1).normal(size=64).astype(np.float32)
    num_draws = 2000
    decoded = np.array([_round_trip(values, codec, seed) for seed in range(num_draws)], np.float64)
    step = np.abs(values).max() / {"bf16": 64, "int8": 127, "int4": 7, "int2": 1.5}[form]
    # A value's standard error is at most half a step over the root of the draws; five of them.
    assert (np.abs(decoded.mean(axis=0) - values) < 5 * step / 2 / num_draws**0.5).all()


def test_stochastic_rounding_depends_on_seed_and_name_alone():
    codec = CodecConfig(format="int4", rounding="stochastic")
    values = np.random.default_rng(2).normal(size=500).astype(np.float32)
    tensors = {"a": values, "b": values}
    one, again = (encode_tensors(tensors, codec, seed=5) for _ in range(2))
    other = encode_tensors(tensors, codec, seed=6)
    assert one["a"].tobytes() == again["a"].tobytes()
    assert one["a"].tobytes() != one["b"].tobytes()
    assert one["a"].tobytes() != other["a"].tobytes()
    with pytest.raises(InputError, match="seed"):
        encode_tensors(tensors, codec)


def test_bytes_do_not_change_from_version_to_version():
    values = (np.arange(-500, 500, dtype=np.float32) / 7).reshape(10, 100)
    digest = hashlib.sha256()
    for form in FORMATS:
        for keep_one_in in (1, 3):
            for rounding in ("nearest", "stochastic"):
                codec = CodecConfig(
                    format=form, keep_one_in=keep_one_in, rounding=rounding, block_size=32
                )
                digest.update(encode_tensor("t", values, codec, seed=1).tobytes())
    assert digest.hexdigest() == "9ff4fc5c50348656d92345aa549c6b87435a01d988a2393e813bc5861263baf5"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("extreme", [3.4028235e38, 1e-45, 1e-38])
def test_extremes_of_float32_come_back_finite(form, extreme):
    values = np.array([extreme, -extreme, 0, extreme / 2], np.float32)
    decoded = _round_trip(values, CodecConfig(format=form))
    assert np.abs(decoded - values).max() <= extreme / (2 if form == "int2" else 7) + 1e-38


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMATS)
def test_non_finite_update_does_not_leave(form, bad):
    with pytest.raises(UpdateError, match="tensor 'lora_B' with values that are not finite"):
        encode_tensors({"lora_B": np.array([0.0, bad], np.float32)}, CodecConfig(format=form))


def test_another_type_does_not_leave():
    with pytest.raises(UpdateError, match="'t' as float64"):
        encode_tensor("t", np.zeros(3), CodecConfig())


def test_tensors_are_those_that_were_agreed():
    codec = CodecConfig()
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}
    payloads = encode_tensors(tensors, codec)
    shapes = {"a": (2, 3), "b": (4,)}
    decoded = decode_tensors(payloads, shapes, codec)
    assert all((decoded[name] == 1).all() for name in tensors)
    with pytest.raises(UpdateError, match="no tensor 'b'"):
        decode_tensors({"a": payloads["a"]}, shapes, codec)
    with pytest.raises(UpdateError, match="a tensor 'c' that was not agreed"):
        decode_tensors({**payloads, "c": payloads["a"]}, shapes, codec)
    with pytest.raises(UpdateError, match="tensor 'b' is uint8 of shape"):
        decode_tensors(payloads, {**shapes, "b": (5,)}, codec)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep_one_in", [1, 2, 50])
def test_memory_of_decoding_is_within_the_bound(form, keep_one_in):
    codec = CodecConfig(format=form, keep_one_in=keep_one_in)
    values = np.random.default_rng(3).normal(size=1_000_000).astype(np.float32)
    payload = encode_tensor("t", values, codec)
    tracemalloc.start()
    try:
        decode_tensor("t", payload, values.shape, codec)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes <= count_decode_bytes(values.shape, codec)


@pytest.mark.parametrize("bad", [{"format": "int3"}, {"block_size": 0}, {"keep_one_in": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CodecConfig(**bad)
