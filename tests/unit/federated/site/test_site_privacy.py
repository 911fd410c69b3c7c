"""Differential privacy at a site: paid for before each step, told without losses, and it ends."""

import pytest
from tiny_sites import FEDERATED, RUN, TinyCoordinator, make_model, make_plan, make_silo, make_site

from mutirao.federated.audit.check import verify_log
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.messages import (
    EvaluateRequest,
    Refusal,
    StateFields,
    UpdateAnswer,
    read_fields,
)
from mutirao.federated.plan import PrivacyConfig
from mutirao.federated.site.journal import SiteJournal
from mutirao.federated.site.replica import hash_tensors
from mutirao.federated.site.worker import SiteWorker
from mutirao.train.accountant import PrivacyBudget, epsilon_spent
from mutirao.train.config import PrivateConfig
from mutirao.train.privacy_loss import Phase

DELTA = 1e-3
TRAINING = PrivateConfig(num_units=6, units_per_step=3, noise_multiplier=1.0)
NUM_STEPS = 3


def phases(num_steps):
    return [Phase(sampling_probability=0.5, noise_multiplier=1.0, num_steps=num_steps)]


@pytest.fixture
def world(tmp_path, tiny_model_directory):
    """A site with six patients, and a budget for two rounds of three."""
    model = make_model(tiny_model_directory, tmp_path / "model")
    privacy = PrivacyConfig(
        epsilon=epsilon_spent(phases(2 * NUM_STEPS), DELTA) + 1e-6,
        delta=DELTA,
        training=TRAINING,
        steps_per_round=NUM_STEPS,
    )
    federated = FEDERATED.model_copy(update={"privacy": privacy, "weighting": "equal"})
    plan, start = make_plan(model, federated=federated)
    site = make_site(tmp_path, model, make_silo(tmp_path / "silo", units=6))
    return site, TinyCoordinator(tmp_path / "coordinator", plan, start)


def spent_steps(site):
    path = SiteJournal(site.work).run(RUN).privacy_path
    return sum(phase.num_steps for phase in PrivacyBudget.restore(path.read_bytes()).phases)


def test_it_tells_epsilon_and_no_losses_and_stops_when_the_budget_is_used_up(world):
    site, coordinator = world
    first = SiteWorker(site).answer(coordinator.whole(1))
    numbers = read_fields(UpdateAnswer, first)
    assert (numbers.train_loss, numbers.heldout_loss, numbers.seconds) == (None, None, 0)
    assert numbers.num_tokens == FEDERATED.tokens_per_round
    assert numbers.epsilon == pytest.approx(epsilon_spent(phases(NUM_STEPS), DELTA))
    second = SiteWorker(site).answer(coordinator.change(2, coordinator.decode(first)))
    assert second.kind == "update"
    assert spent_steps(site) == 2 * NUM_STEPS
    third = SiteWorker(site).answer(coordinator.change(3, coordinator.decode(second)))
    assert read_fields(Refusal, third).reason == "budget"
    assert spent_steps(site) == 2 * NUM_STEPS
    key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
    records = [record.entry for record in verify_log(site.work / "audit.jsonl", key).records[1:]]
    assert records[0].noise.epsilon == pytest.approx(numbers.epsilon)
    assert records[0].noise.noise_multiplier == 1.0


def test_each_step_is_paid_before_it_is_done_and_a_killed_one_stays_paid(world, monkeypatch):
    from mutirao.train import private

    site, coordinator = world

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(private, "noisy_mean", die)
        with pytest.raises(Killed):
            SiteWorker(site).answer(coordinator.whole(1))
    assert spent_steps(site) == 1
    assert SiteWorker(site).answer(coordinator.whole(1)).kind == "update"
    assert spent_steps(site) == 1 + NUM_STEPS


def test_a_lost_ledger_stops_training(world):
    site, coordinator = world
    first = SiteWorker(site).answer(coordinator.whole(1))
    SiteJournal(site.work).run(RUN).privacy_path.unlink()
    told = SiteWorker(site).answer(coordinator.change(2, coordinator.decode(first)))
    assert "ledger" in read_fields(Refusal, told).sentence


def test_losses_are_not_told(world):
    site, coordinator = world
    worker = SiteWorker(site)
    worker.answer(coordinator.whole(1))
    state = StateFields(form="none", state_sha256=hash_tensors(coordinator.state))
    evaluate = EvaluateRequest(plan=coordinator.plan, label="global", state=state, max_tokens=30)
    told = read_fields(Refusal, worker.answer(coordinator.sign("evaluate", 1, evaluate)))
    assert told.reason == "policy"


def test_a_policy_bounds_epsilon_before_the_work(world, tmp_path):
    site, coordinator = world
    path = tmp_path / "policy.toml"
    path.write_text(
        'recipes = ["any"]\napp_bundles = ["any"]\ncoordinators = ["any"]\n'
        'kinds = ["adapter update"]\ncodecs = ["int8"]\ntensors = ["*"]\n'
        "max_bytes_per_day = 1000000\nmax_bytes_per_run = 1000000\n"
        "[differential_privacy]\nmax_epsilon = 0.5\n"
    )
    told = SiteWorker(site.model_copy(update={"policy": path})).answer(coordinator.whole(1))
    assert read_fields(Refusal, told).reason == "policy"
    assert not SiteJournal(site.work).run(RUN).privacy_path.exists()
