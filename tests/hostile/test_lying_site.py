"""What a lying site can send, and that it is refused by name before anything is added up."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.codec import encode_update
from mutirao.federated.messages import pack_reply, unpack_reply, unpack_request
from mutirao.federated.plan import Coordinator, Plan
from mutirao.federated.flower.server_app import _check_answer
from mutirao.federated.site import RoundAnswer, RoundReply

PLAN = Plan(model_sha256="0" * 64, frozen_sha256="1" * 64)
COORDINATOR = Coordinator(plan=PLAN, sites=("north", "south"), work=Path("unused"))
HONEST = {
    "site": "north",
    "round": 2,
    "num_tokens": 10_000,
    "train_loss": 2.0,
    "heldout_loss": None,
    "seconds": 3.0,
}


def _content(text, arrays=None):
    codes = {"codes": np.zeros(3, np.int8), "scales": np.zeros(1, np.float32)}
    packed = {name: Array(array) for name, array in (arrays or codes).items()}
    return RecordDict({"arrays": ArrayRecord(packed), "text": ConfigRecord({"json": text})})


def test_an_honest_reply_survives_the_way():
    update = encode_update(np.arange(5, dtype=np.float32))
    reply = unpack_reply(pack_reply(RoundReply(update, RoundAnswer(**HONEST))))
    assert reply.update.sha256 == update.sha256
    assert reply.answer == RoundAnswer(**HONEST)
    _check_answer(reply.answer, 2, COORDINATOR, {})


@pytest.mark.parametrize(
    "lie",
    [
        {"num_tokens": 0},
        {"num_tokens": -5},
        {"train_loss": float("nan")},
        {"train_loss": -1.0},
        {"heldout_loss": float("inf")},
        {"seconds": float("nan")},
        {"unknown": 1},
    ],
)
def test_impossible_numbers_are_refused(lie):
    with pytest.raises(ValidationError):
        RoundAnswer(**{**HONEST, **lie})
    with pytest.raises(UpdateError, match="malformed"):
        unpack_reply(_content(json.dumps({"answer": {**HONEST, **lie}})))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"site": "somebody"}, "in the name of 'somebody'"),
        ({"round": 1}, "for round 1"),
        ({"num_tokens": 10**18}, "claims 1000000000000000000 tokens"),
    ],
)
def test_claims_beyond_the_plan_are_refused_by_name(lie, words):
    with pytest.raises(UpdateError, match=words):
        _check_answer(RoundAnswer(**{**HONEST, **lie}), 2, COORDINATOR, {})


def test_a_second_answer_in_the_same_name_is_refused():
    with pytest.raises(UpdateError, match="in the name of 'north'"):
        _check_answer(RoundAnswer(**HONEST), 2, COORDINATOR, {"north"})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"answer": 3}', "\x00", "[" * 500, "[" * 200_000]
)
def test_malformed_texts_are_refused(text):
    with pytest.raises(UpdateError, match="malformed"):
        unpack_reply(_content(text))


def test_missing_arrays_are_refused():
    answer = json.dumps({"answer": HONEST})
    with pytest.raises(UpdateError, match="malformed"):
        unpack_reply(_content(answer, {"other": np.zeros(1, np.int8)}))


def test_a_hostile_sentence_is_cut_and_harmless():
    sentence = "\x1b[2J" + "x" * 100_000
    with pytest.raises(FederationError) as caught:
        unpack_reply(_content(json.dumps({"error": sentence})))
    assert len(str(caught.value)) <= 500
    assert "\x1b" not in str(caught.value)


def test_a_poisoned_state_is_refused_by_the_site():
    request = json.dumps({"plan": PLAN.model_dump(mode="json"), "round": 1})
    with pytest.raises(FederationError, match="finite float32"):
        unpack_request(_content(request, {"state": np.array([np.inf], np.float32)}))
