"""Tensors in files, one at a time: any reader reads them, cut ones are named."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mutirao.errors import ArtifactError
from mutirao.federated.coordinator.state_files import StateFile, writing

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
SHAPES = {name: values.shape for name, values in TENSORS.items()}


def _write(path, order=("empty", "a", "b")):
    with writing(path, SHAPES, "F32") as file:
        for name in order:
            file.write(name, TENSORS[name])


def test_what_is_written_any_safetensors_reader_reads(tmp_path):
    path = tmp_path / "deep" / "state.safetensors"
    _write(path)
    for name, values in load_file(path).items():
        assert (values == TENSORS[name]).all()
        assert values.shape == SHAPES[name]
    file = StateFile(path)
    assert file.names == sorted(TENSORS)
    assert file.shapes == dict(sorted(SHAPES.items()))
    assert all((file.read(name) == TENSORS[name]).all() for name in TENSORS)


def test_the_order_of_writing_does_not_show(tmp_path):
    _write(tmp_path / "one")
    _write(tmp_path / "two", order=("b", "empty", "a"))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_others_wrote_is_read(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(TENSORS, str(path), metadata={"format": "pt"})
    assert (StateFile(path).read("b") == TENSORS["b"]).all()


def test_bytes_are_views_of_the_file(tmp_path):
    path = tmp_path / "change.safetensors"
    with writing(path, {"x": (5,), "none": (0,)}, "U8") as file:
        file.write("x", np.arange(5, dtype=np.uint8))
        file.write("none", np.zeros(0, np.uint8))
    found = StateFile(path).map_bytes("x")
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert not found.flags.owndata
    assert StateFile(path).map_bytes("none").size == 0


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unknown", TENSORS["b"]),
        ("b", TENSORS["b"].reshape(3, 2)),
        ("b", TENSORS["b"].astype(np.float64)),
    ],
)
def test_what_was_not_announced_is_not_written(tmp_path, name, values):
    with pytest.raises(ValueError, match=name), writing(tmp_path / "f", SHAPES, "F32") as file:
        file.write(name, values)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_file_does_not_appear(tmp_path):
    _write(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    with (
        pytest.raises(ValueError, match="not written"),
        writing(tmp_path / "f", SHAPES, "F32") as file,
    ):
        file.write("b", TENSORS["b"])
    assert (tmp_path / "f").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_a_cut_file_is_named(tmp_path, cut):
    _write(tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:cut])
    with pytest.raises(ArtifactError, match="is damaged"):
        StateFile(tmp_path / "f")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
        b'{"x":3}',
        b"[" * 100_000,
    ],
)
def test_a_lying_header_is_named(tmp_path, header):
    content = len(header).to_bytes(8, "little") + header + b"12345678"
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        StateFile(tmp_path / "f")


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    _write(tmp_path / "f")
    file = StateFile(tmp_path / "f")
    for read in (lambda: file.read("other"), lambda: file.map_bytes("b")):
        with pytest.raises(ArtifactError, match="it has no"):
            read()
