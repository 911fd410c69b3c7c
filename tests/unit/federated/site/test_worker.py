"""A site answers, keeps what it answered, and refuses with a signed sentence."""

import numpy as np
import pytest
from tiny_sites import (
    FEDERATED,
    LORA,
    RUN,
    TinyCoordinator,
    make_model,
    make_packed,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.record import ERROR_KIND
from mutirao.federated.codec import CodecConfig
from mutirao.federated.identity import PUBLIC_NAME, open_identity, parse_public_key, public_hex
from mutirao.federated.messages import (
    DoneAnswer,
    EvaluateRequest,
    FinishRequest,
    LossesAnswer,
    Refusal,
    StateFields,
    UpdateAnswer,
    read_fields,
)
from mutirao.federated.parcel import Parcel
from mutirao.federated.site import worker as worker_module
from mutirao.federated.site.journal import SiteJournal
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.replica import hash_tensors
from mutirao.federated.site.worker import SiteWorker


@pytest.fixture(scope="session")
def model(tiny_model_directory, tmp_path_factory):
    return make_model(tiny_model_directory, tmp_path_factory.mktemp("sites") / "model")


@pytest.fixture(scope="session")
def silo(tmp_path_factory):
    return make_silo(tmp_path_factory.mktemp("silos") / "north")


@pytest.fixture
def coordinator(tmp_path, model):
    plan, start = make_plan(model)
    return TinyCoordinator(tmp_path / "coordinator", plan, start)


@pytest.fixture
def site(tmp_path, model, silo, coordinator):
    return make_site(tmp_path, model, silo, coordinator_key=coordinator.public)


def records_of(site):
    key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
    verification = verify_log(site.work / "audit.jsonl", key)
    assert verification.fault is None
    return [record.entry for record in verification.records][1:]


def refusal_of(answer):
    assert answer.kind == "refusal"
    return read_fields(Refusal, answer)


def test_an_update_is_signed_and_names_its_request(site, coordinator):
    request = coordinator.whole(1)
    answer = SiteWorker(site).answer(request)
    assert answer.kind == "update"
    assert answer.is_signed_by(public_hex(open_identity(site.work / "identity")))
    numbers = read_fields(UpdateAnswer, answer)
    assert numbers.request_sha256 == request.sha256
    assert numbers.state_sha256 == hash_tensors(coordinator.state)
    assert numbers.num_tokens >= FEDERATED.tokens_per_round
    assert numbers.heldout_loss > 0
    update = coordinator.decode(answer)
    assert any(np.abs(each).max() > 0 for each in update.values())
    (record,) = records_of(site)
    assert (record.kind, record.codec, record.round) == ("adapter update", "int8", 1)
    assert (record.payload_bytes, record.payload_sha256) == (answer.num_bytes, answer.sha256)
    assert record.tensors == tuple(sorted(update))
    assert (record.run, record.recipient_key) == (RUN[:16], coordinator.public)


def test_the_same_request_gets_the_same_bytes_from_another_process(site, coordinator, monkeypatch):
    request = coordinator.whole(1)
    first = SiteWorker(site).answer(request)
    monkeypatch.setattr(worker_module, "train_update", lambda *_: pytest.fail("trained again"))
    again = SiteWorker(site).answer(Parcel.from_bytes(request.to_bytes()))
    assert again.to_bytes() == first.to_bytes()
    assert len(records_of(site)) == 2  # both left


def test_rounds_go_on_from_changes_and_are_the_same_after_a_restart(
    tmp_path, model, silo, coordinator
):
    def play(name, *, restart):
        sites = make_site(tmp_path / name, model, silo, coordinator_key=coordinator.public)
        states = TinyCoordinator(tmp_path / "coordinator", coordinator.plan, coordinator.state)
        worker = SiteWorker(sites)
        answers = [worker.answer(states.whole(1))]
        for number in (2, 3):
            if restart:
                worker = SiteWorker(sites)
            answers.append(worker.answer(states.change(number, states.decode(answers[-1]))))
        assert [each.kind for each in answers] == ["update"] * 3
        return [dict(each.payloads) for each in answers]

    kept, restarted = play("one", restart=False), play("two", restart=True)
    for one, two in zip(kept, restarted, strict=True):
        assert {n: p.tobytes() for n, p in one.items()} == {n: p.tobytes() for n, p in two.items()}


def test_a_change_of_what_the_site_does_not_hold_asks_for_the_state(site, coordinator):
    update = {name: np.ones_like(each) for name, each in coordinator.state.items()}
    answer = SiteWorker(site).answer(coordinator.change(2, update))
    assert refusal_of(answer).reason == "needs_state"
    assert SiteWorker(site).answer(coordinator.whole(2)).kind == "update"


def test_a_change_that_leads_elsewhere_asks_for_the_state(site, coordinator):
    worker = SiteWorker(site)
    worker.answer(coordinator.whole(1))
    request = coordinator.change(2, {n: np.ones_like(t) for n, t in coordinator.state.items()})
    state = {**request.fields["state"], "state_sha256": "e" * 64}
    fields = {**request.fields, "state": state}
    lying = coordinator.sign("train", 2, _Raw(fields), request.payloads)
    assert refusal_of(worker.answer(lying)).reason == "needs_state"


def test_an_older_round_is_stale_but_its_kept_answer_is_given(site, coordinator):
    worker = SiteWorker(site)
    first = coordinator.whole(1)
    kept = worker.answer(first)
    second = coordinator.change(2, coordinator.decode(kept))
    worker.answer(second)
    assert worker.answer(first).to_bytes() == kept.to_bytes()
    assert refusal_of(worker.answer(coordinator.whole(1))).reason == "stale"


def test_another_plan_in_the_same_run_is_refused(site, coordinator):
    worker = SiteWorker(site)
    worker.answer(coordinator.whole(1))
    told = refusal_of(worker.answer(coordinator.whole(1, seed=5)))
    assert "began with another plan" in told.sentence


@pytest.mark.parametrize("forge", ["signature", "sender", "kind", "run", "round", "plan"])
def test_what_is_not_in_order_is_refused_and_logged(site, coordinator, forge, tmp_path):
    request = coordinator.whole(1)
    parts = {
        "kind": request.kind,
        "run": request.run,
        "round": request.round,
        "sender": request.sender,
        "fields": request.fields,
        "payloads": request.payloads,
    }
    key = coordinator.key
    match forge:
        case "signature":
            key = open_identity(tmp_path / "stranger")
        case "sender":
            parts["sender"] = "south"
        case "kind":
            parts["kind"] = "delete\n\x1b[31m"
        case "run":
            parts["run"] = "../../../../etc"
        case "round":
            parts["round"] = 4
        case "plan":
            parts["fields"] = {"plan": 1}
    answer = SiteWorker(site).answer(Parcel(**parts).signed(key))
    told = refusal_of(answer)
    assert told.sentence.startswith("site north: ")
    assert told.sentence.isprintable()
    assert answer.is_signed_by(public_hex(open_identity(site.work / "identity")))
    assert [record.kind for record in records_of(site)] == [ERROR_KIND]


def test_an_unexpected_error_tells_fixed_words_alone(site, coordinator, monkeypatch):
    def fail(*_):
        raise RuntimeError("text of a patient")

    monkeypatch.setattr(worker_module, "train_update", fail)
    answer = SiteWorker(site).answer(coordinator.whole(1))
    assert "patient" not in answer.to_bytes().decode("latin1")
    assert "text of a patient" in SiteJournal(site.work).log_path.read_text()


def test_an_unsound_plan_is_refused(site, coordinator):
    federated = FEDERATED.model_copy(
        update={"aggregation": "median", "upload": CodecConfig(keep_one_in=4)}
    )
    told = refusal_of(SiteWorker(site).answer(coordinator.whole(1, federated=federated)))
    assert "not sound" in told.sentence


def test_a_damaged_tensor_is_refused(site, coordinator):
    request = coordinator.whole(1)
    name = next(iter(request.payloads))
    cut = {**request.payloads, name: request.payloads[name][:-4]}
    lying = coordinator.sign("train", 1, _Raw(request.fields), cut)
    told = refusal_of(SiteWorker(site).answer(lying))
    assert told.reason == "failed"
    assert name.removeprefix("t/") in told.sentence


class _Raw:
    def __init__(self, fields):
        self._fields = fields

    def model_dump(self, mode):
        return dict(self._fields)


POLICY = """\
recipes = ["{recipe}"]
app_bundles = ["any"]
coordinators = ["{coordinator}"]
kinds = ["adapter update"]
codecs = ["int8"]
tensors = ["*.lora_B.*"]
max_bytes_per_day = 1000000
max_bytes_per_run = 1000000
"""


def test_the_policy_is_asked_before_the_work(site, coordinator, tmp_path, monkeypatch):
    path = tmp_path / "policy.toml"
    worker = SiteWorker(site.model_copy(update={"policy": path}))
    path.write_text(POLICY.format(recipe="e" * 64, coordinator=coordinator.public))
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "train_update", lambda *_: pytest.fail("it was trained"))
        told = refusal_of(worker.answer(coordinator.whole(1)))
    assert told.reason == "policy"
    assert "recipe" in told.sentence
    path.write_text(POLICY.format(recipe=coordinator.plan.sha256, coordinator=coordinator.public))
    assert worker.answer(coordinator.whole(1)).kind == "update"
    state = StateFields(form="none", state_sha256=hash_tensors(coordinator.state))
    evaluate = EvaluateRequest(plan=coordinator.plan, label="global", state=state, max_tokens=30)
    assert refusal_of(worker.answer(coordinator.sign("evaluate", 1, evaluate))).reason == "policy"


