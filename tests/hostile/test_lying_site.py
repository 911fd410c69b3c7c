"""What a lying site can send: refused by name, logged, and the round goes on without it.

What may be somebody else's lie in a site's name is refused too, but costs the site nothing.
"""

import re
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_federation import (
    KEYS,
    NAMES,
    SHAPES,
    FakeNetwork,
    FakeSite,
    final_bytes,
    make_coordinator,
    make_start,
    run,
)

from mutirao.errors import FederationError
from mutirao.federated.codec import CodecConfig, encode_tensors
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.messages import Refusal, tensor_payloads
from mutirao.federated.parcel import Parcel

LIAR = "south"
OTHERS = sorted(set(NAMES) - {LIAR})
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"x" * 32)
INT8 = CodecConfig(format="int8")


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _lie(make, *, round_number=1):
    """A network in which the liar's answers to training are changed by ``make``."""
    sites = {name: FakeSite(name) for name in NAMES}

    def distort(site, request, answer, network):
        if site == LIAR and request.kind == "train" and request.round == round_number:
            return make(answer)
        return answer

    return FakeNetwork(sites, distort)


def _with(answer, *, key=KEYS[LIAR], payloads=None, fields=None, **changes):
    changed = replace(
        answer,
        fields={**answer.fields, **(fields or {})},
        payloads={**answer.payloads, **(payloads or {})},
        signature="",
        **changes,
    )
    return changed.signed(key)


def _tensors(values, codec=INT8):
    return tensor_payloads(encode_tensors(values, codec))


def _infinite_scale(answer):
    payload = answer.payloads["t/a.weight"].copy()
    payload[24:28] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
    return _with(answer, payloads={"t/a.weight": payload})


def _without_a_tensor(answer):
    kept = {name: each for name, each in answer.payloads.items() if name != "t/a.weight"}
    return replace(answer, payloads=kept, signature="").signed(KEYS[LIAR])


WRONG_SHAPE = {**make_start(), "a.weight": np.zeros(12, np.float32)}
LOUD = {name: np.full(shape, 1e6, np.float32) for name, shape in SHAPES.items()}

OWN_LIES = {
    "not finite": (_infinite_scale, "not finite"),
    "wrong shape": (lambda a: _with(a, payloads=_tensors(WRONG_SHAPE)), "'a.weight' is uint8 of"),
    "missing tensor": (_without_a_tensor, "sent no tensor 't/a.weight'"),
    "one tensor more": (
        lambda a: _with(a, payloads={"t/more": np.zeros(9, np.uint8)}),
        "'t/more' that was not agreed",
    ),
    "another payload": (
        lambda a: _with(a, payloads={"weights.pkl": np.zeros(9, np.uint8)}),
        "'weights.pkl' that was not agreed",
    ),
    "oversized": (
        lambda a: _with(a, payloads={"t/a.weight": np.zeros(10**6, np.uint8)}),
        "shape .1000000",
    ),
    "empty": (lambda a: _with(a, payloads={"t/a.weight": np.zeros(0, np.uint8)}), "shape .0,"),
    "another format": (
        lambda a: _with(a, payloads=_tensors(make_start(), CodecConfig(format="fp32"))),
        "is uint8 of shape",
    ),
    "too large": (lambda a: _with(a, payloads=_tensors(LOUD)), "of norm .* at most 100"),
    "no tokens": (lambda a: _with(a, fields={"num_tokens": 0}), "malformed 'update'"),
    "negative tokens": (lambda a: _with(a, fields={"num_tokens": -7}), "malformed 'update'"),
    "too many tokens": (lambda a: _with(a, fields={"num_tokens": 10**18}), "claims 10{18} tokens"),
    "tokens as text": (lambda a: _with(a, fields={"num_tokens": "many"}), "malformed 'update'"),
    "unknown field": (lambda a: _with(a, fields={"code": "import os"}), "malformed 'update'"),
    "negative loss": (lambda a: _with(a, fields={"train_loss": -1.0}), "malformed 'update'"),
    "another state": (
        lambda a: _with(a, fields={"state_sha256": "0" * 64}),
        "trained from another state",
    ),
}


@pytest.mark.parametrize("lie", OWN_LIES)
def test_a_site_that_lies_under_its_own_name_is_out_of_the_round(tmp_path, lie):
    make, words = OWN_LIES[lie]
    coordinator = make_coordinator(tmp_path, quorum=3, max_update_norm=100.0, num_rounds=2)
    network = _lie(make)
    records = run(coordinator, network)
    assert sorted(records[0].sites) == OTHERS
    assert records[0].missing == records[0].refused == (LIAR,)
    assert sorted(records[1].sites) == sorted(NAMES)
    (row,) = CoordinatorJournal(tmp_path).refusals()
    assert (row["site"], row["round"]) == (LIAR, 1)
    assert LIAR in row["sentence"]
    assert re.search(words, row["sentence"])
    assert not CoordinatorJournal(tmp_path).update_path(1, LIAR).exists()


def test_without_a_quorum_the_run_ends_clean_and_by_name(tmp_path):
    network = _lie(OWN_LIES["not finite"][0], round_number=2)
    coordinator = make_coordinator(tmp_path)
    with pytest.raises(FederationError, match=f"site {LIAR}.*not finite.*finished rounds are kept"):
        run(coordinator, network)
    assert len(CoordinatorJournal(tmp_path).records()) == 1
    honest = FakeNetwork(network.sites)
    assert len(run(coordinator, honest)) == 3


