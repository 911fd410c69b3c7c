"""Journals: what was finished counts, what is damaged is named, nothing is sent twice anew."""

import json

import numpy as np
import pytest

from mutirao.errors import ArtifactError
from mutirao.federated.journal import CoordinatorJournal, RoundRecord, SiteJournal

STATE = {"global": np.arange(3, dtype=np.float32), "momentum": np.zeros(3, np.float32)}


def test_rounds_are_kept_in_order(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    assert journal.records() == []
    for number in (1, 2):
        journal.append(RoundRecord(round=number, seconds=1.0), STATE)
    assert [record.round for record in CoordinatorJournal(tmp_path).records()] == [1, 2]
    assert (journal.load_state(2)["global"] == STATE["global"]).all()


def test_damaged_records_are_named(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    journal.append(RoundRecord(round=1, seconds=1.0), STATE)
    journal.rounds_path.write_text('[{"round": 1')
    with pytest.raises(ArtifactError, match="damaged"):
        journal.records()


def test_truncated_state_is_named(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    journal.append(RoundRecord(round=1, seconds=1.0), STATE)
    path = tmp_path / "round-001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="damaged"):
        journal.load_state(1)


def test_site_answers_the_same_request_with_the_same_bytes(tmp_path):
    journal = SiteJournal(tmp_path)
    codes = np.array([1, -2, 3], np.int8)
    journal.write_reply(1, "request", {"codes": codes}, {"num_tokens": 7})
    kept = journal.read_reply(1, "request")
    assert kept is not None
    assert kept["num_tokens"] == 7
    assert kept["codes"].tobytes() == codes.tobytes()
    assert journal.read_reply(1, "another request") is None
    assert journal.read_reply(2, "request") is None


@pytest.mark.parametrize("name", ["reply.json", "reply.safetensors"])
def test_half_written_answer_counts_as_none(tmp_path, name):
    journal = SiteJournal(tmp_path)
    journal.write_reply(1, "request", {"codes": np.ones(9, np.int8)}, {"num_tokens": 7})
    path = journal.round_folder(1) / name
    path.write_bytes(path.read_bytes()[:20])
    assert journal.read_reply(1, "request") is None


def test_log_has_one_line_an_event(tmp_path):
    journal = SiteJournal(tmp_path)
    journal.log(event="left the site", bytes_sent=10)
    journal.log(event="left the site", bytes_sent=20)
    lines = [json.loads(line) for line in journal.log_path.read_text().splitlines()]
    assert [line["bytes_sent"] for line in lines] == [10, 20]
    assert all("time" in line for line in lines)