def test_greeting_evaluation_and_end(site, coordinator):
    worker = SiteWorker(site)
    hello = coordinator.sign("hello", 0, _Raw({}))
    assert read_fields(DoneAnswer, worker.answer(hello)).request_sha256 == hello.sha256
    worker.answer(coordinator.whole(1))
    state = StateFields(form="none", state_sha256=hash_tensors(coordinator.state))
    evaluate = EvaluateRequest(plan=coordinator.plan, label="global", state=state, max_tokens=30)
    answer = worker.answer(coordinator.sign("evaluate", 1, evaluate))
    losses = read_fields(LossesAnswer, answer)
    assert losses.num_tokens > 0
    assert losses.loss > 0
    assert records_of(site)[-1].kind == "losses"
    end = coordinator.sign("finish", 3, FinishRequest(plan=coordinator.plan, state=state))
    assert worker.answer(end).kind == "done"


def test_a_stranger_s_change_is_measured_but_not_kept(site, coordinator):
    worker = SiteWorker(site)
    worker.answer(coordinator.whole(1))
    before = hash_tensors(coordinator.state)
    change = coordinator.change(1, {n: np.ones_like(t) for n, t in coordinator.state.items()})
    state = StateFields.model_validate(change.fields["state"])
    evaluate = EvaluateRequest(plan=coordinator.plan, label="south", state=state, max_tokens=30)
    answer = worker.answer(coordinator.sign("evaluate", 1, evaluate, change.payloads))
    assert answer.kind == "losses"
    assert SiteJournal(site.work).run(RUN).read_replica()[0] == before


