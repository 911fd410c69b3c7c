"""Secure rounds: the sum of those who stayed, through dropouts and deaths at every step."""

import numpy as np
import pytest
from fake_federation import (
    SHAPES,
    FakeNetwork,
    FakeSite,
    final_bytes,
    make_coordinator,
    run,
    secure_config,
)

from mutirao.errors import ArtifactError, FederationError
from mutirao.federated.coordinator.events import SiteAsked
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.secure_round import STEPS, round_terms
from mutirao.federated.messages import SecureAnswer
from mutirao.federated.network import Lost
from mutirao.federated.secure.terms import RoundTerms

COHORT = ("s00", "s01", "s02", "s03", "s04")
ALL_STEPS = ("train", *STEPS)


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _sites():
    return {name: FakeSite(name, COHORT) for name in COHORT}


def _coordinator(work, **changes):
    settings = {"num_rounds": 1, **secure_config(), **changes}
    return make_coordinator(work, sites=COHORT, **settings)


def _step_of(request):
    return request.fields["step"] if request.kind == "secure" else request.kind


def _expected(coordinator, sites, summed, number=1):
    """The global state after a round of FedAvg from the start, by the codes themselves."""
    terms = round_terms(coordinator, number, SHAPES)
    total = sum(
        terms.fixed_point.encode(
            np.concatenate([v.reshape(-1) for _, v in sorted(sites[n].trained[number].items())])
        ).codes
        for n in summed
    )
    mean = terms.fixed_point.decode(total) / len(summed)
    file = CoordinatorJournal(coordinator.work).open_state(number - 1, "global")
    state, place = {}, 0
    for name in file.names:
        values = file.read(name)
        step = mean[place : place + values.size].reshape(values.shape)
        state[name] = (values.astype(np.float64) + step).astype(np.float32)
        place += values.size
    return state


def _check_state(coordinator, sites, summed):
    file = CoordinatorJournal(coordinator.work).open_state(1, "global")
    for name, values in _expected(coordinator, sites, summed).items():
        assert file.read(name).tobytes() == values.tobytes()


def test_a_round_is_the_step_along_the_exact_sum(tmp_path):
    coordinator, sites = _coordinator(tmp_path), _sites()
    (record,) = run(coordinator, FakeNetwork(sites))
    assert record.is_secure
    assert sorted(record.sites) == sorted(COHORT)
    _check_state(coordinator, sites, COHORT)
    for name, each in record.sites.items():
        asked = [r for r in sites[name].asked if r.kind in ("train", "secure")]
        assert each.bytes_received == sum(request.num_bytes for request in asked)
        answers = [sites[name].answers[request.sha256] for request in asked]
        assert each.bytes_sent == sum(answer.num_bytes for answer in answers)
        assert each.update_sha256 == answers[2].sha256
        assert each.update_norm is None


def test_no_update_and_no_mask_is_left_when_the_round_counts(tmp_path):
    run(_coordinator(tmp_path, num_rounds=2), FakeNetwork(_sites()))
    assert not list((tmp_path / "rounds").rglob("*.parcel"))
    assert not list((tmp_path / "rounds").rglob("sum*"))


@pytest.mark.parametrize("seed", range(2))
def test_who_answers_first_does_not_matter(tmp_path, seed):
    run(_coordinator(tmp_path / "a"), FakeNetwork(_sites()))
    order = np.random.default_rng(seed)
    run(_coordinator(tmp_path / "b"), FakeNetwork(_sites(), order=order))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def _drop(names, step):
    first = ALL_STEPS.index(step)

    def lose(site, request, answer, network):
        done = request.kind in ("finish",)
        if site in names and not done and ALL_STEPS.index(_step_of(request)) >= first:
            return Lost(site, "gone")
        return answer

    return lose


@pytest.mark.parametrize("step", ALL_STEPS)
def test_a_site_that_drops_out_at_any_step_does_not_stop_the_others(tmp_path, step):
    coordinator, sites = _coordinator(tmp_path, quorum=4), _sites()
    network = FakeNetwork(sites, _drop(["s01"], step))
    (record,) = run(coordinator, network)
    stays = step in ("survivors", "unmask")
    summed = [name for name in COHORT if stays or name != "s01"]
    assert sorted(record.sites) == summed
    assert record.missing == (() if stays else ("s01",))
    _check_state(coordinator, sites, summed)
    if stays:
        assert network.now < 30, "nobody is waited for once the updates are in"


@pytest.mark.parametrize("step", ALL_STEPS)
def test_below_the_threshold_the_run_ends_by_name_and_goes_on_later(tmp_path, step):
    coordinator, sites = _coordinator(tmp_path, quorum=4), _sites()
    with pytest.raises(FederationError, match="waiting for: s01, s03"):
        run(coordinator, FakeNetwork(sites, _drop(["s01", "s03"], step)))
    (record,) = run(coordinator, FakeNetwork(sites))
    assert sorted(record.sites) == sorted(COHORT)
    _check_state(coordinator, sites, COHORT)


