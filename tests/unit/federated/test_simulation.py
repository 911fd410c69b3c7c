"""A federation in one process: sites in turns, one answer at a time."""

import pytest
from fake_federation import (
    NAMES,
    FakeNetwork,
    FakeSite,
    KilledError,
    final_bytes,
    make_coordinator,
    run,
)
from tiny_sites import FEDERATED, LORA, TRAIN, make_model, make_silo, make_site

from mutirao.artifact import write_atomic
from mutirao.errors import FederationError, InputError
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.events import RoundFinished
from mutirao.federated.coordinator.rounds import run_rounds
from mutirao.federated.network import Lost
from mutirao.federated.plan import Plan, Site
from mutirao.federated.simulation import (
    SimulatedNetwork,
    introduce,
    open_coordinator,
    simulate,
)


def test_the_simulated_network_carries_a_whole_run(tmp_path):
    sites = {name: FakeSite(name) for name in NAMES}
    network = SimulatedNetwork({name: site.answer for name, site in sites.items()})
    records = run_rounds(make_coordinator(tmp_path / "a"), network)
    assert len(records) == 3
    others = {name: FakeSite(name) for name in NAMES}
    run(make_coordinator(tmp_path / "b"), FakeNetwork(others))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def test_sites_work_one_after_another_when_they_are_waited_for():
    worked = []
    workers = {name: lambda request, name=name: worked.append((name, request)) for name in "abc"}
    network = SimulatedNetwork(workers)
    assert network.reachable() == {"a", "b", "c"}
    for name in "abc":
        network.send(name, f"first {name}")
    network.send("a", "second a")
    assert worked == []
    for _ in range(3):
        network.receive(1.0)
    assert worked == [("b", "first b"), ("c", "first c"), ("a", "second a")]
    assert network.receive(0.0) is None


def test_a_site_that_fails_is_lost_with_its_sentence():
    def fail(request):
        raise FederationError("no model here")

    network = SimulatedNetwork({"a": fail})
    network.send("a", None)
    assert network.receive(1.0) == Lost("a", "no model here")


def _site(tmp_path, name):
    return Site(name=name, model=tmp_path, data=tmp_path, work=tmp_path / name)


def test_the_coordinator_file_is_made_once_and_kept(tmp_path):
    plan = Plan(model_sha256="0" * 64)
    sites = [_site(tmp_path, name) for name in "ab"]
    made = open_coordinator(plan, sites, tmp_path / "work")
    assert open_coordinator(plan, sites, tmp_path / "work") == made
    assert sorted(made.sites) == ["a", "b"]
    assert len(made.run_id) == 64
    other = Plan(model_sha256="1" * 64)
    for changed in ((other, sites), (plan, sites[:1])):
        with pytest.raises(InputError, match="another plan or other sites"):
            open_coordinator(*changed, tmp_path / "work")


def test_sites_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="same name"):
        open_coordinator(Plan(model_sha256="0" * 64), [_site(tmp_path, "a")] * 2, tmp_path / "work")


def test_sites_are_told_whom_to_trust_unless_they_know(tmp_path):
    sites = [_site(tmp_path, name) for name in "ab"]
    coordinator = open_coordinator(Plan(model_sha256="0" * 64), sites, tmp_path / "work")
    told = introduce(sites[0], coordinator)
    assert told.identities == coordinator.sites
    assert len(told.coordinator_key) == 64
    own = sites[0].model_copy(update={"coordinator_key": "12" * 32})
    assert introduce(own, coordinator).coordinator_key == "12" * 32


def test_real_sites_train_in_turns_and_go_on_after_a_death(tmp_path, tiny_model_directory):
    model = make_model(tiny_model_directory, tmp_path / "model")
    config = FEDERATED.model_copy(update={"turns": 2, "num_rounds": 5})

    def play(folder, dies_after=None):
        plan_path = folder / "plan.json"
        if not plan_path.exists():
            plan = write_start(model, folder / "work", config, LORA, TRAIN, 0)
            write_atomic(plan_path, plan.model_dump_json())
        silos = {name: _silo(tmp_path, name) for name in "ab"}
        sites = [make_site(folder, model, silo, name) for name, silo in silos.items()]

        def hear(event):
            if isinstance(event, RoundFinished) and event.record.round == dies_after:
                raise KilledError

        plan = Plan.model_validate_json(plan_path.read_bytes())
        return simulate(plan, sites, folder / "work", hear)

    whole = play(tmp_path / "whole")
    assert [[*record.sites] for record in whole] == [["a"], ["b"], ["b"], ["a"], ["a"]]
    for number in (1, 3):
        folder = tmp_path / f"killed-{number}"
        with pytest.raises(KilledError):
            play(folder, dies_after=number)
        again = play(folder)
        assert [r.replica_sha256 for r in again] == [r.replica_sha256 for r in whole]


def _silo(tmp_path, name):
    folder = tmp_path / f"silo-{name}"
    return folder if folder.exists() else make_silo(folder, seed=ord(name))
