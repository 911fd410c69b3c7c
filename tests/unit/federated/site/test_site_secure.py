"""Sites under secure aggregation: the real server learns the sum, a killed site goes on."""

import numpy as np
import pytest
from tiny_sites import FEDERATED, RUN, TinyCoordinator, make_model, make_plan, make_silo, make_site

from mutirao.federated.audit.check import verify_log
from mutirao.federated.audit.record import Mask
from mutirao.federated.identity import PUBLIC_NAME, open_identity, parse_public_key, public_hex
from mutirao.federated.messages import Refusal, SecureRequest, UpdateAnswer, read_fields
from mutirao.federated.plan import SecureConfig
from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.federated.secure.server import AggregationServer
from mutirao.federated.secure.terms import RoundTerms, default_threshold
from mutirao.federated.site import worker as worker_module
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.worker import SiteWorker

NAMES = ("east", "north", "south")
STEPS = ("share_keys", "mask", "survivors", "unmask")
SECURE = SecureConfig(clip=0.5, value_bits=20)


class SecureWorld:
    """Three sites that know each other's keys, a coordinator, and one round's terms."""

    def __init__(self, tmp_path, tiny_model_directory):
        model = make_model(tiny_model_directory, tmp_path / "model")
        federated = FEDERATED.model_copy(update={"secure": SECURE, "weighting": "equal"})
        plan, start = make_plan(model, federated=federated)
        self.coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
        self.keys = {
            name: public_hex(open_identity(tmp_path / name / "identity")) for name in NAMES
        }
        cache = ModelCache()
        self.sites = {
            name: make_site(
                tmp_path,
                model,
                make_silo(tmp_path / f"silo-{name}", seed=number),
                name,
                identities=self.keys,
            )
            for number, name in enumerate(NAMES)
        }
        self.workers = {
            name: SiteWorker(site, public_models=cache) for name, site in self.sites.items()
        }
        self.cache = cache
        self.num_values = sum(each.size for each in start.values())
        self.terms = self.make_terms()
        self.server = AggregationServer(
            self.terms, {name: bytes.fromhex(key) for name, key in self.keys.items()}
        )
        self.train = self.request(self.terms)

    def make_terms(self, **changes):
        largest = 2 ** (SECURE.value_bits - 1) - 1
        settings = {
            "run_id": bytes.fromhex(RUN),
            "round_number": 1,
            "sites": NAMES,
            "threshold": default_threshold(3),
            "modulus_bits": 32,
            "num_values": self.num_values,
            "fixed_point": FixedPoint(clip=SECURE.clip, scale=largest / SECURE.clip),
            "chunk_values": 100,
        }
        return RoundTerms(**{**settings, **changes})

    def request(self, terms):
        return self.coordinator.whole(1, extra={"terms": np.frombuffer(terms.to_bytes(), np.uint8)})

    def step(self, step, message):
        fields = SecureRequest(plan=self.coordinator.plan, step=step)
        return self.coordinator.sign(
            "secure", 1, fields, {"message": np.frombuffer(message, np.uint8)}
        )

    def restart(self, name):
        self.workers[name] = SiteWorker(self.sites[name], public_models=self.cache)


@pytest.fixture
def world(tmp_path, tiny_model_directory):
    return SecureWorld(tmp_path, tiny_model_directory)


def play(world, *, restarts=False):
    """Play a round; return the decoded sum and the answers to the training requests."""
    ready = {name: world.workers[name].answer(world.train) for name in NAMES}
    for name, answer in ready.items():
        assert answer.kind == "ready", answer.fields
        world.server.receive(name, answer.payloads["advert"].tobytes())
    for step in STEPS:
        messages = world.server.advance()
        assert set(messages) == set(NAMES)
        for name, message in messages.items():
            if restarts:
                world.restart(name)
            request = world.step(step, message)
            answer = world.workers[name].answer(request)
            assert answer.kind == "secure", answer.fields
            world.restart(name)
            assert world.workers[name].answer(request).to_bytes() == answer.to_bytes()
            for _, part in sorted(
                answer.payloads.items(), key=lambda pair: int(pair[0].partition("/")[2] or 0)
            ):
                world.server.receive(name, part.tobytes())
    world.server.advance()
    total = np.concatenate(list(world.server.sum_chunks()))
    return world.terms.fixed_point.decode(total), ready


