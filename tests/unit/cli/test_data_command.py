"""``mutirao data prepare``, from its options to its files."""

import json

import pytest
from typer.testing import CliRunner

from mutirao.cli.app import app
from mutirao.errors import DataError, RecipeError

SMALL = ["--set", "min_train_records=2"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    folder = tmp_path / "clinic"
    folder.mkdir()
    words = ["fever", "cough", "rash", "nausea", "fatigue", "headache", "tremor", "insomnia"]
    rows = [
        {"text": f"Case {i}: the patient came to the ward with {word} after {i} days and stayed."}
        for i, word in enumerate(words * 4)
    ]
    rows[2]["text"] += " Call 202-555-0143."
    lines = [json.dumps(row) for row in rows]
    lines[5] = "broken"
    (folder / "notes.jsonl").write_text("\n".join(lines))
    return folder


def run(*arguments):
    result = CliRunner().invoke(app, ["data", "prepare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_counts_are_printed_and_problems_named(site, tmp_path):
    out = tmp_path / "out"
    found = json.loads(run(site, "--out", out, *SMALL, "--json").stdout)
    assert found["num_records_in"] == 31
    assert found["identifiers"] == {"PHONE": 1}
    assert found["problems"] == {"broken JSON line": 1}
    assert found["problem_places"] == {"broken JSON line": ["notes.jsonl:6"]}
    assert json.loads((out / "report.json").read_text()) == found
    assert "0143" not in (out / "audit.jsonl").read_text()
    assert (tmp_path / "home" / "keys" / "identifiers").stat().st_mode & 0o777 == 0o600


def test_surrogates_follow_the_key(site, tmp_path):
    made = []
    for name, key in (("one", "a"), ("two", "a"), ("three", "b")):
        arguments = ["--key", tmp_path / key, "--set", "identifiers.mode=surrogate"]
        run(site, "--out", tmp_path / name, *SMALL, *arguments)
        texts = [(tmp_path / name / f"{side}.jsonl").read_text() for side in ("train", "heldout")]
        made.append("".join(texts))
    assert made[0] == made[1] != made[2]
    assert not any("0143" in text for text in made)


def test_strict_stops_and_writes_nothing(site, tmp_path):
    with pytest.raises(DataError, match=r"notes\.jsonl:6 is not JSON"):
        run(site, "--out", tmp_path / "out", *SMALL, "--strict")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_does_not_exist_is_refused(site, tmp_path):
    with pytest.raises(RecipeError, match="identifiers"):
        run(site, "--out", tmp_path / "out", "--set", "identifiers.mode=hide")
