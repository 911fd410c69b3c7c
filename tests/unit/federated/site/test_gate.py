"""What leaves a site passes the gate: recorded before it is sent, refused where not allowed."""

import numpy as np
import pytest

from mutirao.errors import DiskFullError, PolicyError
from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.log import AuditLog
from mutirao.federated.audit.record import ERROR_KIND, Mask
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.messages import Refusal, read_fields
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Plan, Site
from mutirao.federated.site.gate import CONTROL_KIND, Gate
from mutirao.federated.site.policy import load_policy
from mutirao.federated.site.worker import SiteWorker

PLAN = Plan(model_sha256="0" * 64, frozen_sha256="1" * 64)
RUN = "cd" * 32
TENSORS = ("layers.0.lora_B.weight",)
ASKED = Parcel("train", RUN, 2, COORDINATOR)
ANSWER = Parcel("update", RUN, 2, "north", {}, {"t/x": np.zeros(300, np.uint8)}, "0" * 128)
POLICY = """\
recipes = ["{recipe}"]
app_bundles = ["any"]
coordinators = ["any"]
kinds = ["adapter update"]
codecs = ["int8", "fixed point"]
tensors = ["*.lora_B.*"]
max_bytes_per_day = {most}
max_bytes_per_run = 1000000
min_cohort = {cohort}
"""


@pytest.fixture
def site(tmp_path):
    return Site(name="north", model=tmp_path, data=tmp_path, work=tmp_path / "work")


@pytest.fixture
def guarded(site, tmp_path):
    def make(recipe=PLAN.sha256, most=10_000, cohort=0):
        path = tmp_path / "policy.toml"
        path.write_text(POLICY.format(recipe=recipe, most=most, cohort=cohort))
        return site.model_copy(update={"policy": path})

    return make


def records_of(site):
    key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
    verification = verify_log(site.work / "audit.jsonl", key)
    assert verification.fault is None
    return [record.entry for record in verification.records]


def release(site, tensors=TENSORS, mask=None, control=""):
    gate = Gate(site)
    gate.release(gate.describe_update(PLAN, ASKED, mask=mask), ANSWER, tensors, control=control)


def test_an_update_is_on_record_before_it_leaves(site):
    release(site)
    opening, record = records_of(site)
    assert opening.site == "north"
    assert (record.kind, record.codec, record.round) == ("adapter update", "int8", 2)
    assert (record.run, record.tensors) == (RUN[:16], TENSORS)
    assert (record.payload_bytes, record.payload_sha256) == (ANSWER.num_bytes, ANSWER.sha256)
    assert record.recipe_sha256 == PLAN.sha256
    assert record.policy_sha256 is None


def test_an_update_of_all_weights_is_another_kind(site):
    described = Gate(site).describe_update(PLAN.model_copy(update={"lora": None}), ASKED)
    assert described.kind == "weights update"


def test_what_the_policy_allows_leaves_with_its_hash(guarded):
    site = guarded()
    release(site)
    assert records_of(site)[-1].policy_sha256 == load_policy(site.policy).sha256


def test_bytes_beyond_the_day_do_not_leave(guarded):
    site = guarded(most=2 * ANSWER.num_bytes)
    release(site)
    release(site)
    with pytest.raises(PolicyError, match="bytes a day"):
        release(site)
    assert len(records_of(site)) == 3


def test_a_cohort_that_is_too_small_is_refused(guarded):
    site = guarded(cohort=4)
    for mask in (None, Mask(cohort_size=3)):
        with pytest.raises(PolicyError, match="at least 4 sites"):
            release(site, mask=mask)
    release(site, mask=Mask(cohort_size=4))
    assert records_of(site)[-1].mask == Mask(cohort_size=4)


def test_a_message_that_serves_a_masked_update_is_checked_as_that_and_named_as_itself(guarded):
    site = guarded(cohort=3)
    release(site, mask=Mask(cohort_size=3), control="share keys")
    record = records_of(site)[-1]
    assert (record.kind, record.content, record.tensors) == (CONTROL_KIND, "share keys", ())
    with pytest.raises(PolicyError, match="in clear"):
        release(site, control="share keys")


def test_the_gate_refuses_what_names_no_tensors(guarded):
    site = guarded()
    gate = Gate(site)
    gate.admit(gate.describe_update(PLAN, ASKED))
    with pytest.raises(PolicyError, match="does not name its tensors"):
        release(site, tensors=())


def test_a_broken_policy_lets_nothing_but_the_reason_leave(guarded):
    site = guarded()
    site.policy.write_text("max_bytes_per_dy = 1\n")
    asked = Parcel("train", RUN, 1, COORDINATOR, _train_fields())
    answer = SiteWorker(site).answer(asked)
    assert "did you mean max_bytes_per_day" in read_fields(Refusal, answer).sentence
    (record,) = records_of(site)[1:]
    assert (record.kind, record.payload_bytes) == (ERROR_KIND, answer.num_bytes)
    assert record.recipe_sha256 == PLAN.sha256


@pytest.mark.parametrize("error", [DiskFullError("full of secrets"), RuntimeError("secrets")])
def test_without_a_record_only_fixed_words_leave(site, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AuditLog, "append", fail)
    answer = SiteWorker(site).answer(Parcel("train", RUN, 1, COORDINATOR, {"plan": 0}))
    told = read_fields(Refusal, answer)
    assert "could not write its audit log" in told.sentence
    assert "secrets" not in told.sentence
    assert not (site.work / "audit.jsonl").exists()


def _train_fields():
    state = {"form": "none", "state_sha256": "e" * 64}
    return {"plan": PLAN.model_dump(mode="json"), "state": state}
