"""A site leaves: the replay is the fold without it, the new run has never seen it."""

import pytest
from fake_federation import (
    NAMES,
    FakeNetwork,
    FakeSite,
    final_bytes,
    make_coordinator,
    run,
    secure_config,
)

from mutirao.config import load_json
from mutirao.errors import InputError
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.unlearning import prepare_without, replay_without
from mutirao.federated.plan import Coordinator


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class StateFreeSite(FakeSite):
    """Its update does not depend on the state, so a replay is exact."""

    def draw_update(self, request):
        kept, self.replica = self.replica, {n: v * 0 for n, v in self.replica.items()}
        update = super().draw_update(request)
        self.replica = kept
        return update


def _silent_before(name, number):
    def distort(site, request, answer, network):
        is_early = request.kind == "train" and request.round < number
        return None if site == name and is_early else answer

    return distort


def _run(work, names=NAMES, kind=FakeSite, distort=None, **settings):
    sites = {name: kind(name) for name in names}
    coordinator = make_coordinator(work, sites=names, **settings)
    run(coordinator, FakeNetwork(sites, distort))
    return coordinator


def test_a_replay_is_the_run_without_the_site_where_updates_do_not_depend_on_it(tmp_path):
    coordinator = _run(tmp_path / "a", kind=StateFreeSite)
    replay = replay_without(coordinator, "west", tmp_path / "replay")
    _run(tmp_path / "b", tuple(n for n in NAMES if n != "west"), kind=StateFreeSite)
    expected = {k: v for k, v in final_bytes(tmp_path / "b").items() if "whole" not in k}
    assert final_bytes(tmp_path / "replay") == expected
    assert replay.rounds_with_site == (1, 2, 3)
    assert 0 < replay.relative_distance < 1
    records = CoordinatorJournal(tmp_path / "replay").records()
    assert all("west" not in record.sites for record in records)


def test_a_replay_is_near_the_run_without_the_site_otherwise(tmp_path):
    coordinator = _run(tmp_path / "a")
    replay = replay_without(coordinator, "west", tmp_path / "replay")
    assert replay.distance > 0
    assert (tmp_path / "replay" / "state" / "003" / "global.safetensors").exists()


def test_what_cannot_be_replayed_is_said(tmp_path):
    coordinator = _run(tmp_path / "a", num_rounds=1)
    with pytest.raises(InputError, match="'nobody' took part in no round"):
        replay_without(coordinator, "nobody", tmp_path / "r")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        replay_without(coordinator, "west", tmp_path / "full")
    alone = _run(tmp_path / "b", ("north",), num_rounds=1)
    with pytest.raises(InputError, match="north alone"):
        replay_without(alone, "north", tmp_path / "r2")
    with pytest.raises(InputError, match="the only one"):
        prepare_without(alone, "north", tmp_path / "r3")
    plan = coordinator.plan.model_copy(
        update={"federated": coordinator.plan.federated.model_copy(update=secure_config())}
    )
    with pytest.raises(InputError, match="secure aggregation cannot be replayed"):
        replay_without(coordinator.model_copy(update={"plan": plan}), "west", tmp_path / "r4")


def _others():
    return {name: FakeSite(name) for name in NAMES if name != "west"}


def test_exact_unlearning_of_a_founder_is_the_run_that_never_had_it(tmp_path):
    coordinator = _run(tmp_path / "a")
    made = prepare_without(coordinator, "west", tmp_path / "new")
    assert made.sites.keys() == {*NAMES} - {"west"}
    assert made.run_id != coordinator.run_id
    assert load_json(Coordinator, tmp_path / "new" / "coordinator.json") == made
    run(made, FakeNetwork(_others()))
    _run(tmp_path / "b", tuple(n for n in NAMES if n != "west"))
    assert final_bytes(tmp_path / "new") == final_bytes(tmp_path / "b")


def test_exact_unlearning_goes_on_from_before_the_site_s_first_round(tmp_path):
    distort = _silent_before("west", 3)
    coordinator = _run(tmp_path / "a", distort=distort, quorum=3, num_rounds=4)
    made = prepare_without(coordinator, "west", tmp_path / "new")
    assert [record.round for record in CoordinatorJournal(made.work).records()] == [1, 2]
    sites = _others()
    records = run(made, FakeNetwork(sites))
    assert {request.round for request in sites["north"].asked if request.kind == "train"} == {3, 4}
    assert [sorted(record.sites) for record in records] == [sorted(sites)] * 4
    _run(tmp_path / "b", tuple(n for n in NAMES if n != "west"), num_rounds=4, quorum=3)
    found, expected = final_bytes(tmp_path / "new"), final_bytes(tmp_path / "b")
    for number in (2, 3, 4):
        for part in ("global", "replica"):
            name = f"state/{number:03d}/{part}.safetensors"
            assert found[name] == expected[name]


def test_where_states_were_removed_the_last_kept_one_before_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("mutirao.federated.coordinator.journal.SMALL_STATE_BYTES", 1)
    distort = _silent_before("west", 3)
    coordinator = _run(tmp_path / "a", distort=distort, quorum=3, num_rounds=5)
    made = prepare_without(coordinator, "west", tmp_path / "new")
    assert CoordinatorJournal(made.work).records() == []
    assert len(run(made, FakeNetwork(_others()))) == 5
