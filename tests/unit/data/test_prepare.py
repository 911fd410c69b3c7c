import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from mutirao.artifact import open_artifact
from mutirao.data import DataConfig, load_records, load_report, prepare_silo
from mutirao.data.config import IdentifierConfig
from mutirao.data.identifiers.search import find_identifiers
from mutirao.data.prepare import redact_record
from mutirao.data.records import Record
from mutirao.errors import ArtifactError, DataError

TOPICS = ["fever", "chest pain", "a dry cough", "back pain", "fatigue", "a rash", "nausea"]
PLACES = ["clinic", "ward", "emergency room", "surgery", "school", "office", "village", "port"]


def notes(num):
    return [
        f"Case {i}: the patient came to the {PLACES[i % 8]} with {TOPICS[i % 7]} after {i} days "
        f"and was sent home with treatment number {i * 37 % 101}."
        for i in range(num)
    ]


@pytest.fixture
def silo(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [{"text": text} for text in notes(60)]
    rows[3]["text"] += " Call 202-555-0143 or write to ana@example.org."
    rows.append({"text": rows[5]["text"].upper()})
    rows.append({"text": "pain " * 30})
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CONFIG = DataConfig(heldout_share=0.2)


def test_counts_add_up_and_files_hold_what_the_report_says(silo, tmp_path):
    report = prepare_silo("a", silo, tmp_path / "out", CONFIG)
    assert report.num_records_in == 62
    assert report.num_kept + sum(report.dropped.values()) == 62
    assert report.dropped["exact duplicate"] == 1
    assert report.identifiers == {"EMAIL": 1, "PHONE": 1}
    assert "NOT removed" in report.notice
    train = load_records(tmp_path / "out", "train")
    heldout = load_records(tmp_path / "out", "heldout")
    assert (len(train), len(heldout)) == (report.num_train, report.num_heldout)
    assert len(heldout) > 0
    assert not {r.id for r in train} & {r.id for r in heldout}
    everything = "".join(record.text for record in train + heldout)
    assert len(everything.encode()) == report.num_bytes_kept
    assert "ana@example.org" not in everything
    assert "[EMAIL]" in everything
    manifest = open_artifact(tmp_path / "out", "data")
    assert manifest.recipe["heldout_share"] == 0.2
    assert manifest.parents["raw text"].source == "a: folder raw"
    assert load_report(tmp_path / "out") == report


def test_same_input_gives_the_same_artifact(silo, tmp_path):
    prepare_silo("a", silo, tmp_path / "one", CONFIG)
    prepare_silo("a", silo, tmp_path / "two", CONFIG)
    hashes = {open_artifact(tmp_path / name, "data").sha256 for name in ("one", "two")}
    assert len(hashes) == 1


def test_share_caught_counts_whole_covers_of_kept_records_only(silo, tmp_path):
    row = json.loads((silo / "notes.jsonl").read_text().splitlines()[3])["text"]

    def item(id_, value, type_, text=row):
        start = text.index(value)
        return {"id": id_, "start": start, "end": start + len(value), "type": type_, "value": value}

    truth = [
        item("notes.jsonl:4", "202-555-0143", "PHONE"),
        item("notes.jsonl:4", "ana@example.org.", "EMAIL"),  # one character wider than found
        item("notes.jsonl:4", "patient", "NAME"),
        item("notes.jsonl:62", "pain", "NAME", "pain " * 30),  # dropped before the search
    ]
    path = tmp_path / "truth.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in truth))
    report = prepare_silo("a", silo, tmp_path / "out", CONFIG, injected=path)
    counts = {name: (item.num, item.caught) for name, item in (report.injected or {}).items()}
    assert counts == {"PHONE": (1, 1), "EMAIL": (1, 0), "NAME": (1, 0)}


def test_boundary_moves_with_redaction():
    context, completion = "Phone of ana@x.org, tel:", " 202-555-0143 is it"
    record = Record(id="x", source="x", text=context + completion, context_length=len(context))
    clean = redact_record(record, find_identifiers(record.text))
    assert clean.context == "Phone of [EMAIL], tel:"
    assert clean.completion == " [PHONE] is it"


def test_identifier_across_the_boundary_goes_on_both_sides():
    context, completion = "CPF 123.456.", "789-09 consta"
    record = Record(id="x", source="x", text=context + completion, context_length=len(context))
    clean = redact_record(record, find_identifiers(record.text))
    assert (clean.context, clean.completion) == ("CPF [CPF]", "[CPF] consta")


def test_excerpts_are_redacted_and_short(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    bad = "mail ana@example.org now " * 20
    rows = [*notes(40), bad, "zz " + bad]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    report = prepare_silo("a", folder, tmp_path / "out", CONFIG)
    excerpts = [text for texts in report.examples_dropped.values() for text in texts]
    assert excerpts
    assert all("ana@" not in text and len(text) <= 125 for text in excerpts)


def test_nothing_left_says_the_counts_and_leaves_nothing(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "hm"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"nothing is left of 2 records.*too few words"):
        prepare_silo("a", folder, tmp_path / "out", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_too_few_records_to_train_or_evaluate_are_refused(silo, tmp_path):
    with pytest.raises(DataError, match="expected at least 500"):
        prepare_silo("a", silo, tmp_path / "out", DataConfig(min_train_records=500))
    with pytest.raises(DataError, match="heldout_share"):
        prepare_silo("a", silo, tmp_path / "out", DataConfig(heldout_share=1e-9))
    assert not (tmp_path / "out").exists()


def test_line_separators_inside_text_survive(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [text + "\u2028And the end\u0085of it." for text in notes(40)]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in rows), encoding="utf-8"
    )
    prepare_silo("a", folder, tmp_path / "out", CONFIG)
    kept = load_records(tmp_path / "out", "train") + load_records(tmp_path / "out", "heldout")
    assert len(kept) == 40
    assert all("\u2028" in record.text for record in kept)


def test_altered_artifact_is_refused(silo, tmp_path):
    prepare_silo("a", silo, tmp_path / "out", CONFIG)
    path = tmp_path / "out" / "train.jsonl"
    path.write_text(path.read_text().replace("patient", "Patient", 1))
    with pytest.raises(ArtifactError, match="altered"):
        load_records(tmp_path / "out", "train")


def test_importing_the_package_and_its_config_loads_nothing_heavy():
    code = (
        "import sys, mutirao.data, mutirao.data.config, mutirao.data.tokenization;"
        "heavy = {'torch', 'spacy', 'datatrove', 'rensa', 'py3langid', 'numpy'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KEY = bytes(32)


def _with_identifiers(silo):
    path = silo / "notes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["text"] += " Her number, 202-555-0143, was called again."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_surrogates_are_the_same_in_all_records_and_the_audit_names_no_value(silo, tmp_path):
    _with_identifiers(silo)
    config = CONFIG.model_copy(update={"identifiers": IdentifierConfig(mode="surrogate")})
    report = prepare_silo("a", silo, tmp_path / "out", config, key=KEY)
    assert report.identifiers == {"EMAIL": 1, "PHONE": 2}
    records = [
        record for side in ("train", "heldout") for record in load_records(tmp_path / "out", side)
    ]
    everything = "\n".join(record.text for record in records)
    assert "202-555-0143" not in everything
    assert "ana@example.org" not in everything
    phones = re.findall(r"\d{3}-\d{3}-\d{4}", everything)
    assert len(phones) == 2
    assert len(set(phones)) == 1
    audit = (tmp_path / "out" / "audit.jsonl").read_text()
    rows = [json.loads(line) for line in audit.splitlines()]
    assert Counter(row["type"] for row in rows) == {"EMAIL": 1, "PHONE": 2}
    hashes = {row["hash"] for row in rows if row["type"] == "PHONE"}
    assert len(hashes) == 1
    assert "0143" not in audit
    assert "example.org" not in audit


def test_records_with_identifiers_can_be_left_out(silo, tmp_path):
    _with_identifiers(silo)
    config = CONFIG.model_copy(update={"identifiers": IdentifierConfig(mode="drop")})
    report = prepare_silo("a", silo, tmp_path / "out", config)
    assert report.dropped["identifiers"] == 2
    assert report.identifiers == {"EMAIL": 1, "PHONE": 2}
    assert not (tmp_path / "out" / "audit.jsonl").exists()
    assert "0143" not in json.dumps(report.examples_dropped)


def test_surrogates_need_a_key(silo, tmp_path):
    config = CONFIG.model_copy(update={"identifiers": IdentifierConfig(mode="surrogate")})
    with pytest.raises(DataError, match="key"):
        prepare_silo("a", silo, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
