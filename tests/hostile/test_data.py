import json
import os

import pytest

from mutirao.data import DataConfig, list_files, prepare_silo, read_folder
from mutirao.errors import DataError, DiskFullError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "raw"
    path.mkdir()
    return path


def read(folder):
    return list(read_folder(folder))


def test_missing_empty_and_unreadable_folders(tmp_path, folder):
    with pytest.raises(DataError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is empty.*\.jsonl"):
        read_folder(folder)
    (folder / "picture.png").write_text("a,b")
    with pytest.raises(DataError, match="1 files of other kinds"):
        read_folder(folder)
    with pytest.raises(DataError, match="is a file"):
        read_folder(folder / "picture.png")


def test_json_that_is_not_utf8_names_file_and_offset(folder):
    name = "a.jsonl"
    first = b'{"text": "fine"}\n'
    (folder / name).write_bytes(first + '{"text": "coração"}\n'.encode("latin-1"))
    offset = len(first) + len('{"text": "cora')
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: byte {offset} is 0xe7"):
        read(folder)


def test_offset_counts_a_byte_order_mark(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="byte 5 is 0xff"):
        read(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "is not JSON"),
        ('{"text": "cut', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["text"]', "is a JSON list"),
        ("3", "is a JSON int"),
        ("{}", "keys none"),
        ('{"question": "x", "label": 1}', "keys label, question"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}', "expected"),
        ('{"text": 5}', "text must be a string"),
        ('{"text": null}', "text must be a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": []}', "messages must be"),
        ('{"messages": ["hi"]}', "each message must be an object"),
        ('{"messages": [{"role": "user"}]}', "content must be a string"),
        ('{"prompt": "p", "choices": [" a"], "answer": 0}', "at least two"),
        ('{"prompt": "p", "choices": [" a", " b"]}', "answer=None"),
        ('{"prompt": "p", "choices": [" a", " b"], "answer": 2}', "answer=2"),
        ('{"prompt": "p", "choices": [" a", " b"], "answer": -1}', "answer=-1"),
        ('{"prompt": "p", "choices": [" a", " b"], "answer": true}', "answer=True"),
        ('{"prompt": "p", "choices": [" a", " b"], "answer": 0, "task": "x"}', "task='x'"),
        (
            '{"prompt": "p", "choices": [" a", " b", " c"], "answer": 0, "task": "outcome"}',
            "two choices",
        ),
    ],
)
def test_bad_line_names_file_and_line(folder, line, message):
    (folder / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2") as caught:
        read(folder)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_without_permission(folder):
    (folder / "a.txt").write_text("text")
    (folder / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        read(folder)


def test_dangling_link_and_directory_named_like_a_file(folder):
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    (folder / "dir.jsonl").mkdir()
    (folder / "a.txt").write_text("text")
    assert [path.name for path in list_files(folder)] == ["a.txt"]


def test_name_that_is_not_utf8_still_gives_a_storable_record(folder):
    with open(os.fsencode(folder) + b"/\xe7.txt", "w") as file:
        file.write("text")
    (record,) = read(folder)
    assert record.model_dump_json().encode("utf-8")


def fill(folder, num=60):
    words = [f"word{i}" for i in range(400)]
    rows = [
        {"text": f"Case {i}: the patient with {words[i]} and {words[-i]} was seen on ward {i}."}
        for i in range(num)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_broken_line_leaves_no_artifact_and_keeps_the_older_one(folder, tmp_path):
    fill(folder)
    out = tmp_path / "out"
    prepare_silo("a", folder, out, DataConfig())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with (folder / "a.jsonl").open("a") as file:
        file.write("broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:61"):
        prepare_silo("a", folder, out, DataConfig())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a.jsonl:1", "start": 0, "end": 4, "type": "NAME", "value": "Eve!"}, "not what"),
        ({"id": "b.jsonl:1", "start": 0, "end": 4, "type": "NAME", "value": "Case"}, "not hold"),
        ({"id": "a.jsonl:1", "start": -4, "end": 4, "type": "NAME", "value": "x"}, ":1 is not"),
        ({"id": "a.jsonl:1"}, ":1 is not"),
    ],
)
def test_lying_truth_is_refused(folder, tmp_path, row, message):
    fill(folder)
    truth = tmp_path / "truth.jsonl"
    truth.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        prepare_silo("a", folder, tmp_path / "out", DataConfig(), injected=truth)
    assert not (tmp_path / "out").exists()


def test_missing_truth_is_refused(folder, tmp_path):
    fill(folder)
    with pytest.raises(DataError, match="cannot be read"):
        prepare_silo("a", folder, tmp_path / "out", DataConfig(), injected=tmp_path / "no.jsonl")


def test_full_disk_is_told_as_such(folder, tmp_path, monkeypatch):
    fill(folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mutirao.data.prepare.redact_record", full)
    with pytest.raises(DiskFullError, match="no room left"):
        prepare_silo("a", folder, tmp_path / "out", DataConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
