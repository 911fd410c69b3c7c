"""A simulated federation with real sites: adapters and full weights, in clear and masked."""

import numpy as np
import pytest
from tiny_sites import FEDERATED, LORA, TRAIN, make_model, make_silo, make_site

from mutirao.artifact import read_manifest
from mutirao.federated.codec import CodecConfig
from mutirao.federated.coordinator.adapter import write_result, write_start
from mutirao.federated.coordinator.events import AnswerArrived
from mutirao.federated.coordinator.journal import CoordinatorJournal, hash_state
from mutirao.federated.coordinator.measures import measure
from mutirao.federated.coordinator.state_files import StateFile
from mutirao.federated.coordinator.unlearning import prepare_without
from mutirao.federated.plan import SecureConfig
from mutirao.federated.simulation import SimulatedNetwork, open_coordinator, simulate, site_workers

NAMES = ("north", "south", "west")


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    return make_model(tiny_model_directory, tmp_path_factory.mktemp("simulation") / "model")


def _sites(folder, model):
    return [
        make_site(folder, model, make_silo(folder / f"{name}-data", seed=seed), name)
        for seed, name in enumerate(NAMES)
    ]


def _plan(folder, model, lora=LORA, **settings):
    config = FEDERATED.model_copy(update={"num_rounds": 2, **settings})
    return write_start(model, folder / "coordinator", config, lora, TRAIN, 0)


class _KilledError(Exception):
    pass


def _die_at(number):
    heard = []

    def die(event):
        heard.append(event)
        if len([each for each in heard if isinstance(each, AnswerArrived)]) == number:
            raise _KilledError

    return die


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "full weights"])
def test_sites_hold_what_the_coordinator_holds_and_the_result_is_that(tmp_path, model, lora):
    sites = _sites(tmp_path, model)
    work = tmp_path / "coordinator"
    plan = _plan(tmp_path, model, lora)
    with pytest.raises(_KilledError):
        simulate(plan, sites, work, on_event=_die_at(4))
    records = simulate(plan, sites, work)
    assert [sorted(record.sites) for record in records] == [sorted(NAMES)] * 2
    journal = CoordinatorJournal(work)
    state = journal.open_state(2, "replica")
    assert hash_state(state) == records[-1].replica_sha256
    for site in sites:
        (path,) = site.work.glob("runs/*/replica.safetensors")
        assert hash_state(StateFile(path)) == records[-1].replica_sha256
    data = {site.name: site.data for site in sites}
    out = tmp_path / "result"
    write_result(work, out, plan, model=model, data=data, extra_files={}, metrics={})
    assert read_manifest(out).kind == ("adapter" if lora else "model")


def test_a_masked_run_is_the_run_in_clear_but_for_fixed_point(tmp_path, model):
    masked = {"secure": SecureConfig(clip=0.5, value_bits=32), "weighting": "equal"}
    fp32 = CodecConfig(format="fp32")
    states = {}
    for name, settings in (("masked", masked), ("clear", {"weighting": "equal"})):
        folder = tmp_path / name
        plan = _plan(folder, model, upload=fp32, download=fp32, **settings)
        sites = _sites(folder, model)
        if name == "masked":
            with pytest.raises(_KilledError):
                simulate(plan, sites, folder / "coordinator", on_event=_die_at(8))
        records = simulate(plan, sites, folder / "coordinator")
        assert [record.is_secure for record in records] == [name == "masked"] * 2
        file = CoordinatorJournal(folder / "coordinator").open_state(2, "global")
        states[name] = np.concatenate([file.read(key).reshape(-1) for key in file.names])
    assert np.abs(states["masked"] - states["clear"]).max() < 1e-5
    assert (states["masked"] != states["clear"]).any()


def test_a_site_leaves_and_the_rest_is_measured(tmp_path, model):
    sites = _sites(tmp_path, model)
    work = tmp_path / "coordinator"
    plan = _plan(tmp_path, model)
    simulate(plan, sites, work)
    coordinator = open_coordinator(plan, sites, work)
    network = SimulatedNetwork(site_workers(sites, coordinator))
    found = measure(coordinator, network, max_tokens=60)
    assert sorted(found.losses["global"]) == sorted(NAMES)
    assert sorted(found.contributions) == sorted(NAMES)
    made = prepare_without(coordinator, "west", tmp_path / "new")
    rest = [site for site in sites if site.name != "west"]
    records = simulate(plan, rest, made.work)
    assert [sorted(record.sites) for record in records] == [["north", "south"]] * 2
