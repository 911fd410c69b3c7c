"""Rounds: the same bytes in any order and after any death; quorum, deadline, lost and back."""

import json

import numpy as np
import pytest
from fake_federation import (
    NAMES,
    SHAPES,
    FakeNetwork,
    FakeSite,
    KilledError,
    check_death_at_each_write,
    final_bytes,
    make_coordinator,
    run,
)

from mutirao.errors import ArtifactError, FederationError, InputError
from mutirao.federated.aggregation.outer import FedAdam, FedAvg, FedMom, Nesterov, OuterState
from mutirao.federated.codec import CodecConfig, decode_tensors, encode_tensors
from mutirao.federated.coordinator.events import (
    AnswerArrived,
    RoundFinished,
    RoundStarted,
    SiteAsked,
    SiteLost,
)
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.messages import payload_tensors
from mutirao.federated.network import Lost


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _sites(names=NAMES):
    return {name: FakeSite(name) for name in names}


def _read(work, number, part):
    file = CoordinatorJournal(work).open_state(number, part)
    return {name: file.read(name) for name in file.names}


@pytest.mark.parametrize(
    "outer", [FedAvg(), Nesterov(), FedMom(), FedAdam()], ids=lambda each: each.rule
)
@pytest.mark.parametrize("weighting", ["tokens", "equal"])
def test_a_round_is_the_outer_step_along_the_mean_of_all_at_once(tmp_path, outer, weighting):
    coordinator = make_coordinator(
        tmp_path, outer=outer, weighting=weighting, download=CodecConfig(format="int8")
    )
    sites = _sites()
    records = run(coordinator, FakeNetwork(sites))
    state, replica = _read(tmp_path, 0, "global"), _read(tmp_path, 0, "replica")
    memory = outer.start(state)
    upload, download = coordinator.plan.federated.upload, coordinator.plan.federated.download
    for record in records:
        total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        weights = 0.0
        for name in sorted(sites):
            sent = encode_tensors(sites[name].trained[record.round], upload)
            weight = float(sites[name].num_tokens) if weighting == "tokens" else 1.0
            for key, values in decode_tensors(sent, SHAPES, upload).items():
                total[key] += weight * values.astype(np.float64)
            weights += weight
        mean = {name: values / weights for name, values in total.items()}
        state, memory = outer.step(state, mean, OuterState(record.round - 1, memory.arrays))
        change = encode_tensors({n: state[n] - replica[n] for n in state}, download)
        decoded = decode_tensors(change, SHAPES, download)
        replica = {name: replica[name] + decoded[name] for name in replica}
        for part, expected in (("global", state), ("replica", replica)):
            found = _read(tmp_path, record.round, part)
            assert found.keys() == expected.keys()
            assert all(found[n].tobytes() == expected[n].tobytes() for n in expected), part
    for site in sites.values():
        assert all((site.replica[name] == replica[name]).all() for name in replica)


def test_records_tell_what_each_site_did(tmp_path):
    coordinator = make_coordinator(tmp_path)
    sites = _sites()
    records = run(coordinator, FakeNetwork(sites))
    assert [record.round for record in records] == [1, 2, 3]
    for record in records:
        assert sorted(record.sites) == sorted(NAMES)
        assert record.missing == record.refused == ()
        assert not record.is_secure
        for name, each in record.sites.items():
            sent = encode_tensors(sites[name].trained[record.round], CodecConfig())
            values = decode_tensors(sent, SHAPES, CodecConfig())
            norm = np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in values.values()))
            assert each.update_norm == pytest.approx(norm, rel=1e-9)
            assert -1 <= each.cosine_to_mean <= 1
            assert each.num_tokens == sites[name].num_tokens
            requests = [r for r in sites[name].asked if r.round == record.round]
            assert each.bytes_received == requests[0].num_bytes
            assert each.bytes_sent == sites[name].answers[requests[0].sha256].num_bytes
    status = json.loads((tmp_path / "status.json").read_bytes())
    assert status["state"] == "finished"


