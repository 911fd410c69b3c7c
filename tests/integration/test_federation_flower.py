"""Site agents and the coordinator's network over a real SuperLink on loopback."""

from __future__ import annotations

import datetime
import io
import threading
import time
import zipfile

import numpy as np
import pytest
from flower_superlink import agent_thread, answering, make_link, make_site

from mutirao.errors import FederationError, InputError, RecipeError
from mutirao.federated.flower import control
from mutirao.federated.flower.bundle import build_bundle, bundle_sha256
from mutirao.federated.flower.certificates import (
    make_certificates,
    node_key_pem,
    node_public_pem,
    open_node_key,
)
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.fleet import Fleet
from mutirao.federated.flower.network import FlowerNetwork
from mutirao.federated.flower.site_agent import SiteAgent
from mutirao.federated.identity import open_identity
from mutirao.federated.network import Lost
from mutirao.federated.parcel import COORDINATOR, Parcel

pytestmark = pytest.mark.timeout(120)


def train(link, number=1, **payloads) -> Parcel:
    key = open_identity(link.coordinator.work / "identity")
    run = link.coordinator.run_id
    return Parcel("train", run, number, COORDINATOR, {}, payloads).signed(key)


def echo(site, wait=lambda: None):
    def make(request: Parcel) -> Parcel:
        wait()
        fields = {"request_sha256": request.sha256}
        return Parcel("update", request.run, request.round, site.name, fields, request.payloads)

    return answering(site, make)


