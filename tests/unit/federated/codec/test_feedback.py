"""Error feedback: nothing is lost but the last residual, and a kept state goes on exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import InputError, UpdateError
from mutirao.federated.arrays import read_arrays, write_arrays
from mutirao.federated.codec import (
    CodecConfig,
    decode_tensors,
    encode_with_feedback,
    start_residuals,
)

SHAPES = {"a": (30, 7), "b": (50,)}


def _updates(num_rounds, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(num_rounds)
    ]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["bf16", "int8", "int4", "int2"]),
    st.sampled_from([1, 10]),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_all_rounds_together_lose_the_last_residual_alone(form, keep_one_in, rounding):
    codec = CodecConfig(format=form, keep_one_in=keep_one_in, rounding=rounding, block_size=16)
    residuals = start_residuals(SHAPES)
    meant = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    came = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for seed, update in enumerate(_updates(12)):
        payloads, residuals = encode_with_feedback(update, residuals, codec, seed=seed)
        decoded = decode_tensors(payloads, SHAPES, codec)
        for name in SHAPES:
            meant[name] += update[name]
            came[name] += decoded[name]
    for name in SHAPES:
        assert meant[name] - came[name] == pytest.approx(residuals[name], abs=1e-4)


def test_small_values_get_through_in_time_only_with_feedback():
    codec = CodecConfig(format="int4", block_size=64)
    update = {"t": np.full(64, 0.01, np.float32)}
    update["t"][0] = 1.0
    residuals = start_residuals({"t": (64,)})
    came = np.zeros(64)
    for _ in range(100):
        payloads, residuals = encode_with_feedback(update, residuals, codec)
        came += decode_tensors(payloads, {"t": (64,)}, codec)["t"]
    without, _ = encode_with_feedback(update, start_residuals({"t": (64,)}), codec)
    assert not decode_tensors(without, {"t": (64,)}, codec)["t"][1:].any()
    assert came[1:] == pytest.approx(np.full(63, 1.0), abs=0.1)


@pytest.mark.parametrize("keep_one_in", [1, 5])
def test_a_journaled_residual_goes_on_to_the_same_bytes(tmp_path, keep_one_in):
    codec = CodecConfig(format="int2", keep_one_in=keep_one_in, rounding="stochastic")
    residuals = start_residuals(SHAPES)
    updates = _updates(6)
    for number, update in enumerate(updates[:3]):
        _, residuals = encode_with_feedback(update, residuals, codec, seed=number)
    write_arrays(tmp_path / "residual.safetensors", residuals)
    restored = read_arrays(tmp_path / "residual.safetensors")
    for number, update in enumerate(updates[3:], 3):
        payloads, residuals = encode_with_feedback(update, residuals, codec, seed=number)
        again, restored = encode_with_feedback(update, restored, codec, seed=number)
        for name in SHAPES:
            assert payloads[name].tobytes() == again[name].tobytes()
            assert residuals[name].tobytes() == restored[name].tobytes()


def test_what_was_given_is_unchanged():
    (update,) = _updates(1)
    residuals = start_residuals(SHAPES)
    before = {name: each.copy() for name, each in update.items()}
    encode_with_feedback(update, residuals, CodecConfig(format="int2"), clip_norm=0.1)
    assert all((update[name] == before[name]).all() for name in SHAPES)
    assert not any(each.any() for each in residuals.values())


def test_the_clip_bounds_what_is_encoded_with_its_residual():
    (update,) = _updates(1)
    residuals = {name: 100 * each for name, each in update.items()}
    codec = CodecConfig(format="fp32")
    payloads, left = encode_with_feedback(update, residuals, codec, clip_norm=2.0)
    decoded = decode_tensors(payloads, SHAPES, codec)
    norm = np.sqrt(sum(np.square(each, dtype=np.float64).sum() for each in decoded.values()))
    assert 2.0 * (1 - 1e-6) < norm <= 2.0
    assert not any(each.any() for each in left.values())
    small, _ = encode_with_feedback(update, start_residuals(SHAPES), codec, clip_norm=1e6)
    assert decode_tensors(small, SHAPES, codec)["a"].tobytes() == update["a"].tobytes()


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_clip_is_refused(clip_norm):
    (update,) = _updates(1)
    with pytest.raises(InputError, match="clip_norm"):
        encode_with_feedback(update, start_residuals(SHAPES), CodecConfig(), clip_norm=clip_norm)


@pytest.mark.parametrize(
    "residuals",
    [
        {"a": np.zeros((30, 7), np.float32)},
        {"a": np.zeros((7, 30), np.float32), "b": np.zeros(50, np.float32)},
        {"a": np.zeros((30, 7), np.float32), "b": np.full(50, np.nan, np.float32)},
    ],
)
def test_another_updates_residuals_are_refused(residuals):
    (update,) = _updates(1)
    with pytest.raises(UpdateError, match="this site's journal sent"):
        encode_with_feedback(update, residuals, CodecConfig())


def test_an_overflow_is_named():
    huge = {"t": np.full(3, 3e38, np.float32)}
    with pytest.raises(UpdateError, match="tensor 't' with values that are not finite"):
        encode_with_feedback(huge, huge, CodecConfig())
