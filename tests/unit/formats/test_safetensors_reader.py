"""The safetensors reader against files that the safetensors library writes, and lying ones."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mutirao.errors import FormatError
from mutirao.formats.safetensors_reader import read_model_tensors, read_safetensors, weight_files

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def write_raw(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_found(path: Path) -> None:
    found = read_safetensors(path)
    assert set(found) == set(TENSORS)
    content = path.read_bytes()
    for name, tensor in TENSORS.items():
        place = found[name]
        assert place.shape == tuple(tensor.shape)
        data = content[place.offset : place.offset + place.num_bytes]
        assert data == tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert found["b.weight"].dtype == "BF16"


def test_shards_are_one_model(tmp_path: Path) -> None:
    places = {}
    for index, (name, tensor) in enumerate(TENSORS.items()):
        shard = f"model-{index}.safetensors"
        save_file({name: tensor}, tmp_path / shard)
        places[name] = shard
    index_path = tmp_path / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": places}))
    found = read_model_tensors(tmp_path)
    assert {name: place.path.name for name, place in found.items()} == places
    assert [file.name for file in weight_files(tmp_path)] == sorted(places.values())

    index_path.write_text(json.dumps({"weight_map": places | {"absent": "model-0.safetensors"}}))
    with pytest.raises(FormatError, match="lacks absent"):
        read_model_tensors(tmp_path)
    index_path.write_text(json.dumps({"weight_map": places | {"c": "model-0.safetensors"}}))
    with pytest.raises(FormatError, match=r"does not place there|lacks c"):
        read_model_tensors(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "", ".", "a/b", "x\0", 7, None, "x" * 300])
def test_a_shard_that_is_no_file_name(tmp_path: Path, shard: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FormatError, match="names no shards"):
        read_model_tensors(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([4], 0, 16)}, bytes(15), "has .* bytes"),
        ({"a": entry([4], 0, 16)}, bytes(17), "has .* bytes"),
        ({"a": entry([4], 0, 12)}, bytes(16), "not the bytes of its shape"),
        ({"a": entry([4], 4, 20)}, bytes(20), "does not lie where another ends"),
        ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16), "does not lie"),
        ({"a": entry([4], 0, 16, "F4")}, bytes(16), "of type F4"),
        ({"a": entry([-4], 0, -16)}, b"", "no proper shape"),
        ({"a": entry([2**62, 4], 0, 0)}, b"", "not the bytes"),
        ({"a": entry([True], 0, 4)}, bytes(4), "no proper shape"),
        ({"a": {"dtype": "F32"}}, bytes(4), "no proper shape"),
        ({"a": {"dtype": ["F32"]}}, bytes(4), "of type"),
        ({"a": 7}, bytes(4), "of type"),
        ([1, 2], b"", "no JSON object"),
        (b'{"a": ' * 100_000, b"", "not the JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}',
            bytes(4),
            "not the JSON",
        ),
        (b"\xff\xfe", b"", "not the JSON"),
    ],
)
def test_lying_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, data)
    with pytest.raises(FormatError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="pickled weights are not read"):
        read_model_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="header is cut"):
        read_model_tensors(tmp_path)


def test_mutations_are_read_or_refused(path: Path) -> None:
    content, rng = path.read_bytes(), random.Random(0)
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for _ in range(2000):
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            found = read_safetensors(path)
        except FormatError:
            refused += 1
        else:
            assert all(0 <= t.offset <= t.offset + t.num_bytes <= len(data) for t in found.values())
            assert sum(t.num_bytes for t in found.values()) == len(data) - header_end
    assert 500 < refused < 2000
    for length in range(header_end):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            read_safetensors(path)
