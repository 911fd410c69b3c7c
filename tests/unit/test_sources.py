"""Sources: their one-line forms, and fetching from a small package index on loopback."""

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mutirao.errors import ChecksumError, DiskFullError, NetworkError, SourceError
from mutirao.sources import (
    FetchedSource,
    GGUFSource,
    HubSource,
    PathSource,
    WheelSource,
    download,
    fetch,
    parse_source,
    sha256_of_folder,
)

MEMBERS = {
    "thing/data/a.jsonl": b'{"text": "a"}\n' * 2000,
    "thing/data/deep/b.jsonl": bytes(range(256)) * 200,
    "thing/data.txt": b"beside",
}
ENTRY = "pypi:Thing_Pack==1.2#thing/data/a.jsonl"
FOLDER = "pypi:Thing_Pack==1.2#thing/data/"
JSON_TYPE = "application/vnd.pypi.simple.v1+json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PIN = f"@sha256:{sha256(MEMBERS['thing/data/a.jsonl'])}"


def make_wheel(members: dict[str, bytes] = MEMBERS) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


class Index:
    """A package index with one wheel, and the ways in which it can misbehave."""

    def __init__(self) -> None:
        self.wheel = make_wheel()
        self.names = ["thing_pack-1.2-py3-none-any.whl"]
        self.requests: list[tuple[str, str | None]] = []
        self.cuts: list[int] = []
        """For each answer to come, after how many bytes the connection breaks."""
        self.failures: list[int] = []
        """Statuses of the answers to come."""
        self.has_ranges = True
        self.has_json = True
        self.published_sha256: str | None = sha256(self.wheel)
        self.published_size: int | None = len(self.wheel)
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        range_header = handler.headers.get("Range")
        self.requests.append((handler.path, range_header))
        if self.failures:
            handler.send_error(self.failures.pop(0))
        elif handler.path == "/simple/thing-pack/":
            assert handler.headers["Accept"] == JSON_TYPE
            self._send(handler, 200, self._listing(), JSON_TYPE if self.has_json else "text/html")
        elif handler.path.startswith("/files/"):
            self._send_wheel(handler, range_header)
        else:
            handler.send_error(404)

    def _listing(self) -> bytes:
        if not self.has_json:
            return b"<html><a href='x.whl'>x.whl</a></html>"
        hashes = {"sha256": self.published_sha256} if self.published_sha256 else {}
        files = [
            {"filename": name, "url": f"../../files/{name}", "hashes": hashes}
            | ({"size": self.published_size} if self.published_size is not None else {})
            for name in ["thing_pack-1.2.tar.gz", *self.names]
        ]
        return json.dumps({"meta": {"api-version": "1.0"}, "files": files}).encode()

    def _send_wheel(self, handler: BaseHTTPRequestHandler, range_header: str | None) -> None:
        begin = 0
        if range_header and self.has_ranges:
            match = re.fullmatch(r"bytes=(\d+)-", range_header)
            assert match
            begin = int(match[1])
        body = self.wheel[begin:]
        self._send(handler, 206 if begin else 200, body, "application/zip")

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        is_cut = self.cuts and kind == "application/zip"
        handler.wfile.write(body[: self.cuts.pop(0)] if is_cut else body)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index()
    monkeypatch.setenv("MUTIRAO_INDEX_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_PAUSES_S", (0.01, 0.01, 0.01))
    yield server
    server.stop()


