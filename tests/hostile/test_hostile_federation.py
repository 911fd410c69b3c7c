"""What may come to a federation's two sides that nobody honest would send or leave on a disk.

Parcels with flipped bits, cuts and lies; a coordinator that lies to a site; sites that cannot
or may not take part; journals cut anywhere. The answer is one sentence, the log has it, and
the next honest step is as if nothing had been. What a lying site can send beyond this stands in
``test_lying_site``, what it can do under masks in ``test_hostile_secure_aggregation``.
"""

import datetime
import json
import shutil
import ssl
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from fake_federation import (
    KEYS,
    NAMES,
    RUN_ID,
    FakeNetwork,
    FakeSite,
    make_coordinator,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_sites import (
    FEDERATED,
    LORA,
    RUN,
    TRAIN,
    TinyCoordinator,
    make_model,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.codec import CodecConfig
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.flower.certificates import make_certificates
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.fleet import Fleet
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.messages import (
    Refusal,
    UpdateAnswer,
    read_fields,
)
from mutirao.federated.network import Lost
from mutirao.federated.parcel import COORDINATOR, MAX_TEXT_BYTES, Parcel
from mutirao.federated.simulation import simulate
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.worker import SiteWorker

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONGEST_SENTENCE = 1_500


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


# --- parcels ------------------------------------------------------------------------------------


def make_parcel(**changes) -> Parcel:
    parts = {
        "kind": "update",
        "run": RUN_ID,
        "round": 1,
        "sender": "north",
        "fields": {"a": [1, 2.5, None], "b": {"c": "Mutirão"}},
        "payloads": {"t/x": np.arange(40, dtype=np.uint8), "t/y": np.zeros(0, np.uint8)},
    }
    return Parcel(**{**parts, **changes}).signed(KEYS["north"])


def read_or_refuse(data: bytes) -> Parcel | None:
    """Read a parcel, or have it refused in one sentence; anything else fails the test."""
    try:
        return Parcel.from_bytes(data)
    except UpdateError as error:
        sentence = str(error)
    assert len(sentence) < LONGEST_SENTENCE
    assert sentence.isprintable()
    return None


def rewritten(text: bytes, tail: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + tail


@FEW
@given(st.data())
def test_flipped_bits_make_no_other_parcel(data):
    whole = bytearray(make_parcel().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = read_or_refuse(bytes(whole))
    is_same = found is not None and found.to_bytes() == make_parcel().to_bytes()
    assert found is None or is_same or not found.is_signed_by(public_hex(KEYS["north"]))


@FEW
@given(st.integers(0, 600), st.binary(max_size=30))
def test_cut_and_continued_parcels_are_refused(length, more):
    whole = make_parcel().to_bytes()
    changed = whole[:length] + more
    if changed != whole:
        assert read_or_refuse(changed) is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 1e308, "\ud800", "", "\x1b[2J", "../../etc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@FEW
@given(st.sampled_from(["version", "kind", "run", "round", "sender", "fields", "payloads"]), JSON)
def test_a_header_that_lies_is_refused_or_is_what_it_says(key, value):
    whole = make_parcel().to_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = {**json.loads(whole[8 : 8 + length]), key: value}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    found = read_or_refuse(rewritten(text.encode(errors="surrogatepass"), whole[8 + length :]))
    if found is not None:
        assert found.to_bytes()[8:].startswith(text.encode())


LYING_TEXTS = {
    "half a character": (b'"Mutir', b'"\\ud800'),
    "a character that is none": (b'"Mutir', b'"\xed\xa0\x80'),
    "not UTF-8": (b'"Mutir', b'"\xff'),
    "a number for ever": (b"2.5", b"9" * 5_000),
    "a huge number": (b'"round":1', b'"round":1' + b"0" * 4_000),
    "a round of no run": (b'"round":1', b'"round":1' + b"0" * 12),
    "infinity": (b"2.5", b"1e999"),
    "spaces": (b"2.5", b"2.5 "),
    "a name twice": (b'"a":', b'"a":1,"a":'),
    "deep": (b"2.5", b"[" * 100_000 + b"]" * 100_000),
    "another version": (b'"version":1', b'"version":2'),
    "payloads that overlap": (b'"t/x":[40', b'"t/x":[80'),
    "a payload of minus one byte": (b'"t/x":[40', b'"t/x":[-1'),
    "a payload of all memory": (b'"t/x":[40', b'"t/x":[999999999999999999'),
    "a payload of 1.5 bytes": (b'"t/x":[40', b'"t/x":[40.5'),
}


@pytest.mark.parametrize("lie", LYING_TEXTS)
def test_a_lie_in_a_header_is_refused_in_one_sentence(lie):
    whole = make_parcel().to_bytes()
    length = int.from_bytes(whole[:8], "little")
    before, after = LYING_TEXTS[lie]
    text = whole[8 : 8 + length]
    assert before in text
    data = rewritten(text.replace(before, after), whole[8 + length :])
    assert read_or_refuse(data) is None


@pytest.mark.parametrize("depth", range(100, 1_000, 9))
def test_no_depth_of_a_header_breaks_a_reader(depth):
    """A reader that just manages to read what it then cannot write is broken as well."""
    whole = make_parcel().to_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].replace(b"2.5", b"[" * depth + b"]" * depth)
    read_or_refuse(rewritten(text, whole[8 + length :]))


def test_a_header_beyond_its_bound_is_not_parsed(monkeypatch):
    monkeypatch.setattr("json.loads", lambda *_: pytest.fail("it was parsed"))
    assert read_or_refuse(rewritten(b"[" * (MAX_TEXT_BYTES + 1), b"")) is None


# --- a site that may sign, and signs anything ---------------------------------------------------


@settings(FEW, max_examples=40)
@given(
    st.sampled_from(["update", "ready", "refusal", "secure", "losses", "done", "x"]),
    st.dictionaries(st.text(max_size=12), JSON, max_size=3),
    st.sampled_from([-1, 0, 1, 2, 10**9]),
    st.booleans(),
)
def test_whatever_a_site_signs_the_others_go_on(tmp_path_factory, kind, fields, number, named):
    def distort(site, request, answer, network):
        if (site, request.kind, request.round) != ("south", "train", 1):
            return answer
        told = {**(answer.fields if named else {}), **fields}
        forged = replace(answer, kind=kind, round=number, fields=told, payloads={}, signature="")
        try:
            return Parcel.from_bytes(forged.signed(KEYS["south"]).to_bytes())
        except (UpdateError, UnicodeEncodeError):  # it does not come through a transport
            return Lost(site, "malformed")

    sites = {name: FakeSite(name) for name in NAMES}
    work = tmp_path_factory.mktemp("signs")
    records = run(make_coordinator(work, quorum=3, num_rounds=1), FakeNetwork(sites, distort))
    assert {*records[0].sites} >= {"north", "east", "west"}
    for row in CoordinatorJournal(work).refusals():
        assert row["sentence"].isprintable()
        assert len(row["sentence"]) < LONGEST_SENTENCE


# --- a coordinator that lies --------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tiny_model_directory, tmp_path_factory):
    return make_model(tiny_model_directory, tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="session")
def silo(tmp_path_factory):
    return make_silo(tmp_path_factory.mktemp("silos") / "north", num=6)


@pytest.fixture(scope="module")
def cache():
    return ModelCache()


class Deceived:
    """A site that has done round 1, what it would answer in round 2, and who lies to it."""

    def __init__(self, folder: Path, model: Path, silo: Path, cache: ModelCache) -> None:
        federated = FEDERATED.model_copy(update={"error_feedback": True})
        plan, start = make_plan(model, federated=federated)
        self.cache = cache
        self.coordinator = TinyCoordinator(folder / "coordinator", plan, start)
        self.site = make_site(folder, model, silo, coordinator_key=self.coordinator.public)
        self.first = self.coordinator.whole(1)
        kept = self.ask(self.first)
        self.start = dict(self.coordinator.state)
        self.update = self.coordinator.decode(kept)
        self.second = self.coordinator.change(2, self.update)
        shutil.copytree(self.site.work, folder / "kept")
        self.expected = content(self.ask(self.second))
        self.kept = folder / "kept"
        self.folder = folder

    def ask(self, request: Parcel, site=None) -> Parcel:
        worker = SiteWorker(site or self.site, public_models=self.cache)
        return worker.answer(Parcel.from_bytes(request.to_bytes()))

    def again(self, name: str):
        """Return the site as it was after round 1, in a folder of its own."""
        work = self.folder / name
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.kept, work)
        return self.site.model_copy(update={"work": work})

    def lie(self, kind="train", number=2, *, fields=None, state=None, payloads=None, **changes):
        """Sign a request like the second, but for some parts."""
        told = {**self.second.fields, **(fields or {})}
        told["state"] = {**told["state"], **(state or {})}
        if kind == "finish":
            told = {"plan": told["plan"], "state": told["state"]}
        parcel = replace(
            self.second,
            kind=kind,
            round=number,
            fields=told,
            payloads=self.second.payloads if payloads is None else payloads,
            signature="",
            **changes,
        )
        return parcel.signed(self.coordinator.key)


def content(answer: Parcel):
    """What must not depend on faults: all but how long it took."""
    assert answer.kind == "update", answer.fields
    numbers = read_fields(UpdateAnswer, answer).model_dump(exclude={"seconds"})
    return numbers, {name: payload.tobytes() for name, payload in answer.payloads.items()}


@pytest.fixture(scope="module")
def deceived(tmp_path_factory, model, silo, cache):
    return Deceived(tmp_path_factory.mktemp("deceived"), model, silo, cache)


def _first_payload(deceived, change):
    name = sorted(deceived.second.payloads)[0]
    return {**deceived.second.payloads, name: change(deceived.second.payloads[name])}


def _shorter(payload):
    return payload[:-8].copy()


def _not_finite(deceived):
    from mutirao.federated.codec import encode_tensors
    from mutirao.federated.messages import tensor_payloads

    payloads = encode_tensors(deceived.start, CodecConfig(format="fp32"))
    return tensor_payloads(
        {
            name: np.concatenate([p[:24], np.full(p.size - 24, 0xFF, np.uint8)])
            for name, p in payloads.items()
        }
    )


LIES = {
    "other shapes": (lambda d: d.lie(payloads=_first_payload(d, _shorter)), "shape"),
    "an empty tensor": (
        lambda d: d.lie(payloads=_first_payload(d, lambda p: p[:0].copy())),
        "shape",
    ),
    "no tensors": (lambda d: d.lie(payloads={}), "sent no tensor"),
    "a tensor too many": (
        lambda d: d.lie(payloads={**d.second.payloads, "t/w.pkl": np.zeros(9, np.uint8)}),
        "was not agreed",
    ),
    "values that are not finite": (
        lambda d: d.lie(payloads=_not_finite(d), state={"form": "whole", "based_on": ""}),
        "not finite",
    ),
    "a wrong base": (lambda d: d.lie(state={"based_on": "0" * 64}), "does not hold the state"),
    "a wrong result": (lambda d: d.lie(state={"state_sha256": "0" * 64}), "do not lead to"),
    "a state that is nowhere": (
        lambda d: d.lie(state={"form": "none", "state_sha256": "0" * 64}),
        "does not hold the state",
    ),
    "a form that is none": (lambda d: d.lie(state={"form": "pickle"}), "malformed 'train'"),
    "a field too many": (lambda d: d.lie(fields={"code": "import os"}), "malformed 'train'"),
    "a plan that is none": (lambda d: d.lie(fields={"plan": {}}), "malformed 'train'"),
    "a plan nested deep": (
        lambda d: d.lie(fields={"plan": json.loads("[" * 200 + "]" * 200)}),
        "malformed 'train'",
    ),
    "a huge header": (lambda d: d.lie(fields={"code": "x" * 3_000_000}), "malformed 'train'"),
    "an unknown kind": (lambda d: d.lie("exec"), "'exec' is no request"),
    "an unknown kind that is long": (lambda d: d.lie("\x1b[2J" * 9_999), "is no request"),
    "a round far ahead": (lambda d: d.lie(number=4), r"round 4 was asked for \(expected 1 to 3"),
    "a round at no time": (lambda d: d.lie(number=0), r"round 0 was asked for"),
    "another plan": (
        lambda d: d.lie(fields={"plan": {**d.second.fields["plan"], "seed": 7}}),
        "began with another plan",
    ),
    "an unsigned request": (lambda d: replace(d.second, signature=""), "did not sign"),
    "a request of a site": (lambda d: d.lie(sender="south"), "not in the coordinator's name"),
    "masks that were not agreed": (lambda d: d.lie("secure"), "malformed 'secure'"),
    "an end far ahead": (
        lambda d: d.lie("finish", 10**9 - 1, state={"state_sha256": "0" * 64}),
        "do not lead to",
    ),
    "a loss of a lie": (lambda d: d.lie("evaluate", 10**8), "malformed 'evaluate'"),
    "a greeting of a lie": (lambda d: d.lie("secure", 10**8, fields={"step": "mask"}), "malformed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_coordinator_is_refused_and_the_site_lives_on(deceived, lie):
    make, words = LIES[lie]
    site = deceived.again("lied-to")
    worker = SiteWorker(site, public_models=deceived.cache)
    answer = worker.answer(make(deceived))
    told = refusal_of(answer, site)
    assert told.sentence.isprintable()
    assert "log.jsonl" not in told.sentence, "it was not refused but failed"
    import re

    assert re.search(words, told.sentence), told.sentence
    assert told.sentence in (site.work / "log.jsonl").read_text()
    assert content(worker.answer(deceived.second)) == deceived.expected


def refusal_of(answer: Parcel, site) -> Refusal:
    assert answer.kind == "refusal", answer.kind
    assert answer.is_signed_by(public_hex(open_identity(site.work / "identity")))
    told = read_fields(Refusal, answer)
    assert len(told.sentence) < LONGEST_SENTENCE
    return told


def test_an_old_request_is_answered_with_old_bytes_and_changes_nothing(deceived):
    site = deceived.again("replayed")
    worker = SiteWorker(site, public_models=deceived.cache)
    worker.answer(deceived.second)
    before = {p: p.read_bytes() for p in (site.work / "runs").rglob("*") if p.is_file()}
    assert worker.answer(deceived.first).kind == "update"
    assert before == {p: p.read_bytes() for p in (site.work / "runs").rglob("*") if p.is_file()}
    assert content(worker.answer(deceived.second)) == deceived.expected


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["hello", "train", "secure", "evaluate", "finish", "update", ""]),
    st.dictionaries(st.sampled_from(["plan", "state", "step", "label", "max_tokens", "x"]), JSON),
    st.integers(0, 10**9 - 1),
    st.binary(max_size=40),
)
def test_whatever_a_coordinator_signs_a_site_answers(deceived, kind, fields, number, payload):
    payloads = {"t/x": np.frombuffer(payload, np.uint8)}
    try:
        request = Parcel(kind, RUN, number, COORDINATOR, fields, payloads)
        request = Parcel.from_bytes(request.signed(deceived.coordinator.key).to_bytes())
    except (UpdateError, UnicodeEncodeError):
        return
    site = deceived.site
    answer = SiteWorker(site, public_models=deceived.cache).answer(request)
    if kind == "hello":
        assert answer.kind == "hello"
    else:
        assert "log.jsonl" not in refusal_of(answer, site).sentence


# --- sites that cannot or may not take part -------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory, model):
    """A federation of three that goes on with two."""
    folder = tmp_path_factory.mktemp("three")
    data = {name: make_silo(folder / name, num=6) for name in ("east", "north", "south")}
    changes = {"num_rounds": 1, "quorum": 2, "round_timeout_s": 60.0, "connect_timeout_s": 5.0}
    plan = write_start(
        model, folder / "start", FEDERATED.model_copy(update=changes), LORA, TRAIN, 0
    )

    def play(go, **others):
        shutil.copytree(folder / "start", folder / go / "work")
        sites = [
            make_site(folder / go, model, data[name], name).model_copy(
                update=others if name == "south" else {}
            )
            for name in data
        ]
        records = simulate(plan, sites, folder / go / "work")
        return records, CoordinatorJournal(folder / go / "work").refusals()

    return play


def test_a_site_with_another_model_is_named_and_the_others_go_on(three, tmp_path, model):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["seed"] = 99
    (other / "manifest.json").write_text(json.dumps(manifest))
    records, refusals = three("model", model=other)
    assert sorted(records[0].sites) == ["east", "north"]
    assert records[0].missing == records[0].refused == ("south",)
    assert "site south has another base model" in refusals[0]["sentence"]


def test_a_recipe_that_a_policy_forbids_is_named_and_the_others_go_on(three, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(
        f'recipes = ["{"e" * 64}"]\napp_bundles = ["any"]\ncoordinators = ["any"]\n'
        'kinds = ["adapter update"]\ncodecs = ["int8"]\ntensors = ["*"]\n'
        "max_bytes_per_day = 1000000\nmax_bytes_per_run = 1000000\n"
    )
    records, refusals = three("policy", policy=policy)
    assert sorted(records[0].sites) == ["east", "north"]
    assert records[0].refused == ("south",)
    assert "refused (policy)" in refusals[0]["sentence"]
    assert "recipe" in refusals[0]["sentence"]


class _Silent(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        raise AssertionError("it went on with an expired certificate")


def test_an_expired_certificate_ends_a_connection_in_one_sentence(tmp_path):
    """Real TLS on loopback; with a whole SuperLink: ``test_federation_flower``."""
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=10)
    made = make_certificates(tmp_path / "old", [], days=5, now=long_ago)
    server = HTTPServer(("127.0.0.1", 0), _Silent)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server, made.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    fleet = Fleet(
        Connection(address=f"127.0.0.1:{server.server_port}", ca_certificate=made.ca.read_text()),
        tmp_path / "site",
    )
    try:
        with pytest.raises(FederationError, match="certificate has expired") as caught:
            fleet.connect()
        assert len(str(caught.value)) < LONGEST_SENTENCE
    finally:
        fleet.close()
        server.shutdown()
        thread.join()
        server.server_close()
