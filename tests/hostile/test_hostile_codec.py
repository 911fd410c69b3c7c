"""Payloads of a lying site: refused by the tensor's name, within the memory that was declared."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutirao.errors import UpdateError
from mutirao.federated.codec import (
    CodecConfig,
    count_decode_bytes,
    decode_tensor,
    decode_tensors,
    encode_tensor,
    encode_tensors,
)
from mutirao.federated.codec.layout import HEADER, lay_out

SHAPE = (13, 21)
CODECS = [
    CodecConfig(format=form, keep_one_in=keep_one_in, block_size=16)
    for form in ("fp32", "bf16", "int8", "int4", "int2")
    for keep_one_in in (1, 4)
]
ANY_CODEC = st.sampled_from(CODECS)


def _valid(codec):
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return encode_tensor("lora_B", values, codec)


def _read(payload, codec, shape=SHAPE):
    """Decode, or return the sentence of the refusal; anything else fails the test."""
    tracemalloc.start()
    try:
        decoded = decode_tensor("lora_B", payload, shape, codec)
    except UpdateError as error:
        message = str(error)
        assert "'lora_B'" in message
        assert len(message) < 300
        return message
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes <= count_decode_bytes(shape, codec)
    assert decoded.shape == shape
    assert np.isfinite(decoded).all()
    return None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=2000), ANY_CODEC)
def test_any_bytes_are_refused(data, codec):
    assert _read(np.frombuffer(data, np.uint8), codec) is not None


@settings(deadline=None, max_examples=500)
@given(ANY_CODEC, st.data())
def test_any_body_behind_a_right_header_is_read_or_refused(codec, data):
    valid = _valid(codec)
    size = valid.size - HEADER.size
    body = data.draw(st.binary(min_size=size, max_size=size))
    payload = np.concatenate([valid[: HEADER.size], np.frombuffer(body, np.uint8)])
    _read(payload, codec)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(
    ANY_CODEC,
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_altered_bytes_are_read_or_refused(codec, changes):
    payload = _valid(codec).copy()
    for place, value in changes:
        payload[place % payload.size] = value
    _read(payload, codec)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_other_length_is_refused(codec):
    valid = _valid(codec)
    for length in range(valid.size):
        assert "of shape" in _read(valid[:length], codec)
    assert "of shape" in _read(np.concatenate([valid, valid[:1]]), codec)
    assert "of shape" in _read(valid.reshape(1, -1), codec)
    assert "in one piece" in _read(np.repeat(valid, 2)[::2], codec)
    assert "float32" in _read(valid.astype(np.float32), codec)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_an_oversized_payload_costs_nothing(codec):
    payload = np.zeros(50_000_000, np.uint8)
    payload[: HEADER.size] = _valid(codec)[: HEADER.size]
    assert "of shape (50000000,)" in _read(payload, codec)


@pytest.mark.parametrize(
    ("offset", "form", "lie", "words"),
    [
        (0, "<H", 0, "mark"),
        (2, "<B", 1, "version 1 (expected 2)"),
        (3, "<B", 3, "format 3 (expected 2)"),
        (3, "<B", 255, "format 255"),
        (4, "<I", 2**32 - 1, "block size 4294967295 (expected 16)"),
        (8, "<Q", 2**64 - 1, "number of values 18446744073709551615 (expected 273)"),
        (16, "<Q", 0, "number kept 0 (expected 273)"),
    ],
)
def test_a_lying_header_is_told_from_the_agreed_one(offset, form, lie, words):
    codec = CodecConfig(block_size=16)
    payload = _valid(codec).copy()
    raw = struct.pack(form, lie)
    payload[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
    assert words in _read(payload, codec)


@pytest.mark.parametrize("codec", [c for c in CODECS if c.format.startswith("int")], ids=str)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0, 3.4e38])
def test_impossible_scales_are_refused(codec, scale):
    payload = _valid(codec).copy()
    start = HEADER.size + lay_out(273, codec).places_bytes
    payload[start : start + 4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    message = _read(payload, codec)
    assert message is not None
    assert "scale" in message or "not finite" in message


@pytest.mark.parametrize("codec", [c for c in CODECS if c.format in ("fp32", "bf16")], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(codec, value):
    payload = _valid(codec).copy()
    raw = np.frombuffer(np.float32(value).tobytes(), np.uint8)[2 if codec.format == "bf16" else 0 :]
    payload[-raw.size :] = raw
    assert "not finite" in _read(payload, codec)


@pytest.mark.parametrize(("form", "octet"), [("int8", 0x80), ("int4", 0x88)])
def test_codes_that_no_sender_writes_are_refused(form, octet):
    codec = CodecConfig(format=form, block_size=16)
    payload = _valid(codec).copy()
    payload[-2] = octet
    assert "no sender writes" in _read(payload, codec)


@pytest.mark.parametrize("form", ["int4", "int2"])
def test_unused_bits_must_be_zero(form):
    codec = CodecConfig(format=form, block_size=16)
    payload = _valid(codec).copy()  # 273 values: the last byte holds a single code
    payload[-1] |= 0x40
    assert "unused bits" in _read(payload, codec)


@pytest.mark.parametrize("change", ["same", "swapped", "beyond"])
def test_places_out_of_order_or_beyond_the_tensor_are_refused(change):
    codec = CodecConfig(keep_one_in=4, block_size=16)
    payload = _valid(codec).copy()
    places = payload[HEADER.size :][: lay_out(273, codec).places_bytes].view("<u2")
    if change == "same":
        places[1] = places[0]
    elif change == "swapped":
        places[:2] = places[1::-1].copy()
    else:
        places[-1] = 273
    assert "strictly ascending order below 273" in _read(payload, codec)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_another_codecs_payload_is_refused(codec):
    for other in CODECS:
        if other != codec:
            assert _read(_valid(other), codec) is not None


def test_hostile_names_are_cut():
    codec = CodecConfig()
    payloads = encode_tensors({"a": np.ones(3, np.float32)}, codec)
    payloads["\x1b[2J" + "x" * 100_000] = payloads["a"]
    with pytest.raises(UpdateError, match="not agreed") as caught:
        decode_tensors(payloads, {"a": (3,)}, codec)
    assert len(str(caught.value)) < 200
    assert "\x1b" not in str(caught.value)
