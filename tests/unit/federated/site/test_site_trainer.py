"""Training alone goes on from the site's own first round, and comes to the same."""

import pytest
import torch
from safetensors.numpy import load_file
from tiny_sites import (
    FEDERATED,
    TRAIN,
    TinyCoordinator,
    make_model,
    make_plan,
    make_silo,
    make_site,
)

from mutirao.errors import FederationError
from mutirao.federated.plan import PrivacyConfig
from mutirao.federated.site import trainer as trainer_module
from mutirao.federated.site.models import ModelCache
from mutirao.federated.site.trainer import LocalTrainer, train_alone
from mutirao.federated.site.worker import SiteWorker
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.config import PrivateConfig


@pytest.fixture
def world(tmp_path, tiny_model_directory):
    model = make_model(tiny_model_directory, tmp_path / "model")
    plan, start = make_plan(model)
    silo = make_silo(tmp_path / "silo")
    return model, silo, TinyCoordinator(tmp_path / "coordinator", plan, start)


def test_alone_begins_with_the_kept_first_round(world, tmp_path, monkeypatch):
    model, silo, coordinator = world
    fresh, kept = make_site(tmp_path, model, silo, "a"), make_site(tmp_path, model, silo, "b")
    told = []
    train_alone(fresh, coordinator.plan, tmp_path / "one", on_tokens=lambda *t: told.append(t))
    assert told[-1][1] == 360
    assert abs(told[-1][0] - 360) < 32  # whole examples
    SiteWorker(kept).answer(coordinator.whole(1))
    rounds = []
    train = LocalTrainer.train_round

    def spy(self, number, *arguments):
        rounds.append(number)
        return train(self, number, *arguments)

    monkeypatch.setattr(trainer_module.LocalTrainer, "train_round", spy)
    train_alone(kept, coordinator.plan, tmp_path / "two")
    assert rounds == [2, 3]
    one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_training_alone_needs_an_adapter(world, tmp_path):
    model, silo, coordinator = world
    full = coordinator.plan.model_copy(update={"lora": None})
    with pytest.raises(FederationError, match=r"plan\.lora is null"):
        train_alone(make_site(tmp_path, model, silo), full, tmp_path / "out")


def test_training_alone_is_not_compared_with_turns(world, tmp_path):
    model, silo, coordinator = world
    federated = coordinator.plan.federated.model_copy(update={"turns": 2})
    plan = coordinator.plan.model_copy(update={"federated": federated})
    with pytest.raises(FederationError, match=r"plan\.federated\.turns is 2"):
        train_alone(make_site(tmp_path, model, silo), plan, tmp_path / "out")


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_private_training_computes_as_the_plan_says(tmp_path, tiny_model_directory, compute_dtype):
    model = make_model(tiny_model_directory, tmp_path / "model")
    training = PrivateConfig(num_units=12, units_per_step=6.0, noise_multiplier=1.0)
    privacy = PrivacyConfig(epsilon=100.0, delta=1e-3, training=training, steps_per_round=1)
    federated = FEDERATED.model_copy(update={"privacy": privacy})
    train = TRAIN.model_copy(update={"compute_dtype": compute_dtype})
    plan, start = make_plan(model, federated=federated, train=train)
    site = make_site(tmp_path, model, make_silo(tmp_path / "silo", units=12))
    trainer = LocalTrainer(site, plan, ModelCache())
    trainer.start_round(start, 1)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with hook:
        trainer.train_private_round(1, None, PrivacyBudget(100.0, 1e-3), lambda paid: None)
    assert seen
    assert set(seen) == {compute_dtype == "bfloat16"}


@pytest.mark.parametrize(
    ("compute_dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_a_frozen_base_lies_as_it_is_computed(
    tmp_path, tiny_model_directory, compute_dtype, expected
):
    """And the adapter starts the same: it is drawn before."""
    model = make_model(tiny_model_directory, tmp_path / "model")
    plan, start = make_plan(model, train=TRAIN.model_copy(update={"compute_dtype": compute_dtype}))
    trainer = LocalTrainer(make_site(tmp_path, model, make_silo(tmp_path / "silo")), plan)
    frozen = {each.dtype for name, each in trainer.model.named_parameters() if "lora" not in name}
    assert frozen == {expected}
    assert {each.dtype for each in trainer.model.parameters() if each.requires_grad} == {
        torch.float32
    }
    made = trainer.get_state()
    assert all((made[name] == start[name]).all() for name in start)