def test_the_first_state_goes_whole_and_then_only_changes(tmp_path):
    sites = _sites()
    run(make_coordinator(tmp_path), FakeNetwork(sites))
    forms = [(r.kind, r.fields["state"]["form"]) for r in sites["north"].asked]
    assert forms == [
        ("train", "whole"),
        ("train", "change"),
        ("train", "change"),
        ("finish", "change"),
    ]
    sizes = {name: each.size for name, each in payload_tensors(sites["north"].asked[0]).items()}
    assert sizes == {name: 24 + 4 * int(np.prod(shape)) for name, shape in SHAPES.items()}


def test_a_start_that_bfloat16_holds_travels_in_half_the_bytes(tmp_path):
    start = {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}
    sites = _sites()
    run(make_coordinator(tmp_path, start=start, num_rounds=1), FakeNetwork(sites))
    first = sites["north"].asked[0]
    sizes = {name: payload.size for name, payload in payload_tensors(first).items()}
    assert sizes == {name: 24 + 2 * int(np.prod(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("seed", range(3))
def test_who_answers_first_does_not_matter(tmp_path, seed):
    run(make_coordinator(tmp_path / "plain"), FakeNetwork(_sites()))
    order = np.random.default_rng(seed)
    run(make_coordinator(tmp_path / "mixed"), FakeNetwork(_sites(), order=order))
    assert final_bytes(tmp_path / "plain") == final_bytes(tmp_path / "mixed")


def _two(work):
    return make_coordinator(work, sites=NAMES[:2], num_rounds=2), _sites(NAMES[:2])


def test_a_coordinator_killed_at_any_event_ends_at_the_same_bytes(tmp_path):
    coordinator, sites = _two(tmp_path / "whole")
    events = []
    run(coordinator, FakeNetwork(sites), on_event=events.append)
    expected = final_bytes(coordinator.work)
    for place in range(len(events)):
        coordinator, sites = _two(tmp_path / str(place))
        heard = []

        def die(event, heard=heard, place=place):
            heard.append(event)
            if len(heard) == place + 1:
                raise KilledError

        with pytest.raises(KilledError):
            run(coordinator, FakeNetwork(sites), on_event=die)
        records = run(coordinator, FakeNetwork(sites))
        assert [record.round for record in records] == [1, 2]
        assert final_bytes(coordinator.work) == expected, heard[-1]
        assert all(site.num_trained == 2 for site in sites.values()), heard[-1]


def test_a_coordinator_killed_at_any_write_ends_at_the_same_bytes(tmp_path, monkeypatch):
    check_death_at_each_write(monkeypatch, lambda name: _two(tmp_path / name))


def test_kept_updates_are_not_asked_for_again(tmp_path):
    coordinator, sites = make_coordinator(tmp_path, num_rounds=1), _sites()

    def die(event):
        if isinstance(event, AnswerArrived) and len(event.waiting) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(coordinator, FakeNetwork(sites), on_event=die)
    events = []
    run(coordinator, FakeNetwork(sites), on_event=events.append)
    started = events[0]
    assert isinstance(started, RoundStarted)
    assert len(started.kept) == 2
    asked = {each.site for each in events if isinstance(each, SiteAsked) and each.step == "train"}
    assert asked == set(NAMES) - set(started.kept)


def test_a_damaged_kept_update_is_asked_for_again(tmp_path):
    coordinator, sites = make_coordinator(tmp_path / "a", num_rounds=1), _sites()

    def die(event):
        if isinstance(event, AnswerArrived) and not event.waiting:
            raise KilledError

    with pytest.raises(KilledError):
        run(coordinator, FakeNetwork(sites), on_event=die)
    path = CoordinatorJournal(tmp_path / "a").update_path(1, "east")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    run(coordinator, FakeNetwork(sites))
    run(make_coordinator(tmp_path / "b", num_rounds=1), FakeNetwork(_sites()))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def test_a_finished_run_is_not_done_again(tmp_path):
    coordinator = make_coordinator(tmp_path)
    records = run(coordinator, FakeNetwork(_sites()))
    assert run(coordinator, FakeNetwork({})) == records


def test_a_site_that_lost_its_state_gets_it_whole(tmp_path):
    sites = _sites()

    def forget(site, request, answer, network):
        if request.round == 1 and site == "east":
            sites["east"].replica = None
        return answer

    run(make_coordinator(tmp_path / "a"), FakeNetwork(sites, forget))
    run(make_coordinator(tmp_path / "b"), FakeNetwork(_sites()))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")
    forms = [r.fields["state"]["form"] for r in sites["east"].asked]
    assert forms == ["whole", "change", "whole", "change", "change"]


def test_a_lost_site_that_comes_back_is_asked_again(tmp_path):
    sites, events = _sites(), []

    def lose(site, request, answer, network):
        if (
            site == "west"
            and request.round == 2
            and not any(isinstance(event, SiteLost) for event in events)
        ):
            return Lost("west", "no route")
        return answer

    network = FakeNetwork(sites, lose)
    run(make_coordinator(tmp_path / "a"), network, on_event=events.append)
    run(make_coordinator(tmp_path / "b"), FakeNetwork(_sites()))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")
    assert sites["west"].num_trained == 3


def _silent(name, from_round=1):
    def lose(site, request, answer, network):
        return None if site == name and request.round >= from_round else answer

    return lose


def test_without_quorum_a_silent_site_ends_the_run_by_name_at_the_deadline(tmp_path):
    coordinator = make_coordinator(tmp_path)
    network = FakeNetwork(_sites(), _silent("west", from_round=2))
    with pytest.raises(FederationError, match=r"round 2, train: 3 of 4 .*waiting for: west"):
        run(coordinator, network)
    assert network.now == pytest.approx(60, abs=3)
    assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "failed"
    sites = _sites()
    assert len(run(coordinator, FakeNetwork(sites))) == 3


def test_with_a_quorum_the_round_goes_on_at_the_deadline(tmp_path):
    coordinator = make_coordinator(tmp_path, quorum=2)
    network = FakeNetwork(_sites(), _silent("west", from_round=2))
    records = run(coordinator, network)
    assert [record.missing for record in records] == [(), ("west",), ("west",)]
    assert network.now > 120
    assert sorted(records[1].sites) == ["east", "north", "south"]


def test_a_straggler_gets_the_whole_state_in_its_next_round(tmp_path):
    sites, late = _sites(), []

    def delay(site, request, answer, network):
        if site == "west" and request.round == 2:
            late.append(answer)
            return None
        if request.round == 3 and late:
            return [late.pop(), answer]
        return answer

    records = run(make_coordinator(tmp_path, quorum=3), FakeNetwork(sites, delay))
    assert [record.missing for record in records] == [(), ("west",), ()]
    assert records[2].refused == ("west",)
    lines = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [line["sentence"] for line in lines] == ["site west answered for round 2 (expected 3)"]
    forms = [r.fields["state"]["form"] for r in sites["west"].asked if r.round == 3]
    assert forms[0] == "whole"
    counted = {
        name: [(r.round, r.fields["last_counted"]) for r in sites[name].asked if r.kind == "train"]
        for name in ("west", "north")
    }
    assert counted["north"] == [(1, 0), (2, 1), (3, 2)]
    assert set(counted["west"]) == {(1, 0), (2, 1), (3, 1)}  # it hears what became of round 2


def test_a_settled_cohort_stays_settled_after_a_restart(tmp_path):
    coordinator = make_coordinator(tmp_path / "a", quorum=2, num_rounds=1)

    def die(event):
        if isinstance(event, RoundFinished):
            raise KilledError

    monkey = FakeNetwork(_sites(), _silent("west"))
    with pytest.raises(KilledError):
        run(coordinator, monkey, on_event=die)
    (tmp_path / "a" / "rounds.json").unlink()  # as if killed a moment before the record
    records = run(coordinator, FakeNetwork(_sites()))
    assert records[0].missing == ("west",)


def test_too_few_for_the_quorum_ends_the_run(tmp_path):
    def lose(site, request, answer, network):
        return None if site != "north" else answer

    with pytest.raises(FederationError, match=r"1 of 4 sites answered in time \(at least 2"):
        run(make_coordinator(tmp_path, quorum=2), FakeNetwork(_sites(), lose))


def test_sites_that_never_connect_are_named(tmp_path):
    network = FakeNetwork(_sites())
    network.down = {"west"}
    with pytest.raises(FederationError, match=r"3 of 4 sites connected within 20 s .*west"):
        run(make_coordinator(tmp_path), network)


def test_a_policy_refusal_ends_a_round_that_needs_all_at_once(tmp_path):
    sites = _sites()
    sites["south"]._train = lambda request: sites["south"].refuse(request, "policy", "not us")
    network = FakeNetwork(sites)
    with pytest.raises(FederationError, match=r"site south refused \(policy\): not us"):
        run(make_coordinator(tmp_path), network)
    assert network.now < 5


def test_with_a_quorum_the_others_go_on_without_one_that_refuses(tmp_path):
    sites = _sites()
    sites["south"]._train = lambda request: sites["south"].refuse(request, "budget", "spent")
    network = FakeNetwork(sites)
    records = run(make_coordinator(tmp_path, quorum=3), network)
    assert all("south" in record.missing for record in records)
    assert network.now < 5


def test_a_plan_that_is_not_sound_does_not_start(tmp_path):
    coordinator = make_coordinator(tmp_path, aggregation="krum")
    with pytest.raises(InputError, match="num_faulty"):
        run(coordinator, FakeNetwork(_sites()))


def test_a_run_without_a_start_is_refused(tmp_path):
    coordinator = make_coordinator(tmp_path / "a").model_copy(update={"work": tmp_path / "b"})
    with pytest.raises(InputError, match="no start"):
        run(coordinator, FakeNetwork(_sites()))


def test_an_altered_state_is_not_gone_on_from(tmp_path):
    coordinator = make_coordinator(tmp_path, num_rounds=2)

    def die(event):
        if isinstance(event, RoundFinished):
            raise KilledError

    with pytest.raises(KilledError):
        run(coordinator, FakeNetwork(_sites()), on_event=die)
    path = CoordinatorJournal(tmp_path).state_path(1, "global")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not the state that round 1 recorded"):
        run(coordinator, FakeNetwork(_sites()))


def test_large_old_states_are_removed_but_the_start_and_the_last_two(tmp_path, monkeypatch):
    monkeypatch.setattr("mutirao.federated.coordinator.journal.SMALL_STATE_BYTES", 10)
    run(make_coordinator(tmp_path, num_rounds=5), FakeNetwork(_sites()))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["000", "004", "005"]


def test_robust_rules_bear_a_site_that_sends_nonsense(tmp_path):
    for rule in ("median", "trimmed_mean"):
        sites = _sites()

        def shout(request, site=sites["east"], own=sites["east"].draw_update):
            return {name: values * 0 + 1000 for name, values in own(request).items()}

        sites["east"].draw_update = shout
        work = tmp_path / rule
        records = run(make_coordinator(work, aggregation=rule, num_rounds=1), FakeNetwork(sites))
        assert all(abs(v).max() < 10 for v in _read(work, 1, "global").values())
        assert records[0].sites["east"].update_norm > 1000


def test_a_request_is_the_same_after_a_restart(tmp_path):
    coordinator, sites = make_coordinator(tmp_path, num_rounds=2), _sites()

    def die(event):
        if isinstance(event, SiteAsked) and event.round == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(coordinator, FakeNetwork(sites), on_event=die)
    run(coordinator, FakeNetwork(sites))
    again = _sites()
    run(make_coordinator(tmp_path / "b", plan=coordinator.plan), FakeNetwork(again))
    first = [r.sha256 for r in sites["north"].asked]
    assert [r.sha256 for r in again["north"].asked] == first
