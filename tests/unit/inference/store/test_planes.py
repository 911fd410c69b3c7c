"""Bit planes against the gguf library, and against the layout written out number by number."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import FLOATS, QUANTIZED, SPLITS, block_bytes, random_rows

from mutirao.errors import FormatError, ShapeError
from mutirao.inference.store.planes import (
    FORMATS,
    dequantize,
    num_panels,
    pack,
    plane_panel_bytes,
    row_bytes,
    scales_panel_bytes,
    unpack,
    unpack_codes,
    unpack_scales,
)

WIDTHS = {4: (2, 1, 1), 5: (2, 1, 1, 1), 6: (2, 1, 1, 2), 8: (2, 1, 1, 2, 2)}


def with_unit_scales(raw, name):
    """Blocks whose every weight is its code, less what stands for zero."""
    blocks = raw.reshape(len(raw), -1, block_bytes(name)[1]).copy()
    one = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    if name == "Q6_K":
        blocks[..., 192:208] = 1
        blocks[..., 208:210] = one
        return blocks.reshape(len(raw), -1)
    blocks[..., :2] = one
    if name.endswith(("_1", "_K")):
        blocks[..., 2:4] = 0
    if name.endswith("_K"):
        blocks[..., 4:16] = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    return blocks.reshape(len(raw), -1)


def codes_by_gguf(raw, name):
    values = gguf.dequantize(with_unit_scales(raw, name), gguf.GGMLQuantizationType[name])
    return (values + FORMATS[name].code_offset).astype(np.uint8)


def scales_by_ggml(block, name):
    """One block's (scale, minimum) per number, as ggml's C code reads them."""
    size = block_bytes(name)[0]
    half = block.view(np.float16) if name != "Q6_K" else block[208:].view(np.float16)
    d = np.float32(half[0])
    if name in ("Q4_0", "Q5_0", "Q8_0"):
        return np.full(size, d), np.zeros(size, np.float32)
    if name in ("Q4_1", "Q5_1"):
        return np.full(size, d), np.full(size, np.float32(half[1]))
    if name == "Q6_K":
        return np.repeat(d * block[192:208].view(np.int8).astype(np.float32), 16), np.zeros(256)
    q, scale, minimum = block[4:16].astype(int), [], []
    for j in range(8):  # get_scale_min_k4 of ggml-quants.c
        if j < 4:
            scale.append(q[j] & 63)
            minimum.append(q[j + 4] & 63)
        else:
            scale.append((q[j + 4] & 15) | ((q[j - 4] >> 6) << 4))
            minimum.append((q[j + 4] >> 4) | ((q[j] >> 6) << 4))
    scale = d * np.array(scale, np.float32)
    minimum = np.float32(half[1]) * np.array(minimum, np.float32)
    return np.repeat(scale, 32), np.repeat(-minimum, 32)


def test_table_agrees_with_the_gguf_library():
    assert set(FORMATS) == {*QUANTIZED, *FLOATS, *SPLITS}
    for name in (*QUANTIZED, *FLOATS):
        form = FORMATS[name]
        assert (form.block_columns, form.block_bytes) == block_bytes(name)
        assert sum(form.plane_widths) == form.bits
        if name in QUANTIZED:
            assert form.plane_widths == WIDTHS[form.bits]


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS, "F16_SPLIT"])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_any_bytes_come_back(name, num_rows, num_blocks, seed):
    num_columns = 256 * num_blocks
    size = row_bytes(name, num_columns)
    raw = np.random.default_rng(seed).integers(0, 256, (num_rows, size), np.uint8)
    scales, planes = pack(raw.tobytes(), name, num_rows, num_columns)
    assert unpack(scales, planes, name, num_rows, num_columns) == raw.tobytes()
    flat = [plane.tobytes() for plane in planes]
    assert unpack(scales.tobytes(), flat, name, num_rows, num_columns) == raw.tobytes()
    panels = num_panels(num_rows)
    assert scales.nbytes == panels * scales_panel_bytes(name, num_columns)
    expected = [panels * size for size in plane_panel_bytes(name, num_columns)]
    assert [plane.nbytes for plane in planes] == expected
    more = num_columns // 32 if name == "F16_SPLIT" else 0
    assert scales.nbytes + sum(expected) == panels * 16 * (size + more)


@pytest.mark.parametrize("name", FLOATS)
def test_float_formats_take_any_number_of_columns(name):
    rng = np.random.default_rng(0)
    raw = random_rows(name, 17, 5, rng)
    scales, planes = pack(raw, name, 17, 5)
    assert unpack(scales, planes, name, 17, 5) == raw.tobytes()
    width = FORMATS[name].block_bytes
    expected = np.zeros((2, 5, 16, width), np.uint8)
    for row in range(17):
        expected[row // 16, :, row % 16] = raw[row].reshape(5, width)
    np.testing.assert_array_equal(planes[0], expected.reshape(2, 5, 16 * width))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 256), (16, 512), (37, 768)])
def test_all_planes_are_the_weights_that_the_gguf_library_reads(name, num_rows, num_columns):
    raw = random_rows(name, num_rows, num_columns, np.random.default_rng(num_rows))
    kind = gguf.GGMLQuantizationType[name.removesuffix("_SPLIT")]
    expected = gguf.dequantize(raw, kind).astype(np.float32)
    scales, planes = pack(raw, name, num_rows, num_columns)
    weights = dequantize(scales, planes, name, num_rows, num_columns)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_planes_hold_the_bits_where_the_layout_says(name):
    num_rows, num_columns = 19, 256
    raw = random_rows(name, num_rows, num_columns, np.random.default_rng(3))
    codes = np.zeros((32, num_columns), int)
    codes[:num_rows] = codes_by_gguf(raw, name)
    shift = FORMATS[name].bits
    for plane, width in zip(
        pack(raw, name, num_rows, num_columns)[1], FORMATS[name].plane_widths, strict=True
    ):
        shift -= width
        expected = np.zeros((2, num_columns // 32, width, 64), int)
        for row in range(32):  # rows 19 to 31 are padding: zero codes
            for column in range(num_columns):
                j, i = divmod(column % 32, 4)
                line, place = divmod(j, 8 // width)
                bits = codes[row, column] >> shift & (2**width - 1)
                byte = (row // 16, column // 32, line, 4 * (row % 16) + i)
                expected[byte] |= bits << (place * width)
        np.testing.assert_array_equal(plane, expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_lie_where_the_layout_says(name):
    num_rows, num_columns = 19, 512
    raw = random_rows(name, num_rows, num_columns, np.random.default_rng(4))
    size, num_bytes = block_bytes(name)
    blocks = np.zeros((32, num_columns // size, num_bytes), np.uint8)
    blocks[:num_rows] = raw.reshape(num_rows, -1, num_bytes)
    scales, _ = pack(raw, name, num_rows, num_columns)
    for panel in range(2):
        for group in range(num_columns // size):
            rows = blocks[16 * panel : 16 * panel + 16, group]
            stored = scales[panel, group]
            place = 208 if name == "Q6_K" else 0
            assert stored[:32].tobytes() == rows[:, place : place + 2].tobytes()
            if name == "Q6_K":
                expected = rows[:, 192:208].T
                np.testing.assert_array_equal(stored[32:].reshape(16, 16), expected)
            elif name not in ("Q4_0", "Q5_0", "Q8_0"):
                assert stored[32:64].tobytes() == rows[:, 2:4].tobytes()
            if name in ("Q4_K", "Q5_K"):
                check_six_bit_values(rows, stored[64:192].astype(int), stored[192:].astype(int))


def check_six_bit_values(rows, low, high):
    for lane, block in enumerate(rows):
        unit = block.copy()
        unit[:4] = np.array([1, 1], np.float16).view(np.uint8)
        scale, minimum = scales_by_ggml(unit, "Q4_K")
        for i, value in enumerate([*scale[::32], *-minimum[::32]]):
            e = 16 * i + lane
            bits = low[e % 128] >> (4 * (e // 128)) & 15
            assert bits | (high[e % 64] >> (2 * (e // 64)) & 3) << 4 == int(value)


@pytest.mark.parametrize("name", QUANTIZED)
def test_fewer_planes_read_as_the_middle_of_what_was_dropped(name):
    num_rows, num_columns = 18, 512
    raw = random_rows(name, num_rows, num_columns, np.random.default_rng(5))
    blocks = raw.reshape(-1, block_bytes(name)[1])
    pairs = [scales_by_ggml(block, name) for block in blocks]
    scale, minimum = (
        np.reshape(part, (num_rows, num_columns)) for part in zip(*pairs, strict=True)
    )
    codes = codes_by_gguf(raw, name).astype(int)
    scales, planes = pack(raw, name, num_rows, num_columns)
    form = FORMATS[name]
    for num_planes in range(len(planes) + 1):
        dropped = sum(form.plane_widths[num_planes:])
        middle = (codes >> dropped << dropped) + (2**dropped - 1) / 2
        expected = scale * (middle - form.code_offset).astype(np.float32) + minimum
        weights = dequantize(scales, planes[:num_planes], name, num_rows, num_columns)
        np.testing.assert_array_equal(weights, expected.astype(np.float32))
        kept = unpack_codes(planes[:num_planes], name, num_rows, num_columns)
        np.testing.assert_array_equal(kept, codes >> dropped << dropped)


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_and_codes_make_the_weights(name):
    raw = random_rows(name, 5, 256, np.random.default_rng(6))
    scales, planes = pack(raw, name, 5, 256)
    form = FORMATS[name]
    scale, minimum = unpack_scales(scales, name, 5, 256)
    assert scale.shape == (5, 256 // form.scale_columns)
    assert (minimum is not None) == (form.code_offset == 0)
    codes = unpack_codes(planes, name, 5, 256).astype(np.float32) - form.code_offset
    weights = codes * np.repeat(scale, form.scale_columns, axis=1)
    if minimum is not None:
        weights += np.repeat(minimum, form.scale_columns, axis=1)
    np.testing.assert_array_equal(weights, dequantize(scales, planes, name, 5, 256))


def test_scales_that_are_not_finite_are_not_an_error():
    blocks = np.full((1, 18), 255, np.uint8)
    weights = dequantize(*pack(blocks, "Q4_0", 1, 32), "Q4_0", 1, 32)
    assert np.isnan(weights).all()


@pytest.mark.parametrize("name", ["Q2_K", "IQ4_XS", "Q4_X", ""])
def test_other_formats_are_refused(name):
    with pytest.raises(FormatError, match="expected one of F32, F16, BF16, Q4_0"):
        pack(b"", name, 0, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"288 columns .expected a multiple of 256"):
        pack(b"", "Q4_K", 0, 288)
    with pytest.raises(ShapeError, match=r"have 17 bytes .expected 18"):
        pack(bytes(17), "Q4_0", 1, 32)
    scales, planes = pack(bytes(18), "Q4_0", 1, 32)
    with pytest.raises(ShapeError, match=r"has 3 planes .got 2"):
        unpack(scales, planes[:2], "Q4_0", 1, 32)
    with pytest.raises(ShapeError, match=r"has 3 planes .got 4"):
        dequantize(scales, [*planes, planes[0]], "Q4_0", 1, 32)
    with pytest.raises(ShapeError, match="plane 1 of Q4_0 have 128 bytes"):
        dequantize(scales, [planes[0], planes[0]], "Q4_0", 1, 32)
    with pytest.raises(ShapeError, match="scales of Q4_0"):
        dequantize(scales[..., 1:], planes, "Q4_0", 1, 32)
    with pytest.raises(FormatError, match="F16 has no codes"):
        unpack_codes([], "F16", 1, 32)