def cached_files(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("some/folder", PathSource(Path("some/folder"))),
        ("/a:b/c", PathSource(Path("/a:b/c"))),
        ("./pypi:x", PathSource(Path("pypi:x"))),
        ("gguf:models/x.gguf", GGUFSource(Path("models/x.gguf"))),
        ("hf:org/name", HubSource("org/name")),
        ("hf:org/name-2.5@refs/pr/1", HubSource("org/name-2.5", "refs/pr/1")),
        ("pypi:a==1#f/g.txt", WheelSource("a", "1", "f/g.txt")),
        ("pypi:a.b==1.0+l#d/", WheelSource("a.b", "1.0+l", "d/")),
        ("pypi:a==1#f@sha256:" + "AB" * 32, WheelSource("a", "1", "f", "ab" * 32)),
    ],
)
def test_accepted_forms(text: str, expected: object) -> None:
    source = parse_source(text)
    assert source == expected
    assert parse_source(source.text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "a\0b",
        "gguf:",
        "hf:name",
        "hf:org/name@",
        "https://example.org/x",
        "ftp:x",
        "pypi:a",
        "pypi:a==1",
        "pypi:a==1#",
        "pypi:a>=1#f",
        "pypi:a==1#f@sha256:12",
        "pypi:a==1#f@md5:" + "0" * 32,
        "pypi:a==1/../..#f",
        "pypi:../a==1#f",
        "pypi:a==1#../f",
        "pypi:a==1#/etc/passwd",
        "pypi:a==1#x/../../f",
        "pypi:a==1#x//f",
        "pypi:a==1#..\\f",
        "pypi:a==1#/",
    ],
)
def test_malformed_sources(text: str) -> None:
    with pytest.raises(SourceError, match="expected"):
        parse_source(text)


def test_paths(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"abc")
    assert fetch(str(file)) == FetchedSource(file, sha256(b"abc"), str(file))
    assert fetch(f"gguf:{file}").source_text == f"gguf:{file}"
    before = fetch(str(tmp_path)).sha256
    (tmp_path / "y").write_bytes(b"")
    assert fetch(str(tmp_path)).sha256 != before
    with pytest.raises(SourceError, match="is not a file"):
        fetch(f"gguf:{tmp_path}")
    with pytest.raises(SourceError, match="does not exist"):
        fetch(str(tmp_path / "none"))
    with pytest.raises(SourceError, match="did you mean hf:org/name"):
        fetch("org/name")


def test_folder_hash_sees_names_and_contents(tmp_path: Path) -> None:
    seen = set()
    for name, content in (("a", b"1"), ("b", b"1"), ("a", b"2"), ("a/c", b"1")):
        folder = tmp_path / str(len(seen))
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
        seen.add(sha256_of_folder(folder))
    assert len(seen) == 4


@pytest.mark.parametrize("pin", ["", PIN])
def test_file_of_a_wheel(index: Index, home: Path, pin: str) -> None:
    fetched = fetch(ENTRY + pin)
    assert fetched.path.read_bytes() == MEMBERS["thing/data/a.jsonl"]
    assert fetched.sha256 == sha256(MEMBERS["thing/data/a.jsonl"])
    assert fetched.source_text == ENTRY + pin
    assert fetched.path.is_relative_to(home / "cache")
    assert cached_files(home) == ["a.jsonl", index.names[0]]


def test_folder_of_a_wheel(index: Index, home: Path) -> None:
    fetched = fetch(f"{FOLDER}@sha256:{sha256(index.wheel)}")
    assert fetched.sha256 == sha256(index.wheel)
    assert sorted(p.relative_to(fetched.path).as_posix() for p in fetched.path.rglob("*.*")) == [
        "a.jsonl",
        "deep/b.jsonl",
    ]
    assert (fetched.path / "deep/b.jsonl").read_bytes() == MEMBERS["thing/data/deep/b.jsonl"]
    inner = fetch("pypi:Thing_Pack==1.2#thing/data/deep/", offline=True)
    assert [path.name for path in inner.path.iterdir()] == ["b.jsonl"]


def test_second_call_needs_no_network(index: Index) -> None:
    first = [fetch(text) for text in (ENTRY, ENTRY + PIN, FOLDER)]
    index.stop()
    num_requests = len(index.requests)
    assert [fetch(text, offline=True) for text in (ENTRY, ENTRY + PIN, FOLDER)] == first
    assert len(index.requests) == num_requests == 2


