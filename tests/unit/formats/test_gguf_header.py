"""The GGUF header reader against files that the gguf library writes."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import FLOATS, QUANTIZED, random_rows, write_tiny_gguf

from mutirao.errors import FormatError
from mutirao.formats.gguf_header import MAX_VALUES, TENSOR_TYPES, read_gguf_header

VALUES = {
    "a.u8": ("uint8", 255),
    "a.i8": ("int8", -128),
    "a.u16": ("uint16", 65535),
    "a.i16": ("int16", -32768),
    "a.u32": ("uint32", 2**32 - 1),
    "a.i32": ("int32", -(2**31)),
    "a.u64": ("uint64", 2**64 - 1),
    "a.i64": ("int64", -(2**63)),
    "a.f32": ("float32", 0.25),
    "a.f64": ("float64", 0.1),
    "a.yes": ("bool", True),
    "a.text": ("string", "São Tomé 😀"),
    "a.ints": ("array", [1, -2, 3]),
    "a.floats": ("array", [0.5, -0.25]),
    "a.flags": ("array", [True, False]),
    "a.words": ("array", ["", "ção", "\n"]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    rng = np.random.default_rng(0)
    for name in (*QUANTIZED, *FLOATS):
        rows = random_rows(name, 3, 256, rng)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_kind_of_value_is_read(path: Path) -> None:
    header = read_gguf_header(path)
    expected = {key: value for key, (_, value) in VALUES.items()}
    assert header.metadata == expected | {"general.architecture": "llama"}
    assert type(header.metadata["a.yes"]) is bool
    assert type(header.metadata["a.flags"][0]) is bool
    assert header.version == 3
    assert header.architecture == "llama"


def test_what_is_not_kept_is_stepped_over(path: Path) -> None:
    header = read_gguf_header(path, lambda key: key in ("a.words", "general.architecture"))
    assert header.metadata["a.words"] == ["", "ção", "\n"]
    assert "a.text" not in header.metadata
    assert "a.ints" not in header.metadata
    assert header.metadata["a.i64"] == -(2**63)
    assert header.tensors == read_gguf_header(path).tensors


def test_tensors_lie_where_the_gguf_library_finds_them(path: Path) -> None:
    header = read_gguf_header(path)
    reader = gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert ours.type_name == theirs.tensor_type.name
        assert ours.shape == tuple(int(size) for size in theirs.shape)
        assert (ours.offset, ours.num_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.num_elements == theirs.n_elements


def test_another_alignment(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, np.ones((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    offsets = [tensor.offset for tensor in read_gguf_header(path).tensors.values()]
    assert offsets == [tensor.data_offset for tensor in gguf.GGUFReader(path).tensors]


def test_types_agree_with_the_gguf_library() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == TENSOR_TYPES


def test_an_endless_array_of_numbers_is_refused(tmp_path: Path) -> None:
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + bytes(4)
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(head + key + (MAX_VALUES + 1).to_bytes(8, "little"))
        file.truncate(file.tell() + MAX_VALUES + 1000)
    with pytest.raises(FormatError, match="numbers in its metadata's arrays"):
        read_gguf_header(path)


def test_no_framework_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_tiny_gguf(path)
    script = f"""
import sys
from pathlib import Path
for name in ("torch", "gguf", "transformers", "numpy", "pydantic"):
    sys.modules[name] = None
from mutirao.formats.gguf_header import read_gguf_header
print(len(read_gguf_header(Path({str(path)!r})).tensors))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "20"
