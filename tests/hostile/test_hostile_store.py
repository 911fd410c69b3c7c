"""Weight stores that were altered, cut, or made to lie: refused, or as they were written."""

import errno
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny_gguf

from mutirao.errors import ArtifactError, DiskFullError, FormatError
from mutirao.inference.store import store_index
from mutirao.inference.store.weight_store import WeightStore, store_directory

LIMIT_S = 5.0
BAD_VERSIONS = [0, store_index.VERSION + 1, str(store_index.VERSION), None, [store_index.VERSION]]
FORMATS = {"token_embd": "Q6_K", "blk.0.ffn_up": "Q4_K", "blk.1.attn_q": "F16"}


def quiet(done: int, total: int) -> None:
    """Progress that nobody sees."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.gguf"
    write_tiny_gguf(path, FORMATS)
    return path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WeightStore.build(source, tmp_path_factory.mktemp("store") / "s", quiet).directory


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


def refusal(directory: Path) -> str | None:
    """Why a store is refused, or None; anything but an ArtifactError fails the test."""
    begin, message = time.perf_counter(), None
    try:
        opened = WeightStore.open(directory)
        opened.verify()
    except ArtifactError as error:
        message = str(error)
    assert time.perf_counter() - begin < LIMIT_S
    assert message is None or str(directory) in message
    return message


def rewrite(directory: Path, change: Callable[[Any], object], *, is_signed: bool = True) -> None:
    path = directory / "index.json"
    document = json.loads(path.read_text())
    change(document)
    if is_signed:
        document["sha256"] = store_index._digest(document)
    path.write_text(json.dumps(document))


# --- the index -------------------------------------------------------------------------------


def test_flipped_bits_of_the_index(store: Path) -> None:
    path = store / "index.json"
    content, rng = path.read_bytes(), random.Random(0)
    before = store_index.read_index(store)
    for _ in range(400):
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if refusal(store) is None:  # white space became other white space
            assert json.loads(data) == json.loads(content)
            assert store_index.read_index(store) == before


def test_truncations_of_the_index(store: Path) -> None:
    path = store / "index.json"
    content, rng = path.read_bytes(), random.Random(0)
    for length in [*range(50), *(rng.randrange(len(content)) for _ in range(100))]:
        path.write_bytes(content[:length])
        assert refusal(store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "another program's"),
        (b'{"format": "pt"}', "another program's"),
        (b'{"format": "mutirao weight store"}', "was altered"),
        (b'{"format": "mutirao weight store", "version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"7" * (1 << 26) + b"7", "has more than"),
    ],
)
def test_what_is_no_index(store: Path, content: bytes, message: str) -> None:
    (store / "index.json").write_bytes(content)
    assert message in (refusal(store) or "")


def set_at(*path: Any) -> Callable[[Any, Any], None]:
    def change(document: Any, value: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


LIES = {
    "version": (set_at("version"), BAD_VERSIONS),
    "weights_bytes": (set_at("weights_bytes"), [0, -1, 4096, 2**70, "x", None]),
    "num_checksums": (set_at("num_checksums"), [0, 2**40, -3]),
    "offset": (set_at("tensors", 0, "extents", 0, "offset"), [0, -4096, 4097, 2**63, 1e9, None]),
    "num_bytes": (set_at("tensors", 3, "extents", 1, "num_bytes"), [0, 1, 2**62, -1]),
    "checksums": (set_at("tensors", 3, "extents", 1, "checksums"), [0, 10**9, -1]),
    "kind": (set_at("tensors", 3, "extents", 1, "kind"), ["scales", "bundle", 7]),
    "rows": (set_at("tensors", 1, "num_rows"), [0, 255, 10**12, -1]),
    "columns": (set_at("tensors", 1, "num_columns"), [0, 255, 512]),
    "format": (set_at("tensors", 1, "format"), ["Q4_0", "IQ2_XS", "", None, ["Q8_0"]]),
    "name": (set_at("tensors", 1, "name"), ["blk.9.attn_q", "", None, "token_embd"]),
    "extents": (set_at("tensors", 1, "extents"), [[], None, [1]]),
    "tensors": (set_at("tensors"), [[], None, {}, [7], [{}]]),
    "vectors": (set_at("vectors", "entries", "output_norm.weight"), [[0, 10**9], [-64, 256], 5]),
    "extent": (set_at("vectors", "extent", "num_bytes"), [0, 2**50, -1]),
    "spec": (set_at("spec"), [{}, None, 7, []]),
    "layers": (set_at("spec", "num_layers"), [0, 1, 3, 10**9, "2", None, True]),
    "heads": (set_at("spec", "num_heads"), [0, 3, 8, -4]),
    "vocabulary": (set_at("spec", "vocab_size"), [0, 261, 2**40]),
    "eps": (set_at("spec", "norm_eps"), [0, float("nan"), float("inf"), "1e-5"]),
    "files": (set_at("files"), [None, 7, [], {"index.json": "0"}, {"../x": "0"}, {"a\0b": "0"}]),
    "file": (set_at("files", "tokenizer.json"), ["0" * 64, None, 7]),
    "source": (set_at("source"), [None, 7, "x", []]),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_and_signs_it(store: Path, lie: str) -> None:
    change, values = LIES[lie]
    content = (store / "index.json").read_bytes()
    for value in values:
        (store / "index.json").write_bytes(content)
        rewrite(store, lambda document, value=value: change(document, value))
        assert refusal(store), f"{lie} = {value!r} was believed"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["Q4_K", "F32", "rms", "plane", "blk.0.attn_q"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_other_value_anywhere_in_the_index(
    whole: Path, store: Path, data: st.DataObject
) -> None:
    document = json.loads((whole / "index.json").read_text())
    place: Any = document
    part = None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        part = part or key
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place = inner
    before, place[key] = json.dumps(inner), data.draw(json_values)
    document["sha256"] = store_index._digest(document)
    (store / "index.json").write_text(json.dumps(document))
    if refusal(store) is None and json.dumps(place[key]) != before:
        # What describes the source, a number of the model that shapes nothing, and which
        # other files there are may differ.
        assert part in ("sha256", "source", "spec", "files")


# --- the other files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["weights.bin", "checksums.bin", "tokenizer.json", "tokenizer_config.json"]
)
def test_files_that_are_cut_longer_missing_or_folders(store: Path, name: str) -> None:
    path = store / name
    content = path.read_bytes()
    for data in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
        path.write_bytes(data)
        assert refusal(store)
    path.unlink()
    assert refusal(store)
    path.mkdir()
    assert refusal(store)


@pytest.mark.parametrize("name", ["checksums.bin", "tokenizer.json"])
def test_flipped_bits_of_small_files(store: Path, name: str) -> None:
    path = store / name
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(100):
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert f"{name} was altered" in (refusal(store) or "")


def test_flipped_bits_of_the_weights(store: Path) -> None:
    opened = WeightStore.open(store)
    extents = [extent for tensor in opened.tensors.values() for extent in tensor.extents]
    extents.append(opened.index.layout.vectors_extent)
    rng = random.Random(0)
    with (store / "weights.bin").open("r+b") as file:
        for _ in range(150):
            extent = rng.choice(extents)
            place = extent.offset + rng.randrange(extent.num_bytes)
            file.seek(place)
            was = file.read(1)[0]
            for value in (was ^ 1 << rng.randrange(8), was):
                file.seek(place)
                file.write(bytes([value]))
                file.flush()
                assert bool(refusal(store)) == (value != was)


def test_words_that_changed_places_are_noticed(store: Path) -> None:
    opened = WeightStore.open(store)
    extent = opened.tensors["blk.0.ffn_up"].planes[0]
    words = np.fromfile(store / "weights.bin", "<u8")
    first = extent.offset // 8
    other = first + int(np.flatnonzero(words[first : first + 1000] != words[first])[0])
    words[[first, other]] = words[[other, first]]
    words.tofile(store / "weights.bin")
    assert "plane of blk.0.ffn_up" in (refusal(store) or "")


def test_a_store_cut_after_it_was_opened(store: Path) -> None:
    opened = WeightStore.open(store)
    os.truncate(store / "weights.bin", opened.tensors["blk.1.ffn_up"].extents[0].offset + 100)
    opened.load("blk.0.ffn_up")
    with pytest.raises(ArtifactError, match=r"weights.bin is truncated"):
        opened.load("blk.1.ffn_up")
    os.unlink(store / "weights.bin")
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        opened.load("blk.0.ffn_up")


# --- folders ---------------------------------------------------------------------------------


def test_what_is_no_store(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for path in (file, foreign, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="is not a weight store"):
            WeightStore.open(path)
    for path in (file, foreign):
        with pytest.raises(ArtifactError, match="is not a weight store"):
            WeightStore.build(source, path, quiet)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    WeightStore.build(source, empty, quiet)


def test_a_damaged_store_in_the_cache_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    directory = WeightStore.open_or_build(source, quiet).directory
    assert directory == store_directory(source)
    with (directory / "index.json").open("r+") as file:
        file.write("}")
    with pytest.raises(ArtifactError, match="delete that folder, and it is built again"):
        WeightStore.open_or_build(source, quiet)
    shutil.rmtree(directory)
    WeightStore.open_or_build(source, quiet).verify()


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none.gguf", "empty", "x.gguf", "pipe"):
        with pytest.raises(FormatError, match=name):
            WeightStore.open_or_build(tmp_path / name, quiet)


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"cannot be written: .*MUTIRAO_HOME"):
        WeightStore.build(source, tmp_path / "file" / "s", quiet)


def test_mutated_models_make_a_store_or_an_error(source: Path, tmp_path: Path) -> None:
    content, rng = source.read_bytes(), random.Random(1)
    path, directory = tmp_path / "x.gguf", tmp_path / "s"
    built = 0
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(8000)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        begin, message = time.perf_counter(), None
        try:
            WeightStore.build(path, directory, quiet).verify()
        except FormatError as error:
            message = str(error)
        assert message is None or str(path) in message
        built += message is None
        assert time.perf_counter() - begin < LIMIT_S
        shutil.rmtree(directory, ignore_errors=True)
    assert 0 < built < 150


# --- disks -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room(source: Path, small_disk: Path) -> None:
    (small_disk / "other").write_text("somebody's")
    with pytest.raises(DiskFullError, match=r"no room left to write .*MUTIRAO_HOME"):
        WeightStore.build(source, small_disk / "s", quiet)
    assert sorted(path.name for path in small_disk.iterdir()) == [".s.lock", "other"]


def test_an_older_store_outlives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, directory = tmp_path / "x.gguf", tmp_path / "s"
    write_tiny_gguf(path)
    WeightStore.build(path, directory, quiet)
    write_tiny_gguf(path, seed=1)
    full_at = 3

    def pwrite(*_: Any) -> int:
        nonlocal full_at
        full_at -= 1
        if full_at < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*_)

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFullError):
        WeightStore.build(path, directory, quiet)
    monkeypatch.undo()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".s.lock", "s", "x.gguf"]
    WeightStore.open(directory).verify()


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_disk_that_reserves_no_room(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int | None
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(reason, "not here")

    if reason is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    WeightStore.build(source, tmp_path / "s", quiet)
    assert (tmp_path / "s" / "weights.bin").read_bytes() == (whole / "weights.bin").read_bytes()

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "fstatvfs", lambda _: Full)
    with pytest.raises(DiskFullError):
        WeightStore.build(source, tmp_path / "t", quiet)


def test_short_writes_are_finished(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: real(fd, data[:65537], place))
    WeightStore.build(source, tmp_path / "s", quiet)
    assert (tmp_path / "s" / "weights.bin").read_bytes() == (whole / "weights.bin").read_bytes()


def test_a_source_that_cannot_be_read_to_its_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = os.pread, 0

    def pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 12:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(FormatError, match="cannot be read: Input/output error"):
        WeightStore.build(source, tmp_path / "s", quiet)
    reads = -1000
    monkeypatch.setattr(os, "pread", lambda *args: pread(*args) if args[2] < 100_000 else b"")
    with pytest.raises(FormatError, match="became shorter while it was read"):
        WeightStore.build(source, tmp_path / "t", quiet)
