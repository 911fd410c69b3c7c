"""After training: losses at every site, contributions, and what may not be asked."""

import json

import pytest
from fake_federation import (
    NAMES,
    FakeNetwork,
    FakeSite,
    make_coordinator,
    mean_square,
    run,
    secure_config,
)

from mutirao.errors import InputError
from mutirao.federated.codec import CodecConfig
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.measures import Measures, measure
from mutirao.federated.coordinator.unlearning import replay_without
from mutirao.federated.messages import LossesAnswer
from mutirao.federated.plan import FederatedConfig, Plan, PrivacyConfig
from mutirao.train.config import PrivateConfig

FP32 = CodecConfig(format="fp32")


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _trained(work, **settings):
    sites = {name: FakeSite(name) for name in NAMES}
    coordinator = make_coordinator(
        work, **{"upload": FP32, "download": FP32, "num_rounds": 1, **settings}
    )
    network = FakeNetwork(sites)
    run(coordinator, network)
    return coordinator, network


def _measure(coordinator, network, **options):
    options = {"max_tokens": 40, **options}
    return measure(coordinator, network, clock=network.clock, **options)


def test_every_site_is_asked_for_the_final_state_and_answers_are_kept(tmp_path):
    coordinator, network = _trained(tmp_path)
    found = _measure(coordinator, network, contributions=False)
    state = network.sites["north"].replica
    assert found.losses.keys() == {"global"}
    for name, each in found.losses["global"].items():
        assert each.loss == pytest.approx(mean_square(state) + 0.01 * len(name))
        assert each.num_tokens == 50
    assert Measures.model_validate(json.loads((tmp_path / "measures.json").read_bytes())) == found


def test_a_contribution_is_the_loss_without_the_site_minus_the_loss_with_it(tmp_path):
    coordinator, network = _trained(tmp_path / "a")
    found = _measure(coordinator, network)
    state = mean_square(network.sites["north"].replica)
    for name in NAMES:
        out = tmp_path / name
        replay_without(coordinator, name, out)  # of one round, so the same state
        file = CoordinatorJournal(out).open_state(1, "replica")
        without = mean_square({key: file.read(key) for key in file.names})
        assert found.contributions[name] == pytest.approx(without - state, abs=1e-6)
    assert len({round(value, 9) for value in found.contributions.values()}) == len(NAMES)
    assert not (tmp_path / "a" / "measures").exists()


def test_the_cross_site_matrix_has_each_site_s_own_update_on_all_text(tmp_path):
    coordinator, network = _trained(tmp_path)
    found = _measure(coordinator, network, contributions=False, cross_site=True)
    assert found.losses.keys() == {"global", *(f"alone {name}" for name in NAMES)}
    start = CoordinatorJournal(tmp_path).open_state(0, "replica")
    for name in NAMES:
        update = network.sites[name].trained[1]
        own = {key: start.read(key) + update[key] for key in start.names}
        for other, each in found.losses[f"alone {name}"].items():
            assert each.loss == pytest.approx(mean_square(own) + 0.01 * len(other), abs=1e-5)


def test_a_site_that_does_not_answer_is_left_out(tmp_path):
    coordinator, network = _trained(tmp_path)
    network.down = {"west"}
    found = _measure(coordinator, network)
    assert sorted(found.losses["global"]) == sorted(set(NAMES) - {"west"})
    assert sorted(found.contributions) == sorted(NAMES)


def test_an_answer_to_another_question_is_not_counted(tmp_path):
    coordinator, network = _trained(tmp_path)

    def distort(site, request, answer, network):
        if request.kind != "evaluate" or site != "east":
            return answer
        fields = LossesAnswer.model_validate(dict(answer.fields)).model_copy(
            update={"label": "alone north"}
        )
        return network.sites[site].sign("losses", request, fields)

    network.distort = distort
    found = _measure(coordinator, network, contributions=False)
    assert "east" not in found.losses["global"]


def test_nothing_is_asked_that_the_plan_hides(tmp_path):
    cohort = ("s00", "s01", "s02")
    sites = {name: FakeSite(name, cohort) for name in cohort}
    settings = {"num_rounds": 1, **secure_config()}
    coordinator = make_coordinator(tmp_path, sites=cohort, **settings)
    network = FakeNetwork(sites)
    run(coordinator, network)
    with pytest.raises(InputError, match="secure aggregation hides"):
        _measure(coordinator, network)
    found = _measure(coordinator, network, contributions=False)
    assert len(found.losses["global"]) == 3


def test_under_differential_privacy_and_before_the_first_round_nothing_is_asked(tmp_path):
    coordinator, network = _trained(tmp_path / "a")
    training = PrivateConfig(num_units=9, units_per_step=3, noise_multiplier=1.0)
    privacy = PrivacyConfig(epsilon=1.0, delta=1e-5, training=training)
    plan = Plan(model_sha256="0" * 64, federated=FederatedConfig(privacy=privacy))
    private = coordinator.model_copy(update={"plan": plan})
    with pytest.raises(InputError, match="no noise"):
        _measure(private, network)
    empty = make_coordinator(tmp_path / "b")
    with pytest.raises(InputError, match="no round is finished"):
        _measure(empty, network)
    with pytest.raises(InputError, match="max_tokens=0"):
        _measure(coordinator, network, max_tokens=0)


def test_a_rule_that_needs_all_sites_leaves_none_out(tmp_path):
    names = ("s00", "s01", "s02", "s03", "s04")
    sites = {name: FakeSite(name) for name in names}
    settings = {"aggregation": "krum", "num_rounds": 1}
    coordinator = make_coordinator(tmp_path, sites=names, **settings)
    network = FakeNetwork(sites)
    run(coordinator, network)
    with pytest.raises(InputError, match=r"no site can be left out .*num_faulty"):
        _measure(coordinator, network)
