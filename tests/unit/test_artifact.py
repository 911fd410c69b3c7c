"""Artifacts: what is written is what is said of it, its hash, and its lineage."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mutirao.artifact import (
    MANIFEST_NAME,
    canonical_json,
    is_plain_name,
    lineage,
    open_artifact,
    read_manifest,
    sha256_of_file,
    write_artifact,
    write_atomic,
)
from mutirao.errors import ArtifactError


def make(path: Path, text: str = "text", **options: object) -> Path:
    with write_artifact(path, "data", recipe={"text": text}) as writer:
        (writer.path / "a.txt").write_text(text)
        for role, parent in options.items():
            assert isinstance(parent, Path)
            writer.add_parent(role, parent)
    return path


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "x", "model", recipe={"rank": 8}, seed=3) as writer:
        (writer.path / "deep").mkdir()
        (writer.path / "deep" / "w.bin").write_bytes(b"abc")
        writer.metrics["loss"] = 1.5
        writer.add_source("data", "hf:org/name", "0" * 64)
    manifest = open_artifact(tmp_path / "x", "model")
    assert (manifest.kind, manifest.seed, manifest.recipe) == ("model", 3, {"rank": 8})
    assert manifest.metrics == {"loss": 1.5}
    assert manifest.files.keys() == {"deep/w.bin"}
    assert manifest.files["deep/w.bin"].size_bytes == 3
    assert manifest.files["deep/w.bin"].sha256 == hashlib.sha256(b"abc").hexdigest()
    assert manifest.parents["data"].source == "hf:org/name"
    assert json.loads((tmp_path / "x" / MANIFEST_NAME).read_text())["schema_version"] == 1


def test_hash_is_of_what_was_made_not_of_when_or_how_well(tmp_path: Path) -> None:
    first = read_manifest(make(tmp_path / "x"))
    later = first.model_copy(update={"created_at": "later", "metrics": {"loss": 1}})
    assert later.sha256 == first.sha256 == read_manifest(make(tmp_path / "y")).sha256
    assert read_manifest(make(tmp_path / "z", "other")).sha256 != first.sha256
    for field, value in (("kind", "other"), ("seed", 1), ("recipe", {}), ("code_version", "x")):
        assert first.model_copy(update={field: value}).sha256 != first.sha256


def test_older_artifact_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    make(tmp_path / "x", "old")
    make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_wrong_kind_and_no_manifest(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"holds 'data' \(expected 'model'\)"):
        open_artifact(tmp_path / "x", "model")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ArtifactError, match="is not a finished artifact"):
            open_artifact(path)


def test_other_schema_version(tmp_path: Path) -> None:
    manifest = make(tmp_path / "x") / MANIFEST_NAME
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "schema_version": 2}))
    with pytest.raises(ArtifactError, match="schema version 2"):
        open_artifact(tmp_path / "x")


def test_lineage_follows_parents_to_sources(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "base", "model") as writer:
        writer.add_source("weights", "hf:org/name", "0" * 64)
    make(tmp_path / "run" / "middle", base=tmp_path / "base")
    make(tmp_path / "run" / "top", "top", middle=tmp_path / "run" / "middle")
    shutil.move(tmp_path / "run", tmp_path / "base2")
    rows = lineage(tmp_path / "base2" / "top")
    assert [(depth, role) for depth, role, _, _ in rows] == [
        (0, "top"),
        (1, "middle"),
        (2, "base"),
        (3, "weights"),
    ]
    manifests = [manifest for *_, manifest in rows]
    assert all(manifest is not None for manifest in manifests[:3])
    assert manifests[3] is None


def test_lineage_tells_a_parent_that_is_no_longer_the_same(tmp_path: Path) -> None:
    make(tmp_path / "base", "old")
    make(tmp_path / "top", "top", base=tmp_path / "base")
    make(tmp_path / "base", "new")
    assert lineage(tmp_path / "top")[1][3] is None
    shutil.rmtree(tmp_path / "base")
    assert lineage(tmp_path / "top")[1][3] is None


def test_parent_must_be_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a finished artifact"):
        make(tmp_path / "top", base=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_write_atomic(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, "ção")
    assert path.read_bytes() == "ção".encode()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert sha256_of_file(path) == hashlib.sha256(b"new").hexdigest()
    assert list(path.parent.iterdir()) == [path]


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, None], "a": "ç"}) == '{"a":"ç","b":[1,null]}'.encode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", True), ("a/b.c", True), ("..a/b..", True), ("../a", False), ("a/../b", False)]
    + [(name, False) for name in ("", "/a", "a/", "a//b", ".", "./a", "a\0")],
)
def test_plain_names(name: str, expected: bool) -> None:
    assert is_plain_name(name) is expected