def _old(answer):
    fields = {**answer.fields, "request_sha256": "7" * 64}
    return _with(answer, fields=fields)


def _refusal_of_another(answer):
    fields = Refusal(request_sha256="7" * 64, reason="policy", sentence="no").model_dump()
    return replace(answer, kind="refusal", fields=fields, payloads={}, signature="").signed(
        KEYS[LIAR]
    )


FORGERIES = {
    "wrong key": (lambda a: _with(a, key=OTHER_KEY), "not signed with that site's key"),
    "no signature": (lambda a: replace(a, signature=""), "not signed with that site's key"),
    "signature in no digits": (lambda a: replace(a, signature="zz" * 64), "not signed"),
    "changed number": (
        lambda a: replace(a, fields={**a.fields, "num_tokens": 9}),
        "not signed with that site's key",
    ),
    "another round": (lambda a: _with(a, round=3), "answered for round 3 .expected 1"),
    "another run": (lambda a: _with(a, run="cd" * 32), "of another run"),
    "another request": (_old, "answered another request"),
    "another kind": (lambda a: _with(a, kind="done"), "sent 'done' .expected 'update'"),
    "a refusal of another request": (_refusal_of_another, "refused another request"),
    "a stranger": (lambda a: _with(a, sender="mallory"), "in the name of 'mallory'"),
    "a stranger with a long name": (lambda a: _with(a, sender="\x1b[2J" * 999), "in the name of"),
    "the coordinator": (lambda a: _with(a, sender="coordinator"), "in the name of 'coordinator'"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_in_a_site_s_name_is_refused_and_costs_the_site_nothing(tmp_path, forgery):
    make, words = FORGERIES[forgery]
    network = _lie(lambda answer: [make(answer), answer])
    records = run(make_coordinator(tmp_path / "a"), network)
    run(
        make_coordinator(tmp_path / "b"),
        FakeNetwork({name: FakeSite(name) for name in NAMES}),
    )
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")
    assert records[0].missing == ()
    rows = CoordinatorJournal(tmp_path / "a").refusals()
    assert len(rows) == 1
    assert re.search(words, rows[0]["sentence"])
    assert len(rows[0]["site"]) <= 64
    assert rows[0]["site"].isprintable()
    assert rows[0]["sentence"].isprintable()


def test_a_site_that_answers_with_old_bytes_alone_is_asked_again_but_not_for_ever(tmp_path):
    network = _lie(_old)
    coordinator = make_coordinator(tmp_path, quorum=3, num_rounds=1)
    (record,) = run(coordinator, network)
    assert record.missing == (LIAR,)
    assert len(network.sites[LIAR].asked) == 3 + 1  # and the final state
    assert len(CoordinatorJournal(tmp_path).refusals()) == 3


def test_an_update_of_round_one_is_not_taken_again_in_round_two(tmp_path):
    first = []

    def replay(site, request, answer, network):
        if site == LIAR and request.kind == "train":
            first.append(answer)
            return [first[0], answer]
        return answer

    sites = {name: FakeSite(name) for name in NAMES}
    records = run(make_coordinator(tmp_path, num_rounds=2), FakeNetwork(sites, replay))
    assert records[0].refused == ()  # the same bytes twice are one answer
    assert records[1].refused == (LIAR,)
    assert records[1].missing == ()


def test_a_second_different_answer_does_not_replace_the_first(tmp_path):
    def other(answer):
        return [answer, _with(answer, payloads=_tensors(make_start(seed=5)))]

    run(make_coordinator(tmp_path / "a"), _lie(other))
    run(make_coordinator(tmp_path / "b"), FakeNetwork({name: FakeSite(name) for name in NAMES}))
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")
    (row,) = CoordinatorJournal(tmp_path / "a").refusals()
    assert "one more answer" in row["sentence"]


def test_a_hostile_sentence_is_cut_and_harmless(tmp_path):
    def shout(answer):
        fields = Refusal(
            request_sha256=answer.fields["request_sha256"],
            reason="failed",
            sentence="\x1b[2J" + "x" * 100_000,
        )
        refusal = Parcel("refusal", answer.run, answer.round, LIAR, fields.model_dump())
        return refusal.signed(KEYS[LIAR])

    with pytest.raises(FederationError) as caught:
        run(make_coordinator(tmp_path), _lie(shout))
    assert len(str(caught.value)) < 1500
    assert "\x1b" not in str(caught.value)
    assert CoordinatorJournal(tmp_path).refused_path.stat().st_size < 1500


def test_a_site_that_always_needs_the_state_is_not_served_for_ever(tmp_path):
    sites = {name: FakeSite(name) for name in NAMES}
    sites[LIAR]._train = lambda request: sites[LIAR].refuse(request, "needs_state")
    coordinator = make_coordinator(tmp_path, quorum=3, num_rounds=1)
    (record,) = run(coordinator, FakeNetwork(sites))
    assert record.missing == (LIAR,)
    assert len([r for r in sites[LIAR].asked if r.kind == "train"]) <= 2
