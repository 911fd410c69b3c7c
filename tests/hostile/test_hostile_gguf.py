"""Mutated and truncated GGUF files: read, or refused with FormatError, and always quickly."""

import random
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mutirao.errors import FormatError
from mutirao.formats.gguf import check_gguf
from mutirao.formats.gguf_header import GGUFHeader, read_gguf_header

NUM_MUTATIONS = 2000
LIMIT_S = 2.0
"""Of processor time, for a file of a few kilobytes."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "valid.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_uint8("a.b", 1)
    writer.add_float64("a.c", 0.5)
    writer.add_bool("a.d", True)
    writer.add_array("a.e", [1, 2, 3])
    writer.add_token_list(["a", "b", "ção"])
    rng = np.random.default_rng(0)
    for index, kind in enumerate(("Q8_0", "Q4_0", "F32", "F16")):
        values = rng.normal(size=(3, 32)).astype(np.float32)
        quantization = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(values, quantization)
        writer.add_tensor(f"t{index}", packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(path)
    return path.read_bytes()


def is_accepted(path: Path, data: bytes) -> bool:
    """Whether the file is read; anything but a summary or FormatError fails the test."""
    path.write_bytes(data)
    begin = time.process_time()
    try:
        summary = check_gguf(path)
    except FormatError as error:
        summary, message = None, str(error)
    assert time.process_time() - begin < LIMIT_S
    if summary is None:
        assert str(path) in message
        assert len(message) < len(str(path)) + 500
        return False
    assert 0 < summary.num_parameters <= 8 * summary.size_bytes
    check_header(path)
    return True


def check_header(path: Path) -> None:
    """What the reader with all values says of a file must hold, or the file be refused."""
    begin = time.process_time()
    try:
        header = read_gguf_header(path)
    except FormatError as error:
        header, message = None, str(error)
    assert time.process_time() - begin < LIMIT_S
    if header is None:
        assert str(path) in message  # a value that the check steps over is damaged
    else:
        check_places(header, path.stat().st_size)


def check_places(header: GGUFHeader, size_bytes: int) -> None:
    end = 0
    for tensor in sorted(header.tensors.values(), key=lambda each: each.offset):
        assert end <= tensor.offset < tensor.offset + tensor.num_bytes <= size_bytes
        end = tensor.offset + tensor.num_bytes
        assert 1 <= len(tensor.shape) <= 4
    assert all(isinstance(key, str) for key in header.metadata)


def test_every_truncation(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    accepted = [n for n in range(len(valid)) if is_accepted(path, valid[:n])]
    # Only the padding after the last tensor may be missing.
    assert all(n > len(valid) - 32 for n in accepted)


def test_every_byte_of_the_header_at_its_extremes(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    refused = 0
    for position in range(len(valid) - 700):
        for value in (0x00, 0xFF):
            data = bytearray(valid)
            data[position] = value
            refused += not is_accepted(path, bytes(data))
    assert refused > 100


def test_random_mutations(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rng = random.Random(0)
    accepted = 0
    for _ in range(NUM_MUTATIONS):
        data = bytearray(valid)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            begin = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[begin] ^= 1 << rng.randrange(8)
                case 1:
                    data[begin : begin + 8] = rng.randbytes(8)
                case 2:
                    del data[begin : begin + rng.randrange(1, 9)]
                case _:
                    data[begin:begin] = rng.randbytes(rng.randrange(1, 9))
        accepted += is_accepted(path, bytes(data))
    assert 0 < accepted < NUM_MUTATIONS


def test_a_file_of_empty_strings_is_refused_in_time(tmp_path: Path) -> None:
    """Sixty-four megabytes that are one array of eight million empty strings."""
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(head + key + (8_000_000).to_bytes(8, "little"))
        file.truncate(file.tell() + 64_000_000)
    begin = time.perf_counter()
    with pytest.raises(FormatError, match="strings"):
        check_gguf(path)
    assert time.perf_counter() - begin < 30


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_fields_that_lie(valid: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Numbers of the header replaced by others that might hurt: counts, lengths, offsets."""
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.sampled_from((1, 4, 8)))
        place = data.draw(st.integers(4, len(content) - 700))
        extremes = st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(content)))
        value = data.draw(st.one_of(extremes, st.integers(0, 2**64 - 1)))
        content[place : place + width] = (value % 256**width).to_bytes(width, "little")
    is_accepted(tmp_path / "x.gguf", bytes(content))


@pytest.mark.parametrize("kind", [0, 10, 12, 8])
def test_a_file_of_one_huge_array_is_refused_in_time(tmp_path: Path, kind: int) -> None:
    """An array of as many values as the file has room for, of each width."""
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    width = {0: 1, 10: 8, 12: 8, 8: 8}[kind]
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(head + key + kind.to_bytes(4, "little"))
        file.write((8_000_000).to_bytes(8, "little"))
        file.truncate(file.tell() + 8_000_000 * width)
    begin = time.perf_counter()
    with pytest.raises(FormatError, match=r"strings|numbers"):
        read_gguf_header(path)
    assert time.perf_counter() - begin < 30
