"""Wheels that would write elsewhere, are damaged, or do not fit on the disk."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mutirao.errors import ChecksumError, DiskFullError, MutiraoError, SourceError
from mutirao.sources import fetch

NAME = "thing-1-py3-none-any.whl"
FILE = "pypi:thing==1#data/a.txt"
FOLDER = "pypi:thing==1#data/"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """An index on loopback that serves whatever wheel is put under 'wheel', hashed truly."""
    content: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content["wheel"]
            if not self.path.endswith(".whl"):
                sha256 = hashlib.sha256(body).hexdigest()
                name = content.get("name", NAME.encode()).decode()
                entry = {"filename": name, "url": NAME, "hashes": {"sha256": sha256}}
                body = content.get("listing") or json.dumps({"files": [entry]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("MUTIRAO_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    yield content
    server.shutdown()
    thread.join()
    server.server_close()


def make_wheel(*names: str, content: bytes = b"some text " * 20) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


def files_under(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["data/../../escaped.txt", "data//etc.txt", "data/..\\escaped.txt"]
)
def test_names_that_leave_the_folder(serve: dict[str, bytes], tmp_path: Path, name: str) -> None:
    serve["wheel"] = make_wheel("data/a.txt", name)
    with pytest.raises(SourceError, match="unsafe"):
        fetch(FOLDER)
    assert all(path.startswith("home/cache/pypi/thing-1/") for path in files_under(tmp_path))
    assert not any("escaped" in path or "etc" in path for path in files_under(tmp_path))


def test_a_link_comes_out_as_a_plain_file(serve: dict[str, bytes]) -> None:
    link = zipfile.ZipInfo("data/a.txt")
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    serve["wheel"] = buffer.getvalue()
    path = fetch(FILE).path
    assert not path.is_symlink()
    assert path.read_text() == "/etc/passwd"


def test_a_member_that_is_file_and_folder(serve: dict[str, bytes]) -> None:
    serve["wheel"] = make_wheel("data/a.txt", "data/a.txt/b")
    with pytest.raises(SourceError, match="cannot be read"):
        fetch(FOLDER)


@pytest.mark.parametrize("name", ["../thing-1-x.whl", "/tmp/thing-1-x.whl", "thing-1-x/y.whl"])
def test_wheel_name_that_leaves_the_cache(
    serve: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    serve |= {"wheel": make_wheel("data/a.txt"), "name": name.encode()}
    with pytest.raises(SourceError):
        fetch(FILE)
    assert files_under(tmp_path) == {"home/cache/pypi/thing-1/.lock"}


@pytest.mark.parametrize(
    "listing",
    [
        "{",
        "[]",
        "null",
        '{"files": 3}',
        '{"files": [3]}',
        '{"files": [{}]}',
        '{"files": [{"filename": "x.whl", "url": "x.whl"}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl"}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": 7}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": "ftp://x"}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": "http://[", "hashes": {}}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": "thing-1.whl", "hashes": 3}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": "t.whl", "size": "big"}]}',
        '{"files": [{"filename": "thing-1-py3-none-any.whl", "url": "thing-1.whl", "size": -5}]}',
        "[" * 100_000,
    ],
)
def test_absurd_listing(
    serve: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, listing: str
) -> None:
    monkeypatch.setattr("mutirao.sources.download.RETRY_PAUSES_S", ())
    serve |= {"wheel": b"", "listing": listing.encode()}
    with pytest.raises(MutiraoError):
        fetch(FILE)


def test_mutated_wheels(serve: dict[str, bytes]) -> None:
    """Whatever the index hashed and served: the right content, or one of our errors."""
    valid = make_wheel("data/a.txt", "data/b.txt")
    rng = random.Random(0)
    num_refused = 0
    for _ in range(150):
        data = bytearray(valid)
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        serve["wheel"] = bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            content = fetch(FILE).path.read_bytes()
        except (SourceError, ChecksumError):
            num_refused += 1
        else:
            assert content == b"some text " * 20
        shutil.rmtree(Path(os.environ["MUTIRAO_HOME"]))
    assert 10 < num_refused < 150


def test_full_disk(
    serve: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel fits on the disk, what it unpacks to does not; then neither does."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow mounting a tmpfs")
    monkeypatch.setenv("MUTIRAO_HOME", str(disk))
    try:
        serve["wheel"] = make_wheel("data/a.txt", content=bytes(3_000_000))
        assert len(serve["wheel"]) < 100_000
        with pytest.raises(DiskFullError, match="no room left"):
            fetch(FILE)
        kept = {"cache/pypi/thing-1/.lock", f"cache/pypi/thing-1/{NAME}"}
        assert files_under(disk) == kept
        shutil.rmtree(disk / "cache")
        serve["wheel"] = random.Random(0).randbytes(3_000_000)
        with pytest.raises(DiskFullError, match="no room left"):
            fetch(FILE)
        assert files_under(disk) == {"cache/pypi/thing-1/.lock"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