def test_error_feedback_goes_on_from_round_to_round(site, coordinator):
    federated = FEDERATED.model_copy(
        update={"error_feedback": True, "upload": CodecConfig(format="int2")}
    )
    coordinator.plan = coordinator.plan.model_copy(update={"federated": federated})
    worker = SiteWorker(site)
    first = worker.answer(coordinator.whole(1))
    run = SiteJournal(site.work).run(RUN)
    left = run.read_residuals(1)
    assert any(np.abs(each).max() > 0 for each in left.values())
    worker.answer(coordinator.change(2, coordinator.decode(first)))
    assert run.read_residuals(2).keys() == left.keys()
    assert any(not np.array_equal(run.read_residuals(2)[name], left[name]) for name in left)


def test_a_round_that_did_not_count_leaves_no_trace(tmp_path, model, silo, coordinator):
    federated = FEDERATED.model_copy(
        update={"num_rounds": 5, "error_feedback": True, "upload": CodecConfig(format="int2")}
    )
    coordinator.plan = coordinator.plan.model_copy(update={"federated": federated})

    def answers(name, *asked):
        worker = SiteWorker(make_site(tmp_path / name, model, silo))
        made = [worker.answer(coordinator.whole(n, last_counted=last)) for n, last in asked]
        return [{k: v.tobytes() for k, v in each.payloads.items()} for each in made]

    first, _, fourth, fifth = answers("one", (1, 0), (2, 1), (4, 1), (5, 4))
    assert answers("two", (1, 0), (4, 1), (5, 4)) == [first, fourth, fifth]
    assert answers("all", (1, 0), (2, 1), (4, 2))[2] != fourth
    # None of its rounds counted: as at the start.
    assert answers("none", (1, 0), (2, 0), (3, 0), (4, 0))[3] == answers("new", (4, 0))[0]