def wait_until(condition, timeout_s=40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def hall(tmp_path_factory):
    """One SuperLink for the tests that leave it as it is: each has a run of its own."""
    folder = tmp_path_factory.mktemp("hall")
    sites = [make_site(folder, name) for name in ("north", "south")]
    with make_link(folder, sites) as link:
        yield link, sites, Connection(address=link._address)


def test_parcels_go_to_every_site_and_come_back(hall):
    link, (north, south), connection = hall
    notes: list[str] = []
    network = FlowerNetwork(link.open_grid(), link.coordinator, on_note=notes.append)
    large = np.random.default_rng(1).integers(0, 255, 12_000_000, dtype=np.uint8)
    request = train(link, a=large, b=np.zeros(0, np.uint8), c=large[:9], d=large[:9])
    with agent_thread(north, connection, echo(north)), agent_thread(south, connection, echo(south)):
        wait_until(lambda: network.reachable() == {"north", "south"})
        for site in ("north", "south"):
            network.send(site, request)
        answers = {}
        while len(answers) < 2:
            answer = network.receive(30)
            assert isinstance(answer, Parcel), answer
            answers[answer.sender] = answer
        assert network.receive(0) is None
    for name, answer in answers.items():
        assert answer.is_signed_by(link.coordinator.sites[name])
        assert answer.fields["request_sha256"] == request.sha256
        assert {n: p.tobytes() for n, p in answer.payloads.items()} == {
            n: p.tobytes() for n, p in request.payloads.items()
        }
    wait_until(lambda: network.reachable() == set())
    assert notes == ["site north is no longer connected", "site south is no longer connected"] or (
        notes == ["site south is no longer connected", "site north is no longer connected"]
    )


def test_a_site_is_reachable_while_it_works_and_a_newer_request_replaces_a_waiting_one(hall):
    link, (north, _), connection = hall
    go, seen = threading.Event(), []
    slow = echo(north, lambda: (seen.append(1), go.wait(60)))
    first = FlowerNetwork(link.open_grid(), link.coordinator)
    with agent_thread(north, connection, slow):
        wait_until(lambda: "north" in first.reachable())
        first.send("north", train(link, 1))
        wait_until(lambda: bool(seen))
        # A ServerApp that was started anew finds the site although it is busy, and asks again.
        second = FlowerNetwork(link.open_grid(), link.coordinator)
        wait_until(lambda: "north" in second.reachable())
        second.send("north", train(link, 2))
        second.send("north", train(link, 3))
        time.sleep(3)  # both are fetched while the first is worked on
        go.set()
        answer = second.receive(30)
        assert isinstance(answer, Parcel)
        assert answer.round == 3
        assert len(seen) == 2


def test_an_agent_that_is_started_anew_loses_its_request_and_is_asked_again(hall):
    link, (north, _), connection = hall
    never = threading.Event()
    network = FlowerNetwork(link.open_grid(), link.coordinator)
    seen: list[int] = []
    with agent_thread(north, connection, echo(north, lambda: (seen.append(1), never.wait(20)))):
        wait_until(lambda: "north" in network.reachable())
        network.send("north", train(link, 1))
        wait_until(lambda: bool(seen))
    with agent_thread(north, connection, echo(north)):
        lost = network.receive(30)
        assert isinstance(lost, Lost), lost
        assert lost.site == "north"
        wait_until(lambda: "north" in network.reachable())
        network.send("north", train(link, 1))
        assert isinstance(network.receive(30), Parcel)
    never.set()


def test_a_stranger_is_told_of_and_ignored(hall, tmp_path):
    link, _, connection = hall
    notes: list[str] = []
    stranger = make_site(tmp_path, "north")  # the name of a site, with another key
    network = FlowerNetwork(link.open_grid(), link.coordinator, on_note=notes.append)
    with agent_thread(stranger, connection, echo(stranger)):
        wait_until(lambda: network.reachable() == set() and bool(notes))
    assert "'north', is not signed with the key of a site" in notes[0]


def test_a_site_does_not_answer_a_coordinator_that_it_does_not_know(hall):
    link, (north, _), connection = hall
    notes: list[str] = []
    network = FlowerNetwork(link.open_grid(), link.coordinator, on_note=notes.append)
    wary = north.model_copy(update={"coordinator_key": "1" * 64})
    with agent_thread(wary, connection, echo(wary)):
        wait_until(lambda: network.reachable() == set() and bool(notes))
    assert "not signed by the coordinator that this site knows" in notes[0]


def test_an_unsendable_answer_and_a_failing_worker_are_lost_not_fatal(hall):
    link, (north, south), connection = hall
    network = FlowerNetwork(link.open_grid(), link.coordinator)

    def fail(_: bytes) -> bytes:
        raise OSError("the worker was killed")

    forged = answering(south, lambda request: Parcel("update", request.run, 1, "north"))
    with agent_thread(north, connection, fail), agent_thread(south, connection, forged):
        wait_until(lambda: network.reachable() == {"north", "south"})
        for site in ("north", "south"):
            network.send(site, train(link))
        told = {}
        while len(told) < 2:
            lost = network.receive(30)
            assert isinstance(lost, Lost), lost
            told[lost.site] = lost.sentence
    assert "site north failed; its own log says why" in told["north"]
    assert told["south"] == "site south answered as 'north'"
    assert "the worker was killed" in (north.work / "agent.jsonl").read_text()


def test_two_agents_of_one_site_are_one_too_many(hall):
    _, (north, _), connection = hall
    (north.work / "flower" / "node.json").unlink(missing_ok=True)
    with agent_thread(north, connection, echo(north)):
        wait_until(lambda: (north.work / "flower" / "node.json").exists())
        second = SiteAgent(north, connection, echo(north))
        with pytest.raises(InputError, match="another process already serves the site"):
            second.run()


# --- what a coordinator could try --------------------------------------------------------------


def hostile_bundle() -> bytes:
    """Our bundle with a module that would run where it is unpacked and imported."""
    buffer = io.BytesIO(build_bundle())
    with zipfile.ZipFile(buffer, "a") as archive:
        # Without a time of its own, so that the hash is the same a moment later.
        module = zipfile.ZipInfo("mutirao_federation/__init__.py")
        archive.writestr(module, "raise SystemExit('taken over')")
    return buffer.getvalue()


def test_a_hostile_bundle_is_refused_without_being_downloaded(hall, monkeypatch):
    link, (north, _), connection = hall
    monkeypatch.setattr(control, "build_bundle", hostile_bundle)
    notes: list[str] = []
    asked: list[bytes] = []
    network = FlowerNetwork(link.open_grid(), link.coordinator, on_note=notes.append)

    def worker(request: bytes) -> bytes:
        asked.append(request)
        return request

    with agent_thread(north, connection, worker):
        wait_until(lambda: network.reachable() == set() and bool(notes))
        node_id = next(iter(network._nodes))
        network._nodes[node_id].site = "north"  # a coordinator that does not care asks anyway
        network.send("north", train(link))
        lost = network.receive(30)
        assert isinstance(lost, Lost)
    assert "does not know the app bundle of this run" in lost.sentence
    assert bundle_sha256() in lost.sentence
    assert asked == []
    assert "a run was refused" in (north.work / "agent.jsonl").read_text()
    served = link._link.log_path.read_text()
    assert "/v1/fleet/get-run" in served
    assert "/v1/fleet/get-fab" not in served
    assert "/v1/fleet/pull-object" not in served.rpartition("/v1/fleet/get-run")[2]


def test_a_bundle_that_the_policy_lists_is_answered(hall, monkeypatch, tmp_path):
    link, (north, _), connection = hall
    monkeypatch.setattr(control, "build_bundle", hostile_bundle)
    import hashlib

    sha256 = hashlib.sha256(hostile_bundle()).hexdigest()
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'recipes = ["any"]\napp_bundles = ["{sha256}"]\ncoordinators = ["any"]\nkinds = []\n'
        'codecs = []\ntensors = ["*"]\nmax_bytes_per_day = 0\nmax_bytes_per_run = 0\n'
    )
    allowing = north.model_copy(update={"policy": policy})
    network = FlowerNetwork(link.open_grid(), link.coordinator)
    with agent_thread(allowing, connection, echo(allowing)):
        wait_until(lambda: "north" in network.reachable())