@pytest.mark.parametrize("text", [ENTRY, ENTRY + PIN, FOLDER])
def test_altered_cache_is_mended(index: Index, text: str) -> None:
    path = fetch(text).path
    altered = path / "deep/b.jsonl" if path.is_dir() else path
    content = altered.read_bytes()
    altered.write_bytes(content[:-1] + b"x")
    if path.is_dir():
        (path / "extra").write_text("not of the wheel")
    assert fetch(text, offline=True).path == path
    assert altered.read_bytes() == content
    assert not (path.parent / path.name / "extra").exists()


def test_pure_wheel_is_preferred(index: Index, home: Path) -> None:
    pure = index.names[0]
    index.names = [
        "thing_pack-1.2-cp311-cp311-linux_x86_64.whl",
        pure,
        "thing_pack-2-py3-none-any.whl",
    ]
    fetch(ENTRY)
    assert cached_files(home) == ["a.jsonl", pure]


def test_cut_off_download_goes_on(index: Index) -> None:
    index.cuts = [10_000, 20_000]
    assert fetch(ENTRY + PIN).path.is_file()
    assert [span for path, span in index.requests if "files" in path] == [
        None,
        "bytes=10000-",
        "bytes=30000-",
    ]


def test_interrupted_command_goes_on_next_time(index: Index, home: Path) -> None:
    index.cuts = [5000, 0, 0, 0]
    with pytest.raises(NetworkError, match=r"Thing_Pack==1.2 is not in the cache"):
        fetch(ENTRY)
    assert cached_files(home) == [f"{index.names[0]}.part"]
    index.requests.clear()
    fetch(ENTRY)
    assert index.requests[1][1] == "bytes=5000-"
    assert cached_files(home) == ["a.jsonl", index.names[0]]


def test_server_without_ranges(index: Index) -> None:
    index.cuts = [5000]
    index.has_ranges = False
    assert fetch(ENTRY + PIN).path.read_bytes() == MEMBERS["thing/data/a.jsonl"]