def test_the_sum_is_that_of_the_updates_and_nothing_else_leaves(world, monkeypatch):
    updates = []
    train = worker_module.train_update

    def spy(*arguments):
        updates.append(train(*arguments))
        return updates[-1]

    monkeypatch.setattr(worker_module, "train_update", spy)
    total, ready = play(world)
    exact = sum(
        np.concatenate([np.ravel(each.tensors[name]) for name in sorted(each.tensors)])
        for each in updates
    )
    assert len(updates) == 3
    assert np.abs(exact).max() > 0.005
    assert np.abs(total - exact).max() <= 3 * SECURE.clip / 2**19
    for answer in ready.values():
        assert set(answer.payloads) == {"advert"}
        assert read_fields(UpdateAnswer, answer).num_clipped == 0
    site = world.sites["north"]
    key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
    records = [record.entry for record in verify_log(site.work / "audit.jsonl", key).records[1:]]
    assert all(record.mask == Mask(cohort_size=3) for record in records)
    updates = [record for record in records if record.kind == "adapter update"]
    assert {record.codec for record in updates} == {"fixed point"}
    assert updates[0].tensors == tuple(sorted(world.coordinator.state))
    assert {record.kind for record in records} == {"adapter update", "secure aggregation"}


def test_sites_that_die_between_all_steps_go_on(world):
    plain, _ = play(world, restarts=True)
    assert np.isfinite(plain).all()
    assert np.abs(plain).max() > 0


def test_a_site_killed_before_its_answer_was_kept_does_not_train_a_second_update(
    world, monkeypatch
):
    from mutirao.federated.site.journal import RunJournal

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunJournal, "write_update", die)
        with pytest.raises(Killed):
            world.workers["north"].answer(world.train)
    monkeypatch.setattr(worker_module, "train_update", lambda *_: pytest.fail("trained again"))
    world.restart("north")
    assert world.workers["north"].answer(world.train).kind == "ready"


def refused(answer):
    assert answer.kind == "refusal"
    return read_fields(Refusal, answer)


def test_a_second_update_of_one_round_is_refused(world):
    assert world.workers["north"].answer(world.train).kind == "ready"
    other_state = {name: each + 1 for name, each in world.coordinator.state.items()}
    same, world.coordinator.state = world.coordinator.state, other_state
    told = refused(world.workers["north"].answer(world.request(world.terms)))
    assert (told.reason, "already" in told.sentence) == ("stale", True)
    world.coordinator.state = same
    world.restart("north")
    other = world.request(world.make_terms(chunk_values=50))
    assert refused(world.workers["north"].answer(other)).reason == "stale"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 2}, "threshold 2"),
        ({"round_number": 2}, "round 2"),
        ({"run_id": bytes(32)}, "run 0000"),
        ({"fixed_point": FixedPoint(clip=0.25, scale=1000.0)}, "clip 0.25"),
        ({"sites": ("east", "north"), "threshold": 2}, "min_cohort=3"),
        ({"sites": ("east", "north", "stranger")}, "stranger"),
        ({"num_values": 7}, "number of values 7"),
    ],
)
def test_terms_that_are_not_the_plan_s_are_refused(world, changes, words):
    told = refused(world.workers["north"].answer(world.request(world.make_terms(**changes))))
    assert words in told.sentence


def test_a_step_without_an_update_and_terms_that_are_missing_are_refused(world):
    told = refused(world.workers["north"].answer(world.step("share_keys", b"x")))
    assert "no masked update" in told.sentence
    assert (
        "without its terms"
        in refused(world.workers["north"].answer(world.coordinator.whole(1))).sentence
    )
