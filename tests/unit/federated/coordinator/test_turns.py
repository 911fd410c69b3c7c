"""Groups of sites that train in turns: who is asked, what travels, and any death on the way."""

import numpy as np
import pytest
from fake_federation import (
    NAMES,
    SHAPES,
    FakeNetwork,
    FakeSite,
    check_death_at_each_write,
    final_bytes,
    make_coordinator,
    run,
)

from mutirao.errors import InputError
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.measures import measure
from mutirao.federated.coordinator.unlearning import prepare_without, replay_without
from mutirao.federated.messages import TrainRequest, payload_tensors, read_fields
from mutirao.federated.plan import FederatedConfig

ORDER = sorted(NAMES)
ROUTE = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2]
"""Of four sites, whose turn each round is: there and back."""
INT8 = CodecConfig(format="int8")


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _sites():
    return {name: FakeSite(name) for name in NAMES}


def _relay(work, **settings):
    return make_coordinator(work, **{"turns": 4, "num_rounds": 10, "download": INT8, **settings})


def _forms(site):
    trained = [each for each in site.asked if each.kind == "train"]
    return [(each.round, read_fields(TrainRequest, each).state.form) for each in trained]


def test_every_site_has_its_turn():
    config = FederatedConfig(turns=2)
    assert config.group(["e", "d", "c", "b", "a"], 1) == ("a", "c", "e")
    assert config.group(["e", "d", "c", "b", "a"], 2) == ("b", "d")
    assert [config.group("ab", number) for number in (3, 4, 5)] == [("b",), ("a",), ("a",)]
    assert FederatedConfig().group("ba", 7) == ("a", "b")


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_a_change_leads_from_what_the_next_group_was_given_last(turns):
    config = FederatedConfig(turns=turns)
    groups = [config.group("abcde", number) for number in range(1, 30)]
    for number in range(29):  # rounds done; groups[number] is next
        earlier = [each for each in range(number) if groups[each] == groups[number]]
        assert config.basis(number) == (earlier[-1] if earlier else 0)
        assert not earlier or number - config.basis(number) < config.num_states


def test_the_model_goes_from_site_to_site_as_computed_apart(tmp_path):
    coordinator, sites = _relay(tmp_path), _sites()
    records = run(coordinator, FakeNetwork(sites))
    upload = coordinator.plan.federated.upload
    journal = CoordinatorJournal(tmp_path)
    start = journal.open_state(0, "global")
    state = {name: start.read(name) for name in start.names}
    held = dict.fromkeys(ORDER, state)
    replica = state
    for record in records:
        who = ORDER[ROUTE[record.round - 1]]
        assert ([*record.sites], record.missing) == ([who], ())
        held[who] = replica
        sent = decode_tensors(
            encode_tensors(sites[who].trained[record.round], upload), SHAPES, upload
        )
        state = {name: state[name] + sent[name] for name in state}
        base = held[ORDER[ROUTE[record.round]]]
        change = encode_tensors({name: state[name] - base[name] for name in base}, INT8)
        decoded = decode_tensors(change, SHAPES, INT8)
        replica = {name: base[name] + decoded[name] for name in base}
        file = journal.open_state(record.round, "replica")
        for name in replica:
            np.testing.assert_allclose(file.read(name), replica[name], rtol=0, atol=1e-6)
    final = journal.open_state(10, "replica")
    assert all((each.replica[n] == final.read(n)).all() for each in sites.values() for n in SHAPES)


def test_a_site_is_given_the_whole_state_in_its_first_turn_alone(tmp_path):
    sites = _sites()
    records = run(_relay(tmp_path), FakeNetwork(sites))
    for place, name in enumerate(ORDER):
        rounds = [number + 1 for number in range(10) if ROUTE[number] == place]
        forms = ["whole", *["change"] * (len(rounds) - 1)]
        assert _forms(sites[name]) == list(zip(rounds, forms, strict=True))
    change = next(each for each in sites[ORDER[0]].asked if each.round == 8)
    sizes = {name: each.size for name, each in payload_tensors(change).items()}
    whole = next(each for each in sites[ORDER[0]].asked if each.round == 1)
    assert sum(sizes.values()) < sum(each.size for each in payload_tensors(whole).values())
    assert records[7].sites[ORDER[0]].bytes_received == change.num_bytes