def test_without_quorum_all_updates_are_needed(tmp_path):
    coordinator, sites = _coordinator(tmp_path), _sites()
    with pytest.raises(FederationError, match="mask: 4 of 5 sites"):
        run(coordinator, FakeNetwork(sites, _drop(["s01"], "mask")))
    (record,) = run(coordinator, FakeNetwork(sites))
    assert sorted(record.sites) == sorted(COHORT)


class _KilledError(Exception):
    pass


def test_a_coordinator_killed_in_any_step_ends_at_the_same_bytes(tmp_path):
    cohort, events = COHORT[:3], []

    def make(work):
        sites = {name: FakeSite(name, cohort) for name in cohort}
        settings = {"num_rounds": 1, **secure_config()}
        return make_coordinator(work, sites=cohort, **settings), sites

    coordinator, sites = make(tmp_path / "whole")
    run(coordinator, FakeNetwork(sites), on_event=events.append)
    expected = final_bytes(coordinator.work)
    firsts = {}  # of each kind of event in each step
    for place, event in enumerate(events):
        firsts.setdefault((type(event).__name__, getattr(event, "step", "")), place)
    for place in firsts.values():
        coordinator, sites = make(tmp_path / str(place))
        heard = []

        def die(event, heard=heard, place=place):
            heard.append(event)
            if len(heard) == place + 1:
                raise _KilledError

        with pytest.raises(_KilledError):
            run(coordinator, FakeNetwork(sites), on_event=die)
        run(coordinator, FakeNetwork(sites))
        assert final_bytes(coordinator.work) == expected, heard[-1]
        assert all(site.num_trained == 1 for site in sites.values())


@pytest.mark.parametrize("step", STEPS)
def test_who_dropped_before_a_restart_stays_dropped(tmp_path, step):
    """The sites were told who is in; a restart must not tell them otherwise."""
    coordinator, sites = _coordinator(tmp_path, quorum=4), _sites()

    def die(event):
        if isinstance(event, SiteAsked) and event.step == step:
            raise _KilledError

    with pytest.raises(_KilledError):
        run(coordinator, FakeNetwork(sites, _drop(["s02"], "train")), on_event=die)
    (record,) = run(coordinator, FakeNetwork(sites))
    assert record.missing == ("s02",)
    _check_state(coordinator, sites, [name for name in COHORT if name != "s02"])


def test_records_after_a_restart_count_the_same_bytes(tmp_path):
    (whole,) = run(_coordinator(tmp_path / "a"), FakeNetwork(_sites()))
    coordinator, sites = _coordinator(tmp_path / "b"), _sites()

    def die(event):
        if isinstance(event, SiteAsked) and event.step == "unmask":
            raise _KilledError

    with pytest.raises(_KilledError):
        run(coordinator, FakeNetwork(sites), on_event=die)
    (record,) = run(coordinator, FakeNetwork(sites))
    for name in COHORT:
        assert record.sites[name].bytes_sent == whole.sites[name].bytes_sent
        assert record.sites[name].bytes_received == whole.sites[name].bytes_received


def test_a_damaged_message_that_was_counted_on_is_named(tmp_path):
    coordinator, sites = _coordinator(tmp_path), _sites()

    def die(event):
        if isinstance(event, SiteAsked) and event.step == "survivors":
            raise _KilledError

    with pytest.raises(_KilledError):
        run(coordinator, FakeNetwork(sites), on_event=die)
    path = CoordinatorJournal(tmp_path).secure_folder(1) / "2-mask" / "s03.parcel"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"s03\.parcel of secure aggregation is damaged"):
        run(coordinator, FakeNetwork(sites))


def _sign_again(site, answer, request, **payloads):
    fields = SecureAnswer(request_sha256=request.sha256, step=request.fields["step"])
    return site.sign("secure", request, fields, payloads)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lie", ["garbage", "missing", "more"])
def test_a_site_that_sends_nonsense_is_out_by_name(tmp_path, step, lie):
    coordinator, sites = _coordinator(tmp_path, quorum=4), _sites()

    def distort(site, request, answer, network):
        if site != "s04" or _step_of(request) != step:
            return answer
        payloads = dict(answer.payloads)
        first = next(iter(payloads))
        if lie == "garbage":
            payloads[first] = np.zeros(70, np.uint8)
        elif lie == "missing":
            del payloads[first]
        else:
            payloads["chunk/9"] = np.zeros(3, np.uint8)
        return _sign_again(sites[site], answer, request, **payloads)

    (record,) = run(coordinator, FakeNetwork(sites, distort))
    assert record.refused == ("s04",)
    summed = [name for name in COHORT if name in record.sites]
    assert ("s04" in summed) == (step in ("survivors", "unmask"))
    _check_state(coordinator, sites, summed)


def test_masked_updates_come_in_many_chunks(tmp_path, monkeypatch):
    make = RoundTerms.__init__
    monkeypatch.setattr(
        RoundTerms, "__init__", lambda self, **values: make(self, **{**values, "chunk_values": 7})
    )
    coordinator, sites = _coordinator(tmp_path, quorum=4), _sites()
    assert round_terms(coordinator, 1, SHAPES).num_chunks == 5
    run(coordinator, FakeNetwork(sites, _drop(["s00"], "mask")))
    _check_state(coordinator, sites, COHORT[1:])
