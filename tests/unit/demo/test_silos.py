import json

import pytest

from mutirao.data import DataConfig, prepare_silo, read_folder
from mutirao.demo.silos import (
    SILO_NAMES,
    exam_row,
    last_sentences,
    make_notes,
    pubmedqa_row,
    write_default_silos,
)
from mutirao.errors import DataError

EXAM = {
    "question": "Which drug lowers blood pressure in a man of {} years with {}?",
    "options": "A. Aspirin\nB. Lisinopril\nC. Penicillin\nD. Insulin",
    "answer": "B. Lisinopril",
}
ILLNESSES = ["asthma", "gout", "angina", "anaemia", "migraine", "psoriasis", "fever", "scurvy"]


def exam(i):
    question = EXAM["question"].format(30 + i, ILLNESSES[i % 8]) + f" Case {i * 7919 % 1000}."
    return {**EXAM, "question": question}


def abstract(i):
    return {
        "question": f"does exercise number {i} help {ILLNESSES[i % 8]}?",
        "passage": f"Context (1): We studied {i} people with {ILLNESSES[i % 8]}.\n"
        "Context (2): Half of them trained each day. They felt better than the others did.\n",
        "answer": ("yes", "no", "maybe")[i % 3],
    }


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "source"
    return {
        "medqa": write(source / "medqa.jsonl", [exam(i) for i in range(30)]),
        "medmcqa": write(source / "mcq" / "Skin.jsonl", [exam(i) for i in range(30, 60)]).parent,
        "pubmedqa-expert": write(source / "l.jsonl", [abstract(i) for i in range(15)]),
        "pubmedqa-automatic": write(source / "a.jsonl", [abstract(i) for i in range(15, 30)]),
    }


def test_three_silos_are_written_and_can_be_prepared(files, tmp_path):
    out = tmp_path / "silos"
    counts = write_default_silos(out, files, 4, num_notes=10, num_patients=30)
    assert tuple(counts) == SILO_NAMES
    for name in SILO_NAMES:
        assert counts[name]["num_questions"] == 30
        assert counts[name]["num_unresolved"] == 0
        truth = out / "truth" / f"{name}.jsonl"
        config = DataConfig(heldout_share=0.2)
        report = prepare_silo(name, out / name, tmp_path / name, config, injected=truth)
        assert report.num_records_in == 70
        injected = report.injected
        assert injected is not None
        assert sum(item.num for item in injected.values()) == counts[name]["num_identifiers"]
        assert injected["NAME"].caught == 0
        assert injected["EMAIL"].caught == injected["EMAIL"].num > 0


def test_same_seed_gives_the_same_bytes(files, tmp_path):
    for name in ("one", "two"):
        write_default_silos(tmp_path / name, files, 4, num_notes=10, num_patients=10)
    write_default_silos(tmp_path / "other", files, 5, num_notes=10, num_patients=10)

    def content(name):
        root = tmp_path / name
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert content("one") == content("two")
    assert content("one") != content("other")


@pytest.mark.parametrize("locale", ["en_US", "pt_BR"])
def test_truth_stands_where_it_says(locale, tmp_path):
    notes, truth = make_notes(["Question: What helps?\nA. x\nAnswer:"], 20, locale, seed=1)
    write(tmp_path / "notes-synthetic.jsonl", notes)
    records = {record.id: record for record in read_folder(tmp_path)}
    assert len(records) == 20
    for item in truth:
        assert records[item["id"]].text[item["start"] : item["end"]] == item["value"]
    types = {item["type"] for item in truth}
    assert {"NAME", "EMAIL", "PHONE"} <= types
    assert ("CPF" in types) == (locale == "pt_BR")
    assert ("SSN" in types) == (locale == "en_US")
    assert all("What helps?" in record.text for record in records.values())


def test_exam_row_resolves_the_answer_to_an_option():
    row = exam_row({**exam(1), "options": EXAM["options"] + '\n"'})
    assert row is not None
    assert row["choices"] == [" A", " B", " C", " D"]
    assert row["answer"] == 1
    assert row["completion"] == " B. Lisinopril"
    assert row["prompt"].endswith("D. Insulin\nAnswer:")
    assert exam_row({**exam(1), "answer": "E. None"}) is None


def test_pubmedqa_row_has_no_labels_and_a_capital():
    row = pubmedqa_row(abstract(1))
    assert row is not None
    assert "Context (" not in row["prompt"]
    assert "\nQuestion: Does exercise" in row["prompt"]
    assert (row["choices"][row["answer"]], row["completion"]) == (" no", " no")
    assert pubmedqa_row({**abstract(1), "answer": "unknown"}) is None


def test_last_sentences_keeps_whole_sentences_from_the_end():
    text = "First one is here. Second one follows. Third ends."
    assert last_sentences(text, 100) == text
    assert last_sentences(text, 40) == "Second one follows. Third ends."
    assert last_sentences(text, 20) == "Third ends."
    assert len(last_sentences("word " * 100, 30)) <= 30


@pytest.mark.parametrize("content", ["not json\n", '{"question": 3}\n', '["x"]\n', ""])
def test_broken_source_is_a_data_error(files, tmp_path, content):
    files["medqa"].write_text(content)
    with pytest.raises(DataError, match=r"fetch"):
        write_default_silos(tmp_path / "silos", files, 0)


def test_missing_source_is_a_data_error(files, tmp_path):
    files["medqa"].unlink()
    with pytest.raises(DataError, match="cannot be read"):
        write_default_silos(tmp_path / "silos", files, 0)
