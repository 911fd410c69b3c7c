"""A site of two processes answers as one of one does, and as it did before one was killed."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny_sites import (
    FEDERATED,
    TRAIN,
    TinyCoordinator,
    make_model,
    make_packed,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.errors import FederationError
from mutirao.federated.codec import CodecConfig
from mutirao.federated.messages import UpdateAnswer, read_fields
from mutirao.federated.plan import PrivacyConfig
from mutirao.federated.site import ranks as ranks_module
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.ranks import RankProcesses, name_tensors, part_tensors
from mutirao.federated.site.trainer import LocalTrainer
from mutirao.federated.site.worker import SiteWorker
from mutirao.train.config import PrivateConfig
from mutirao.tune.config import LoRAConfig

EXACT = FEDERATED.model_copy(update={"upload": CodecConfig(format="fp32")})
FLOAT32 = TRAIN.model_copy(update={"compute_dtype": "float32"})


def content(answer):
    """What must not depend on crashes: all but how long it took."""
    assert answer.kind == "update", answer.fields
    numbers = read_fields(UpdateAnswer, answer).model_dump(exclude={"seconds"})
    return numbers, {name: payload.tobytes() for name, payload in answer.payloads.items()}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def cache():
    made = ModelCache()
    yield made
    made.clear()


def difference(coordinator, one, two):
    """How far two updates are apart, by their norm; Adam steps far on what is but rounding."""
    first, second = (
        np.concatenate([each.ravel() for _, each in sorted(coordinator.decode(answer).items())])
        for answer in (one, two)
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


def test_two_processes_train_records_and_one_that_is_killed_changes_nothing(
    tmp_path, tiny_model_directory, cache, monkeypatch
):
    model = make_model(tiny_model_directory, tmp_path / "model")
    silo = make_silo(tmp_path / "silo")
    lora = LoRAConfig(rank=2, alpha=4, target_modules=("q_proj", "down_proj"), freeze_a=False)
    federated = EXACT.model_copy(update={"aggregation": "fedex"})
    plan, start = make_plan(model, lora=lora, federated=federated, train=FLOAT32)
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
    alone = SiteWorker(make_site(tmp_path / "alone", model, silo))
    site = make_site(tmp_path / "two", model, silo, num_processes=2)
    worker = SiteWorker(site, public_models=cache)
    first = coordinator.whole(1)
    answer = worker.answer(first)
    assert difference(coordinator, alone.answer(first), answer) < 1e-2
    (pid,) = cache.ranks(site).process_ids

    second = coordinator.whole(2)  # goes on from the optimizer of round 1
    again = worker.answer(second)
    assert cache.ranks(site).process_ids == [pid]  # it was kept
    assert difference(coordinator, alone.answer(second), again) < 1e-2

    # The same site once more, whose rank is killed after the first step of round 2.
    site = make_site(tmp_path / "killed", model, silo, num_processes=2)
    worker = SiteWorker(site, public_models=cache)
    assert content(worker.answer(first)) == content(answer)
    assert not is_alive(pid)  # another site's ranks end
    (pid,) = cache.ranks(site).process_ids
    progress = ranks_module.Ranks.sum_gradients
    killed = []

    def kill_once(self, *arguments):
        if len(killed) == 1:
            os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        return progress(self, *arguments)

    monkeypatch.setattr(ranks_module.Ranks, "sum_gradients", kill_once)
    assert content(worker.answer(second)) == content(again)
    assert "lost a rank" in (site.work / "log.jsonl").read_text()
    (pid,) = cache.ranks(site).process_ids
    cache.clear()
    assert not is_alive(pid)
    assert not (site.work / "ranks").exists()


def test_two_processes_train_all_weights_over_packed_text(tmp_path, tiny_model_directory, cache):
    model = make_model(tiny_model_directory, tmp_path / "model")
    silo = make_packed(tmp_path / "packed")
    federated = EXACT.model_copy(update={"tokens_per_round": 384})
    plan, start = make_plan(model, lora=None, federated=federated, train=FLOAT32)
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
    request = coordinator.whole(1)
    site = make_site(tmp_path / "two", model, silo, num_processes=2)
    two = SiteWorker(site, public_models=cache).answer(request)
    one = SiteWorker(make_site(tmp_path / "one", model, silo)).answer(request)
    assert difference(coordinator, one, two) < 1e-2
    numbers = read_fields(UpdateAnswer, one)
    assert read_fields(UpdateAnswer, two).num_tokens == numbers.num_tokens
    assert read_fields(UpdateAnswer, two).train_loss == pytest.approx(numbers.train_loss, rel=1e-5)


def test_what_cannot_be_is_said_in_one_sentence(tmp_path, tiny_model_directory, monkeypatch):
    model = make_model(tiny_model_directory, tmp_path / "model")
    silo = make_silo(tmp_path / "silo", units=4)
    training = PrivateConfig(num_units=4, units_per_step=2, noise_multiplier=1)
    privacy = PrivacyConfig(epsilon=8, delta=1e-3, training=training)
    plan, start = make_plan(model)
    site = make_site(tmp_path, model, silo, num_processes=2)
    federated = plan.federated.model_copy(update={"privacy": privacy})
    private = plan.model_copy(update={"federated": federated})
    with pytest.raises(FederationError, match=r"num_processes=2 .* differential privacy"):
        LocalTrainer(site, private)

    started = tmp_path / "started"
    dying = tmp_path / "dying"
    dying.write_text(f"#!/bin/sh\necho x >> {started}\nexit 7\n")
    dying.chmod(0o755)
    monkeypatch.setattr(ranks_module.sys, "executable", str(dying))
    coordinator = TinyCoordinator(tmp_path / "coordinator", plan, start)
    answer = SiteWorker(site).answer(coordinator.whole(1))
    assert answer.kind == "refusal"
    assert "lost 3 times in round 1" in answer.fields["sentence"]
    assert "rank 1 ended with exit code 7" in answer.fields["sentence"]
    assert started.read_text().count("x") == ranks_module.MAX_LOSSES


def test_processes_end_with_their_owner(tmp_path, monkeypatch):
    site = make_site(tmp_path, tmp_path, tmp_path, num_processes=3)
    sleeping = tmp_path / "sleeping"
    sleeping.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeping.chmod(0o755)
    monkeypatch.setattr(ranks_module.sys, "executable", str(sleeping))
    processes = RankProcesses(site)
    processes._processes += [ranks_module._start(), ranks_module._start()]
    ids = processes.process_ids
    assert all(is_alive(pid) for pid in ids)
    del processes
    for _ in range(50):
        if not any(is_alive(pid) for pid in ids):
            return
        time.sleep(0.1)
    pytest.fail("a rank outlived its owner")


def test_tensors_of_a_round_come_apart_as_they_were_put_together():
    trained = {"model.a b": torch.ones(2)}
    history = {"layers.0": (torch.ones(3, 1), torch.zeros(1, 2))}
    optimizer = {0: {"step": torch.tensor(2.0), "exp_avg": torch.ones(2)}, 11: {}}
    found = part_tensors(name_tensors(trained, history, optimizer))
    assert found == (trained, history, {0: optimizer[0]})