def test_a_site_that_lost_its_state_gets_it_whole(tmp_path):
    class Forgetful(FakeNetwork):
        def send(self, site, request):
            if request.round == 8 and len(self.sites[site].asked) == 1:
                self.sites[site].replica = None
            super().send(site, request)

    sites = _sites()
    run(_relay(tmp_path), Forgetful(sites))
    assert _forms(sites[ORDER[0]]) == [(1, "whole"), (8, "change"), (8, "whole"), (9, "change")]


def test_a_group_that_missed_its_turn_gets_the_state_whole(tmp_path):
    late = ORDER[0]

    def lose(site, request, answer, network):
        return None if (site, request.round) == (late, 4) else answer

    sites = _sites()
    records = run(_relay(tmp_path, turns=2, quorum=1, num_rounds=6), FakeNetwork(sites, lose))
    assert [record.missing for record in records] == [(), (), (), (late,), (), ()]
    assert [form for number, form in _forms(sites[late]) if number == 5] == ["whole"]
    assert [form for number, form in _forms(sites[ORDER[2]]) if number == 5] == ["change"]


@pytest.mark.parametrize("turns", [2, 4])
def test_a_coordinator_killed_at_any_write_ends_at_the_same_bytes(tmp_path, monkeypatch, turns):
    def make(name):
        return _relay(tmp_path / name, turns=turns, num_rounds=turns + 2), _sites()

    check_death_at_each_write(monkeypatch, make)


def test_a_site_that_answers_out_of_turn_is_refused_and_not_counted(tmp_path):
    liar = ORDER[2]

    def push_in(site, request, answer, network):
        if request.kind != "train" or request.round != 2:
            return answer
        return [network.sites[liar].answer(request), answer]

    sites = _sites()
    records = run(_relay(tmp_path, num_rounds=4), FakeNetwork(sites, push_in))
    assert [[*record.sites] for record in records] == [[name] for name in ORDER]
    assert records[1].refused == (liar,)
    told = CoordinatorJournal(tmp_path).refusals()
    assert any(row["site"] == liar and "it is not its turn" in row["sentence"] for row in told)


def test_large_states_stay_as_long_as_a_turn_needs_them(tmp_path, monkeypatch):
    run(_relay(tmp_path / "all"), FakeNetwork(_sites()))
    monkeypatch.setattr("mutirao.federated.coordinator.journal.SMALL_STATE_BYTES", 10)
    sites = _sites()
    coordinator = _relay(tmp_path / "few")
    run(coordinator, FakeNetwork(sites))
    kept = sorted(path.name for path in (tmp_path / "few" / "state").iterdir())
    assert kept == ["000", *(f"{number:03d}" for number in range(3, 11))]
    few, every = final_bytes(tmp_path / "few"), final_bytes(tmp_path / "all")
    assert all(every[name] == data for name, data in few.items() if "whole" not in name)
    losses = measure(coordinator, FakeNetwork(sites), max_tokens=5).losses
    assert losses["global"].keys() == {*NAMES}


def test_a_run_of_pairs_can_be_replayed_without_a_site_and_one_of_single_sites_not(tmp_path):
    coordinator = _relay(tmp_path / "pairs", turns=2)
    run(coordinator, FakeNetwork(_sites()))
    replay = replay_without(coordinator, ORDER[0], tmp_path / "left")
    assert replay.rounds_with_site == (1, 4, 5, 8, 9)
    coordinator = _relay(tmp_path / "single")
    run(coordinator, FakeNetwork(_sites()))
    with pytest.raises(InputError, match=r"by site .* alone"):
        replay_without(coordinator, ORDER[0], tmp_path / "none")


@pytest.mark.parametrize(("small", "num_kept"), [(10**9, 4), (10, 0)])
def test_a_run_without_a_site_goes_on_from_the_end_of_a_cycle(
    tmp_path, monkeypatch, small, num_kept
):
    monkeypatch.setattr("mutirao.federated.coordinator.journal.SMALL_STATE_BYTES", small)
    late = ORDER[3]

    def lose(site, request, answer, network):
        return None if site == late and request.round < 6 else answer

    coordinator = _relay(tmp_path / "old", turns=2, quorum=1, num_rounds=8)
    run(coordinator, FakeNetwork(_sites(), lose))
    made = prepare_without(coordinator, late, tmp_path / "new")
    assert len(CoordinatorJournal(made.work).records()) == num_kept
    others = {name: FakeSite(name) for name in NAMES if name != late}
    records = run(made, FakeNetwork(others))
    for cycle in range(4):
        visits = [name for each in records[2 * cycle : 2 * cycle + 2] for name in each.sites]
        assert sorted(visits) == sorted(others)
