"""What leaves a site passes the gate: recorded before it is sent, refused where not allowed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mutirao.errors import DiskFullError, PolicyError
from mutirao.federated import client_app, gate
from mutirao.federated import site as site_module
from mutirao.federated.audit_check import verify_log
from mutirao.federated.audit_log import AuditLog
from mutirao.federated.audit_record import ERROR_KIND
from mutirao.federated.codec import encode_update
from mutirao.federated.gate import Gate, Payload, recipe_sha256
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.messages import count_bytes, hash_content, pack_request
from mutirao.federated.plan import Plan, Site
from mutirao.federated.site import RoundAnswer, RoundReply

PLAN = Plan(model_sha256="0" * 64, frozen_sha256="1" * 64)
TENSORS = ("layers.0.lora_B.weight",)
POLICY = """\
recipes = ["{recipe}"]
app_bundles = ["any"]
coordinators = ["any"]
kinds = ["adapter update"]
codecs = ["int8"]
tensors = ["*.lora_B.*"]
max_bytes_per_day = {most}
max_bytes_per_run = 1000000
"""


def answer(*_):
    told = {"site": "north", "round": 2, "num_tokens": 10, "train_loss": 1.0}
    numbers = RoundAnswer(**told, heldout_loss=None, seconds=1.0)
    return RoundReply(encode_update(np.arange(300, dtype=np.float32)), numbers, TENSORS)


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Send the site of a folder a request, as Flower would; returns (reply, records)."""
    monkeypatch.setattr(site_module, "answer_round", answer)
    monkeypatch.setattr(
        client_app, "Message", lambda content, reply_to: SimpleNamespace(content=content)
    )

    def send(policy=None):
        site = Site(
            name="north",
            model=tmp_path,
            data=tmp_path,
            work=tmp_path / "work",
            policy=policy,
        )
        (tmp_path / "site.json").write_text(site.model_dump_json())
        context = SimpleNamespace(node_config={"site-file": str(tmp_path / "site.json")})
        content = pack_request(PLAN, 2, np.zeros(300, np.float32))
        reply = client_app.train_round(SimpleNamespace(content=content), context)
        log = site.work / "audit.jsonl"
        if not log.exists():
            return reply.content, []
        key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
        verification = verify_log(log, key)
        assert verification.fault is None
        return reply.content, [record.entry for record in verification.records]

    return send


@pytest.fixture
def policy_file(tmp_path):
    def write(recipe=None, most=10_000):
        path = tmp_path / "policy.toml"
        path.write_text(POLICY.format(recipe=recipe or recipe_sha256(PLAN), most=most))
        return path

    return write


def sentence_of(content):
    return json.loads(content["text"]["json"]).get("error")


def test_an_update_is_on_record_before_it_leaves(ask):
    content, (opening, release) = ask()
    assert sentence_of(content) is None
    assert opening.site == "north"
    assert (release.kind, release.codec, release.round) == ("adapter update", "int8", 2)
    assert release.tensors == TENSORS
    assert release.payload_bytes == count_bytes(content)
    assert release.payload_sha256 == hash_content(content)
    assert release.recipe_sha256 == recipe_sha256(PLAN)
    assert release.policy_sha256 is None


def test_the_hash_is_over_exactly_the_bytes_that_are_counted(ask, monkeypatch):
    content, _ = ask()
    hashed = []

    class Digest:
        def update(self, piece):
            hashed.append(piece)

        def hexdigest(self):
            return ""

    monkeypatch.setattr("mutirao.federated.messages.hashlib.sha256", Digest)
    hash_content(content)
    assert sum(map(len, hashed)) == count_bytes(content)


def test_what_the_policy_allows_leaves_with_its_hash(ask, policy_file):
    policy = policy_file()
    content, records = ask(policy)
    assert sentence_of(content) is None
    assert records[-1].policy_sha256 == gate.load_policy(policy).sha256


def test_a_recipe_that_is_not_allowed_is_refused_before_the_work(ask, policy_file, monkeypatch):
    monkeypatch.setattr(site_module, "answer_round", lambda *_: pytest.fail("it was trained"))
    content, records = ask(policy_file(recipe="e" * 64))
    assert f"recipe {recipe_sha256(PLAN)} came with the request" in sentence_of(content)
    assert list(content["arrays"]) == []
    assert [record.event for record in records] == ["opening", "release"]
    assert records[-1].kind == ERROR_KIND
    assert records[-1].payload_bytes == count_bytes(content)


def test_bytes_beyond_the_day_do_not_leave(ask, policy_file):
    content, _ = ask(policy_file())
    most = 2 * count_bytes(content)
    assert sentence_of(ask(policy_file(most=most))[0]) is None
    content, records = ask(policy_file(most=most))
    assert "bytes a day" in sentence_of(content)
    assert list(content["arrays"]) == []
    assert [record.kind for record in records[1:]] == ["adapter update"] * 2 + [ERROR_KIND]


def test_a_broken_policy_lets_nothing_but_the_reason_leave(ask, policy_file):
    path = policy_file()
    path.write_text("max_bytes_per_dy = 1\n")
    content, records = ask(path)
    assert "did you mean max_bytes_per_day" in sentence_of(content)
    assert records[-1].kind == ERROR_KIND


@pytest.mark.parametrize("error", [DiskFullError("full of secrets"), RuntimeError("secrets")])
def test_without_a_record_only_fixed_words_leave(ask, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AuditLog, "append", fail)
    content, records = ask()
    assert records == []
    assert list(content["arrays"]) == []
    assert "could not write its audit log" in sentence_of(content)
    assert "secrets" not in sentence_of(content)


def test_the_gate_alone_refuses_what_names_no_tensors(tmp_path, policy_file):
    site = Site(
        name="north", model=tmp_path, data=tmp_path, work=tmp_path / "w", policy=policy_file()
    )
    Gate(site).admit(PLAN, 1)
    with pytest.raises(PolicyError, match="does not name its tensors"):
        Gate(site).release_update(PLAN, 1, (), Payload(1, "a" * 64))
