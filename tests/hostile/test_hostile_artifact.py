"""Artifacts that lie, were altered, or were being written when the machine went away."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mutirao.artifact import MANIFEST_NAME, Manifest, open_artifact, write_artifact, write_atomic
from mutirao.errors import ArtifactError, DiskFullError

CONTENT = {"a.txt": b"some text", "deep/b.bin": bytes(range(64))}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    with write_artifact(path, "data", recipe={"x": 1}, seed=7) as writer:
        for name, content in CONTENT.items():
            target = writer.path / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        writer.metrics["loss"] = 0.5
    return path


def rewrite(artifact: Path, **changes: object) -> None:
    manifest = artifact / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


def opened(artifact: Path) -> Manifest | None:
    """The manifest, or None if refused; any other exception fails the test."""
    try:
        return open_artifact(artifact)
    except ArtifactError as error:
        message = str(error)
    assert str(artifact) in message
    return None


@pytest.mark.parametrize("name", CONTENT)
def test_every_flipped_byte_of_a_file_is_caught(artifact: Path, name: str) -> None:
    for position in range(len(CONTENT[name])):
        data = bytearray(CONTENT[name])
        data[position] ^= 1 << (position % 8)
        (artifact / name).write_bytes(data)
        with pytest.raises(ArtifactError, match="was altered"):
            open_artifact(artifact)


def test_every_flipped_byte_of_the_manifest_is_caught_or_changes_the_hash(artifact: Path) -> None:
    original = open_artifact(artifact)
    manifest = artifact / MANIFEST_NAME
    content = manifest.read_bytes()
    for position in range(len(content)):
        for bit in (0, 6):
            data = bytearray(content)
            data[position] ^= 1 << bit
            manifest.write_bytes(data)
            read = opened(artifact)
            if read is not None and read.sha256 == original.sha256:
                # Only what the hash leaves out, or white space, may differ unnoticed.
                ignored = {"created_at", "metrics"}
                assert read.model_dump(exclude=ignored) == original.model_dump(exclude=ignored)


def test_every_truncation_of_the_manifest_is_caught(artifact: Path) -> None:
    manifest = artifact / MANIFEST_NAME
    content = manifest.read_bytes()
    for length in range(len(content.rstrip())):
        manifest.write_bytes(content[:length])
        assert opened(artifact) is None


@pytest.mark.parametrize("name", CONTENT)
def test_missing_file(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_artifact(artifact)


@pytest.mark.parametrize("size_bytes", [0, 8, 10, -1, 1 << 70])
def test_lying_size(artifact: Path, size_bytes: int) -> None:
    files = json.loads((artifact / MANIFEST_NAME).read_text())["files"]
    rewrite(artifact, files={**files, "a.txt": {**files["a.txt"], "size_bytes": size_bytes}})
    assert opened(artifact) is None


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "{absolute}", "deep/../../secret.txt", "", ".", "a\0b", "x" * 5000, "\ud800"],
)
def test_names_that_leave_the_folder_or_cannot_be(artifact: Path, name: str) -> None:
    from hashlib import sha256

    secret = artifact.parent / "secret.txt"
    secret.write_bytes(b"secret")
    name = name.replace("{absolute}", str(secret))
    entry = {"size_bytes": 6, "sha256": sha256(b"secret").hexdigest()}
    rewrite(artifact, files={name: entry})
    assert opened(artifact) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"schema_version": 2}'],
)
def test_what_is_no_manifest(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST_NAME).write_bytes(content)
    assert opened(artifact) is None


def test_a_nested_manifest_is_a_file_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "outer"
    with write_artifact(path, "data") as writer:
        (writer.path / "inner").mkdir()
        (writer.path / "inner" / MANIFEST_NAME).write_text("{}")
    (path / "inner" / MANIFEST_NAME).write_text("[]")
    assert opened(path) is None


WRITER = """
import sys, time
from pathlib import Path
from mutirao.artifact import write_artifact
with write_artifact(Path(sys.argv[1]), "data") as writer:
    for index in range(int(sys.argv[2])):
        (writer.path / f"{index}.bin").write_bytes(bytes([index % 256]) * 200_000)
        if index == 3:
            print("writing", flush=True)
"""


@pytest.mark.parametrize("has_older", [False, True])
def test_killed_in_mid_write(tmp_path: Path, has_older: bool) -> None:
    target = tmp_path / "artifact"
    rng = random.Random(0)
    if has_older:
        with write_artifact(target, "older") as writer:
            (writer.path / "old.txt").write_text("old")
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(target), "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"writing\n"
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(rng.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
        if has_older:
            assert open_artifact(target).kind == "older"
            assert (target / "old.txt").read_text() == "old"
        else:
            assert not target.exists()


def test_an_exception_leaves_nothing(artifact: Path) -> None:
    def write_half() -> None:
        with write_artifact(artifact, "newer") as writer:
            (writer.path / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert open_artifact(artifact).kind == "data"
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


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


def test_full_disk_write_atomic(small_disk: Path) -> None:
    target = small_disk / "file"
    write_atomic(target, "old")
    with pytest.raises(DiskFullError, match="no room left to write"):
        write_atomic(target, bytes(2_000_000))
    assert target.read_text() == "old"
    assert list(small_disk.iterdir()) == [target]


def test_full_disk_write_artifact(small_disk: Path) -> None:
    def write(num_bytes: int) -> None:
        with write_artifact(small_disk / "artifact", "data") as writer:
            (writer.path / "weights").write_bytes(bytes(num_bytes))

    write(1000)
    with pytest.raises(DiskFullError, match="no room left to write"):
        write(2_000_000)
    assert (small_disk / "artifact" / "weights").stat().st_size == 1000
    open_artifact(small_disk / "artifact")
    assert [path.name for path in small_disk.iterdir()] == ["artifact"]


def test_full_disk_told_by_safetensors(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def write() -> None:
        with write_artifact(small_disk / "artifact", "model") as writer:
            save_file({"a": torch.zeros(500_000)}, writer.path / "model.safetensors")

    with pytest.raises(DiskFullError):
        write()
    assert list(small_disk.iterdir()) == []