def test_all_weights_over_packed_text_learn(tmp_path, model):
    data = make_packed(tmp_path / "packed")
    federated = FEDERATED.model_copy(
        update={"tokens_per_round": 1024, "upload": CodecConfig(format="bf16")}
    )
    plan, start = make_plan(model, lora=None, federated=federated)
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
    worker = SiteWorker(make_site(tmp_path, model, data))
    answers = [worker.answer(coordinator.whole(1))]
    for number in (2, 3):
        answers.append(worker.answer(coordinator.change(number, coordinator.decode(answers[-1]))))
    numbers = [read_fields(UpdateAnswer, answer) for answer in answers]
    assert all(each.num_tokens == 1024 for each in numbers)
    assert all(each.num_steps == 16 for each in numbers)
    assert numbers[2].train_loss < 0.5 * numbers[0].train_loss
    assert numbers[2].heldout_loss < 0.5 * numbers[0].heldout_loss
    assert "lm_head.weight" not in coordinator.state  # tied weights travel once


def test_many_sites_share_one_model_without_mixing(tmp_path, model, coordinator, monkeypatch):
    from mutirao.federated.site import models

    loads = []
    load = models.load_causal_lm
    monkeypatch.setattr(models, "load_causal_lm", lambda *a, **k: loads.append(a) or load(*a, **k))
    silos = [make_silo(tmp_path / f"silo{i}", seed=i) for i in range(2)]
    cache = ModelCache()
    shared = [
        SiteWorker(
            make_site(tmp_path / "shared", model, silos[i], name=f"s{i}"), public_models=cache
        )
        for i in range(2)
    ]
    together = [worker.answer(coordinator.whole(1)).payloads for worker in shared]
    assert len(loads) == 1
    alone = [
        SiteWorker(make_site(tmp_path / "alone", model, silos[i], name=f"s{i}"))
        .answer(coordinator.whole(1))
        .payloads
        for i in range(2)
    ]
    for one, other in zip(together, alone, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in other)
    assert any(not np.array_equal(together[0][n], together[1][n]) for n in together[0])


@pytest.mark.parametrize("rule", ["stacked", "fedex"])
def test_low_rank_rules_train_from_a_history(tmp_path, model, silo, rule):
    federated = FEDERATED.model_copy(update={"aggregation": rule, "keeps_optimizer": False})
    plan, start = make_plan(
        model, lora=LORA.model_copy(update={"freeze_a": False}), federated=federated
    )
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start if rule == "fedex" else {})
    rank = 3 if rule == "stacked" else None
    worker = SiteWorker(make_site(tmp_path, model, silo, rank=rank))
    answer = worker.answer(coordinator.whole(1))
    assert answer.kind == "update", answer.fields
    assert read_fields(UpdateAnswer, answer).rank == rank
    shapes = {name: each.size for name, each in answer.payloads.items()}
    assert len(shapes) == len(start)
