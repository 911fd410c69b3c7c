"""The update codec: exact sizes, bounded error, and refusal of what is malformed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mutirao.errors import UpdateError
from mutirao.federated.codec import BLOCK_SIZE, EncodedUpdate, decode_update, encode_update

VALUES = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 1000), elements=VALUES))
def test_error_is_at_most_half_a_step_of_the_block(vector):
    update = encode_update(vector)
    decoded = decode_update(update, vector.size)
    steps = np.repeat(update.scales, BLOCK_SIZE)[: vector.size].astype(np.float64)
    error = np.abs(decoded.astype(np.float64) - vector)
    assert (error <= steps * 0.5 * (1 + 1e-4) + 1e-30).all()


def test_largest_value_of_a_block_is_kept():
    vector = np.linspace(-1, 1, BLOCK_SIZE, dtype=np.float32)
    decoded = decode_update(encode_update(vector), vector.size)
    assert decoded[0] == pytest.approx(-1, rel=1e-6)
    assert decoded[-1] == pytest.approx(1, rel=1e-6)


def test_tiny_updates_do_not_vanish():
    vector = np.full(300, 1e-9, np.float32)
    assert decode_update(encode_update(vector), 300) == pytest.approx(vector, rel=1e-2)


def test_bytes_are_one_per_value_and_four_per_block():
    update = encode_update(np.ones(1000, np.float32))
    assert update.num_bytes == 1000 + 4 * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_update_does_not_leave(bad):
    with pytest.raises(UpdateError, match="not finite"):
        encode_update(np.array([0.0, bad], np.float32))


def _good():
    return encode_update(np.arange(600, dtype=np.float32))


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (lambda u: u.codes[:-1], lambda u: u.scales),
        (lambda u: u.codes, lambda u: u.scales[:-1]),
        (lambda u: u.codes.astype(np.int16), lambda u: u.scales),
        (lambda u: u.codes, lambda u: u.scales.astype(np.float64)),
        (lambda u: u.codes.reshape(2, -1), lambda u: u.scales),
        (lambda u: u.codes, lambda u: -u.scales),
        (lambda u: u.codes, lambda u: u.scales * np.float32(np.nan)),
        (lambda u: u.codes, lambda u: u.scales * np.float32(np.inf)),
        (lambda u: u.codes, lambda u: np.full_like(u.scales, 3e38)),
    ],
)
def test_malformed_update_is_refused(codes, scales):
    good = _good()
    with pytest.raises(UpdateError):
        decode_update(EncodedUpdate(codes(good), scales(good)), 600)


def test_hash_names_the_content():
    good = _good()
    altered = EncodedUpdate(good.codes.copy(), good.scales)
    altered.codes[3] += 1
    assert good.sha256 == _good().sha256 != altered.sha256