def test_stale_part_is_begun_again(
    index: Index, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = home / "cache" / "pypi" / "thing-pack-1.2"
    folder.mkdir(parents=True)
    (folder / f"{index.names[0]}.part").write_bytes(b"of something else")
    with caplog.at_level(logging.WARNING):
        assert fetch(ENTRY + PIN).path.is_file()
    assert "begun again" in caplog.text


def test_index_without_hash_or_size(index: Index) -> None:
    index.published_sha256 = index.published_size = None
    assert fetch(ENTRY + PIN).path.is_file()


def test_passing_failures_are_retried(index: Index) -> None:
    index.failures = [503, 429]
    assert fetch(ENTRY).path.is_file()


def test_wrong_hash_of_the_wheel(index: Index, home: Path) -> None:
    index.published_sha256 = "0" * 64
    with pytest.raises(ChecksumError, match="was removed"):
        fetch(ENTRY)
    assert cached_files(home) == []


@pytest.mark.parametrize("text", [ENTRY, FOLDER])
def test_wrong_pin(index: Index, home: Path, text: str) -> None:
    with pytest.raises(ChecksumError, match=r"pinned: 0000.*was removed from the cache"):
        fetch(f"{text}@sha256:{'0' * 64}")
    assert cached_files(home) == []
    assert ChecksumError.exit_code == 1


def test_wrong_pin_keeps_a_wheel_that_served_before(index: Index, home: Path) -> None:
    fetch(ENTRY + PIN)
    with pytest.raises(ChecksumError):
        fetch(f"{ENTRY}@sha256:{'0' * 64}")
    assert fetch(ENTRY + PIN, offline=True).path.is_file()


def test_missing_member(index: Index) -> None:
    with pytest.raises(SourceError, match=r"near it: .*thing/data/a\.jsonl"):
        fetch("pypi:Thing_Pack==1.2#thing/data/aa.jsonl")
    with pytest.raises(SourceError, match=r"near it: .*thing/data/"):
        fetch("pypi:Thing_Pack==1.2#thing/date/")


def test_missing_package_and_version(index: Index) -> None:
    with pytest.raises(SourceError, match="has no package 'nonesuch'"):
        fetch("pypi:nonesuch==1#f")
    with pytest.raises(SourceError, match=r"no wheel of version 9 \(it has: 1\.2\)"):
        fetch("pypi:Thing_Pack==9#f")


def test_index_that_speaks_only_html(index: Index) -> None:
    index.has_json = False
    with pytest.raises(NetworkError, match="does not answer in JSON"):
        fetch(ENTRY)


def test_refused_by_the_index(index: Index) -> None:
    index.failures = [403]
    with pytest.raises(NetworkError, match="answered 403"):
        fetch(ENTRY)
    assert len(index.requests) == 1  # asking again would not help


def test_server_gone(index: Index, home: Path) -> None:
    index.stop()
    with pytest.raises(
        NetworkError, match=r"could not be downloaded .*MUTIRAO_HOME|copy"
    ) as caught:
        fetch(ENTRY)
    assert str(home / "cache") in str(caught.value)
    assert cached_files(home) == []


def test_offline_asks_nobody(index: Index) -> None:
    for text in (ENTRY, "hf:org/name"):
        with pytest.raises(NetworkError, match="not to be used"):
            fetch(text, offline=True)
    assert index.requests == []


@pytest.mark.parametrize("url", ["file:///opt/simple", "not an address", "ftp://x/y"])
def test_index_of_another_kind(home: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MUTIRAO_INDEX_URL", url)
    with pytest.raises(NetworkError, match="must be an http"):
        fetch(ENTRY)


def test_credentials_of_the_index_are_never_shown(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUTIRAO_INDEX_URL", index.url.replace("http://", "http://me:secret@"))
    for failures in ([403], [404], [500] * 4):
        index.failures = failures
        with pytest.raises((NetworkError, SourceError)) as caught:
            fetch(ENTRY)
        assert "secret" not in str(caught.value)


def test_no_room(index: Index, home: Path) -> None:
    index.published_size = 1 << 60
    with pytest.raises(DiskFullError, match="no room left"):
        fetch(ENTRY)
    assert cached_files(home) == []


def test_two_processes_at_once(index: Index, home: Path) -> None:
    code = "import sys; from mutirao.sources import fetch; print(fetch(sys.argv[1]).sha256)"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, ENTRY + PIN],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        for _ in range(3)
    ]
    answers = [child.communicate(timeout=60)[0].strip() for child in children]
    assert answers == [sha256(MEMBERS["thing/data/a.jsonl"])] * 3
    assert len([path for path, _ in index.requests if "files" in path]) == 1


def test_hub_is_asked_once_and_only_for_plain_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    calls: list[dict[str, object]] = []

    def download_snapshot(repository: str, **options: object) -> str:
        calls.append({"repository": repository, "offline": constants.HF_HUB_OFFLINE, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetched = fetch("hf:org/name@v1")
    assert fetched == FetchedSource(snapshot, sha256_of_folder(snapshot), "hf:org/name@v1")
    assert fetch("hf:org/name@v1", offline=True) == fetched
    assert len(calls) == 1
    assert (calls[0]["repository"], calls[0]["revision"]) == ("org/name", "v1")
    assert calls[0]["offline"] is False
    assert constants.HF_HUB_OFFLINE is True
    patterns = calls[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(end in pattern for pattern in patterns for end in (".bin", ".pt", ".py", "pkl"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LocalEntryNotFoundError", NetworkError),
        ("OfflineModeIsEnabled", NetworkError),
        ("HFValidationError", SourceError),
    ],
)
def test_hub_failures(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: type[Exception]
) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    def fail(*args: object, **options: object) -> str:
        raise getattr(errors, name)("cannot be had")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(expected, match=r"hf:org/name.*cannot be had"):
        fetch("hf:org/name")
    assert constants.HF_HUB_OFFLINE is True