# --- TLS and node keys -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fortress(tmp_path_factory):
    """A SuperLink with TLS that takes one node key."""
    folder = tmp_path_factory.mktemp("fortress")
    site = make_site(folder, "north")
    certificates = make_certificates(folder / "certificates", ["coordinator.example"])
    node_key = open_node_key(folder / "node.pem")
    with make_link(folder, [site], certificates, (node_public_pem(node_key),)) as link:
        ca = certificates.ca.read_text()
        invited = Connection(
            address=link._address, ca_certificate=ca, node_key=node_key_pem(node_key)
        )
        yield link, site, invited


def test_tls_and_node_key_end_to_end(fortress):
    link, site, invited = fortress
    network = FlowerNetwork(link.open_grid(), link.coordinator)
    with agent_thread(site, invited, echo(site)):
        wait_until(lambda: network.reachable() == {"north"})
        network.send("north", train(link, a=np.arange(99, dtype=np.uint8)))
        answer = network.receive(30)
        assert isinstance(answer, Parcel)
        assert answer.is_signed_by(link.coordinator.sites["north"])


def test_an_unknown_node_key_ends_in_one_sentence(fortress, monkeypatch):
    _, site, invited = fortress
    monkeypatch.setattr("mutirao.federated.flower.site_agent.NOT_ACCEPTED_S", 1.0)
    unknown = invited.model_copy(update={"node_key": None})
    with pytest.raises(FederationError, match="does not accept this site's node key"):
        SiteAgent(site, unknown, echo(site)).run()


def test_a_certificate_of_another_authority_ends_in_one_sentence(fortress, tmp_path):
    _, site, invited = fortress
    other = make_certificates(tmp_path / "other", []).ca.read_text()
    with pytest.raises(FederationError, match=r"certificate of the coordinator.*is not accepted"):
        SiteAgent(site, invited.model_copy(update={"ca_certificate": other}), echo(site)).run()


def test_an_expired_certificate_ends_in_one_sentence(tmp_path):
    site = make_site(tmp_path, "north")
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10)
    expired = make_certificates(tmp_path / "old", [], days=5, now=long_ago)
    with make_link(tmp_path, [site], expired) as link:
        connection = Connection(address=link._address, ca_certificate=expired.ca.read_text())
        with pytest.raises(FederationError, match="certificate has expired"):
            SiteAgent(site, connection, echo(site)).run()


def test_plain_http_is_for_this_machine_alone(tmp_path):
    with pytest.raises(RecipeError, match="no CA certificate to know it by"):
        Fleet(Connection(address="coordinator.example:9000"), tmp_path)


# --- a SuperLink that dies -----------------------------------------------------------------------


def test_agents_come_back_after_the_superlink_was_killed(tmp_path):
    site = make_site(tmp_path, "north")
    with make_link(tmp_path, [site]) as link:
        connection = Connection(address=link._address)
        network = FlowerNetwork(link.open_grid(), link.coordinator)
        with agent_thread(site, connection, echo(site)):
            wait_until(lambda: network.reachable() == {"north"})
            link.drop_grids()
            link._link.process.kill()
            link._link.process.wait()
            link._executor.kill()
            link._start_link()
            again = FlowerNetwork(link.open_grid(), link.coordinator)
            wait_until(lambda: again.reachable() == {"north"})
            again.send("north", train(link))
            assert isinstance(again.receive(30), Parcel)
