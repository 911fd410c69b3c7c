"""A site's journal: what counts, what is kept, and that damage is noticed."""

import json

import numpy as np
import pytest

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Plan
from mutirao.federated.site.journal import LOCAL_NAME, Progress, SiteJournal
from mutirao.federated.site.replica import hash_tensors

RUN = "ab" * 32
PLAN = Plan(model_sha256="0" * 64)
STATE = {"a": np.arange(4, dtype=np.float32)}


@pytest.fixture
def journal(tmp_path):
    return SiteJournal(tmp_path)


def answer(number):
    return Parcel("update", RUN, number, "north", {}, {"t/a": np.zeros(3, np.uint8)}, "0" * 128)


@pytest.mark.parametrize("run", ["", "../../etc", "AB" * 32, "ab" * 31])
def test_only_the_id_of_a_run_names_a_folder(journal, run):
    with pytest.raises(UpdateError, match="names no run"):
        journal.run(run)


def test_a_run_keeps_its_plan_and_its_id(journal):
    run = journal.run(RUN)
    assert run.plan_sha256() is None
    run.begin(PLAN)
    run.begin(PLAN)
    assert run.plan_sha256() == PLAN.sha256
    with pytest.raises(FederationError, match="another plan"):
        run.begin(PLAN.model_copy(update={"seed": 1}))
    with pytest.raises(FederationError, match="another plan"):
        journal.run(RUN[:16] + "cd" * 24).begin(PLAN)  # the same folder
    assert [each.run_id for each in journal.runs_of(PLAN)] == [RUN]
    assert journal.runs_of(PLAN.model_copy(update={"seed": 1})) == []


def test_the_state_is_known_by_its_hash_and_damage_is_no_state(journal):
    run = journal.run(RUN)
    assert run.read_replica() is None
    assert run.state_names() == ()
    run.write_replica(STATE)
    sha256, state = run.read_replica()
    assert sha256 == hash_tensors(STATE)
    assert np.array_equal(state["a"], STATE["a"])
    assert run.state_names() == ("a",)
    run.write_replica({})
    assert run.read_replica() == (hash_tensors({}), {})
    (run.folder / "replica.safetensors").write_bytes(b"cut")
    assert run.read_replica() is None
    assert run.state_names() == ()


def test_a_round_counts_when_it_has_an_answer_and_old_ones_go(journal):
    run = journal.run(RUN)
    run.write_residuals(1, STATE)
    assert run.last_round() == 0
    for number in (1, 2, 3, 4):
        run.write_update(number, f"{number:064d}", answer(number))
    run.write_measured(4, "e" * 64, answer(4))
    assert (run.last_round(), run.last_round(before=4)) == (4, 3)
    assert run.read_answer(4, f"{4:064d}").to_bytes() == answer(4).to_bytes()
    assert run.read_answer(4, "e" * 64) is not None
    assert run.read_answer(3, "e" * 64) is None
    assert sorted(path.name for path in run.folder.glob("round-*")) == ["round-003", "round-004"]


def test_what_training_alone_begins_with_stays(journal):
    run = journal.run(RUN)
    folder = run.round_folder(1)
    run.write_update(1, "e" * 64, answer(1))
    (folder / LOCAL_NAME).write_bytes(b"x")
    (folder / "secure").mkdir()
    run.write_update(4, "f" * 64, answer(4))
    assert [path.name for path in folder.iterdir()] == [LOCAL_NAME]


def test_a_damaged_answer_is_none(journal):
    run = journal.run(RUN)
    run.write_update(1, "e" * 64, answer(1))
    path = next(run.round_folder(1).glob("update-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert run.read_answer(1, "e" * 64) is None


def test_log_and_progress_are_for_people(journal, monkeypatch):
    journal.log(event="é", round=1)
    journal.log(event="b")
    lines = [json.loads(line) for line in journal.log_path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["é", "b"]
    written = []
    monkeypatch.setattr(journal, "write_progress", lambda *told: written.append(told))
    progress = Progress(journal, 2)
    for tokens in range(100):
        progress(tokens)
    assert written == [(2, 0)]  # the others came within half a second
