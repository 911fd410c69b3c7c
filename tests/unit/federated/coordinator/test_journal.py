"""The coordinator's journal: what was finished counts, what is damaged is named."""

import json

import numpy as np
import pytest

from mutirao.errors import ArtifactError, InputError
from mutirao.federated.aggregation.outer import FedAdam, FedAvg
from mutirao.federated.arrays import read_arrays, write_arrays
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord, hash_state
from mutirao.federated.site.replica import hash_tensors

START = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(4, np.float32)}


def _start(folder, outer):
    journal = CoordinatorJournal(folder)
    shapes = {name: values.shape for name, values in START.items()}
    journal.write_start(shapes, lambda name: START[name], outer)
    return journal


def test_rounds_are_kept_in_order(tmp_path):
    journal = _start(tmp_path, FedAvg())
    assert journal.records() == []
    for number in (1, 2):
        write_arrays(journal.state_path(number, "global"), START)
        journal.append(RoundRecord(round=number, seconds=1.0, refused=("x",)))
    records = CoordinatorJournal(tmp_path).records()
    assert [record.round for record in records] == [1, 2]
    assert records[0].refused == ("x",)


@pytest.mark.parametrize("outer", [FedAvg(), FedAdam()])
def test_the_start_is_that_of_the_outer_optimizer(tmp_path, outer):
    journal = CoordinatorJournal(tmp_path)
    assert not journal.has_start()
    _start(tmp_path, outer)
    assert journal.has_start()
    kept = read_arrays(journal.state_path(0, "outer"))
    expected = outer.start(START).arrays
    assert kept.keys() == expected.keys()
    assert all((kept[name] == expected[name]).all() for name in kept)
    for part in ("global", "replica"):
        assert hash_state(journal.open_state(0, part)) == hash_tensors(START)


@pytest.mark.parametrize(
    "text", ['[{"round": 1', "[[]]", '[{"round":2,"seconds":1}]', "[" * 100_000]
)
def test_damaged_records_are_named(tmp_path, text):
    journal = CoordinatorJournal(tmp_path)
    journal.rounds_path.write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        journal.records()


def test_refusals_are_kept_harmless_and_a_cut_line_is_left_out(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    journal.log_refusal(3, "north\x1b[2J", "it sent\n nonsense")
    journal.log_refusal(4, "south", "late")
    with journal.refused_path.open("a") as file:
        file.write('{"round": 4, "si')
    rows = CoordinatorJournal(tmp_path).refusals()
    assert [row["round"] for row in rows] == [3, 4]
    assert "\x1b" not in json.dumps(rows[0]["site"], ensure_ascii=False)
    assert journal.refused_sites(4) == {"south"}


def test_the_status_is_told(tmp_path):
    journal = CoordinatorJournal(tmp_path)
    assert journal.read_status() == {}
    journal.write_status("running", round_number=2, phase="train", waiting=("north",))
    status = journal.read_status()
    assert (status["state"], status["round"], status["waiting"]) == ("running", 2, ["north"])


@pytest.mark.parametrize("content", ["", "{", "3", '["a'])
def test_a_cut_cohort_counts_as_none(tmp_path, content):
    journal = CoordinatorJournal(tmp_path)
    assert journal.read_cohort(1) is None
    journal.write_cohort(1, {"b", "a"})
    assert journal.read_cohort(1) == ["a", "b"]
    (journal.round_folder(1) / "cohort.json").write_text(content)
    assert journal.read_cohort(1) is None


def test_a_folder_has_one_coordinator_at_a_time(tmp_path):
    with CoordinatorJournal(tmp_path).locked():
        other = CoordinatorJournal(tmp_path)
        with pytest.raises(InputError, match="another process runs the rounds"), other.locked():
            pass
    with CoordinatorJournal(tmp_path).locked():
        pass
