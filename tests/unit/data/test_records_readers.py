import json

import pytest
from pydantic import ValidationError

from mutirao.data import Record, folder_sha256, read_folder
from mutirao.data.readers.documents import PIECE_CHARACTERS
from mutirao.errors import DataError


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_every_row_shape_becomes_a_record(tmp_path):
    write_rows(
        tmp_path / "a.jsonl",
        {"text": "plain", "meta": 1},
        {"prompt": "Q: 1+1?", "completion": " 2"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {"prompt": "Best?", "choices": [" A", " B"], "answer": 1},
        {"prompt": "Best?", "choices": [" A", " B"], "answer": 0, "completion": " A. Aspirin"},
        {"prompt": "Ill:", "choices": [" no", " yes"], "answer": 1, "task": "outcome"},
    )
    plain, pair, chat, question, explained, outcome = read_folder(tmp_path)
    assert (plain.text, plain.context_length, plain.task) == ("plain", 0, "text")
    assert (pair.context, pair.completion) == ("Q: 1+1?", " 2")
    assert (chat.context, chat.completion) == ("user: Hi\nassistant:", " Yo")
    assert (question.text, question.context, question.answer) == ("Best? B", "Best?", 1)
    assert question.task == "question"
    assert explained.completion == " A. Aspirin"
    assert explained.choices == (" A", " B")
    assert (outcome.task, outcome.completion) == ("outcome", " yes")
    assert [record.id for record in (plain, outcome)] == ["a.jsonl:1", "a.jsonl:6"]


def test_files_come_in_sorted_order_from_all_folders(tmp_path):
    write_rows(tmp_path / "z.jsonl", {"text": "last"})
    write_rows(tmp_path / "b" / "x.jsonl", {"text": "first"})
    (tmp_path / "c.txt").write_text("middle")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "picture.png").write_text("never")
    assert [record.text for record in read_folder(tmp_path)] == ["first", "middle", "last"]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    content = b'\xef\xbb\xbf\n{"text": "a"}\r\n\n{"text": "b"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    assert [(r.id, r.text) for r in read_folder(tmp_path)] == [
        ("a.jsonl:2", "a"),
        ("a.jsonl:4", "b"),
    ]


def test_long_document_is_split_at_blank_lines_and_loses_no_word(tmp_path):
    paragraphs = [f"p{i} " + "word " * 150 for i in range(30)]
    (tmp_path / "a.md").write_text("\n\n".join(paragraphs))
    records = list(read_folder(tmp_path))
    assert len(records) > 3
    assert all(len(record.text) <= PIECE_CHARACTERS for record in records)
    assert all(record.text.startswith("p") for record in records)
    joined = " ".join(record.text for record in records)
    assert joined.split() == " ".join(paragraphs).split()
    assert records[1].id == "a.md#2"


@pytest.mark.parametrize("unit", ["word ", "sentence. ", "line\n", "x"])
def test_a_paragraph_that_is_too_long_is_cut_and_loses_nothing(tmp_path, unit):
    text = unit * 9000
    (tmp_path / "a.txt").write_text(text)
    pieces = [record.text for record in read_folder(tmp_path)]
    assert all(len(piece) <= PIECE_CHARACTERS for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json\n')
    records = read_folder(tmp_path)
    assert next(records).text == "fine"
    with pytest.raises(DataError):
        next(records)


def test_folder_hash_follows_content_and_names_only(tmp_path):
    write_rows(tmp_path / "a" / "x.jsonl", {"text": "one"})
    write_rows(tmp_path / "b" / "x.jsonl", {"text": "one"})
    same = folder_sha256(tmp_path / "a")
    assert folder_sha256(tmp_path / "b") == same
    (tmp_path / "b" / "x.jsonl").rename(tmp_path / "b" / "y.jsonl")
    assert folder_sha256(tmp_path / "b") != same


@pytest.mark.parametrize(
    "fields",
    [
        {"context_length": 9},
        {"context_length": -1},
        {"choices": (" a", " b")},
        {"choices": (" a", " b"), "answer": 2},
        {"answer": 0},
        {"task": "outcome"},
    ],
)
def test_record_refuses_parts_that_do_not_fit(fields):
    with pytest.raises(ValidationError):
        Record(id="x", source="x", text="short", **fields)


def test_a_row_s_unit_is_kept_as_a_hash_and_falls_back_to_the_record(tmp_path):
    rows = [
        {"text": "a", "unit": "p1"},
        {"text": "b", "patient": "p1"},
        {"text": "c", "patient": 7},
        {"text": "d"},
        {"text": "e", "unit": None, "patient": "p2"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(read_folder(tmp_path))
    assert records[0].unit == records[1].unit != records[2].unit
    assert "p1" not in records[0].unit
    assert records[3].unit == ""
    assert len({record.unit_key for record in records}) == 4
    assert records[3].unit_key.endswith(records[3].id)


@pytest.mark.parametrize("unit", ["", [], {"id": 1}, True, 1.5])
def test_a_unit_that_cannot_be_used_is_refused(tmp_path, unit):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "unit": unit}) + "\n")
    with pytest.raises(DataError, match="unit must be a non-empty string"):
        list(read_folder(tmp_path))
