"""Key derivation and key streams against the RFCs; masks that do not depend on cutting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mutirao.federated.secure.derivation import commit, derive_key, frame, hkdf_sha256
from mutirao.federated.secure.masks import (
    MAX_STREAM_BYTES,
    Mask,
    add_mask,
    key_stream,
    pair_mask,
    self_mask,
)

KEY = bytes(range(32))
CONTEXT = b"c" * 32


def values(key: bytes, start: int, count: int, dtype) -> np.ndarray:
    total = np.zeros(count, dtype)
    add_mask(total, Mask(key, is_added=True), start)
    return total


@pytest.mark.parametrize(  # RFC 8439, appendix A.1, test vectors 1, 2 and 4
    ("key", "block", "expected"),
    [
        (
            bytes(32),
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32),
            1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (
            b"\x00\xff" + bytes(30),
            2,
            "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
            "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
        ),
    ],
)
def test_key_stream_is_chacha20(key, block, expected):
    assert key_stream(key, 64 * block, 64).hex() == expected


@pytest.mark.parametrize(  # RFC 5869, appendix A, test cases 1 and 3
    ("salt", "info", "expected"),
    [
        (
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            None,
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_derivation_is_hkdf_sha256(salt, info, expected):
    derived = hkdf_sha256(b"\x0b" * 22, salt=salt, info=info, num_bytes=42)
    assert derived.hex() == expected


@settings(max_examples=60)
@given(st.integers(0, 400), st.integers(0, 300), st.sampled_from(["<u4", "<u8"]))
def test_a_stretch_is_the_same_however_it_is_reached(start, count, dtype):
    whole = values(KEY, 0, 700, dtype)
    assert (values(KEY, start, count, dtype) == whole[start : start + count]).all()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_cutting_does_not_change_a_mask(lengths):
    pieces, start = [], 0
    for length in lengths:
        pieces.append(values(KEY, start, length, "<u4"))
        start += length
    assert (np.concatenate(pieces) == values(KEY, 0, start, "<u4")).all()


def test_the_last_block_of_a_stream_can_be_reached():
    assert len(key_stream(KEY, MAX_STREAM_BYTES - 64, 64)) == 64
    with pytest.raises(AssertionError):
        key_stream(KEY, MAX_STREAM_BYTES - 63, 64)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_every_byte_of_a_mask_is_uniform(dtype):
    width = np.dtype(dtype).itemsize
    octets = values(derive_key(KEY, b"test"), 0, 100_000, dtype).view(np.uint8).reshape(-1, width)
    for column in octets.T:
        assert chisquare(np.bincount(column, minlength=256)).pvalue > 1e-4


def test_neighbouring_values_and_masks_are_not_correlated():
    mask = values(KEY, 0, 100_000, "<u4").astype(float)
    other = values(derive_key(KEY, b"other"), 0, 100_000, "<u4").astype(float)
    assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 0.015  # 4.7 standard errors
    assert abs(np.corrcoef(mask, other)[0, 1]) < 0.015


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_masks_of_a_pair_cancel(dtype):
    total = np.arange(50, dtype=dtype)
    for site, peer in ((2, 7), (7, 2)):
        add_mask(total, pair_mask(KEY, CONTEXT, site, peer), 13)
    assert (total == np.arange(50)).all()


def test_the_opposite_takes_a_mask_off():
    total = np.arange(50, dtype=np.uint64)
    add_mask(total, self_mask(KEY, CONTEXT), 5)
    assert (total != np.arange(50)).all()
    add_mask(total, self_mask(KEY, CONTEXT).opposite, 5)
    assert (total == np.arange(50)).all()


def test_every_purpose_round_and_pair_has_a_key_of_its_own():
    keys = [
        self_mask(KEY, CONTEXT).key,
        self_mask(KEY, b"d" * 32).key,
        pair_mask(KEY, CONTEXT, 0, 1).key,
        pair_mask(KEY, CONTEXT, 0, 2).key,
        pair_mask(KEY, CONTEXT, 1, 2).key,
        pair_mask(KEY, b"d" * 32, 0, 1).key,
        derive_key(KEY, b"seal", CONTEXT),
        commit(b"seed", KEY, CONTEXT),
    ]
    assert len(set(keys)) == len(keys)
    assert pair_mask(KEY, CONTEXT, 0, 1).key == pair_mask(KEY, CONTEXT, 1, 0).key


def test_parts_cannot_be_moved_over_a_border():
    assert frame(b"ab", b"c") != frame(b"a", b"bc") != frame(b"abc") != frame(b"abc", b"")
