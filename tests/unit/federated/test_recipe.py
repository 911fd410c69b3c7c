"""A federation's recipe: sites' keys as people hand them over, and a run without one of them."""

import pytest
from fake_federation import NAMES, FakeNetwork, FakeSite, make_coordinator, run
from typer.testing import CliRunner

from mutirao.artifact import write_atomic
from mutirao.cli.app import app
from mutirao.config import load_json
from mutirao.errors import InputError, RecipeError
from mutirao.federated.coordinator.journal import COORDINATOR_NAME
from mutirao.federated.identity import PRIVATE_NAME, PUBLIC_NAME, make_identity, public_hex
from mutirao.federated.plan import Coordinator, FederatedConfig, Plan, PrivacyConfig
from mutirao.federated.recipe import (
    PLAN_NAME,
    FederationRecipe,
    _privacy,
    open_plan,
    replay_run_without,
)
from mutirao.train.config import PrivateConfig


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def _recipe(tmp_path, **sites):
    return FederationRecipe(model=tmp_path / "model", work=tmp_path / "work", sites=sites)


def test_a_site_s_key_is_its_digits_or_its_file(tmp_path):
    key = public_hex(make_identity(tmp_path))
    recipe = _recipe(tmp_path, north=key, south=str(tmp_path / PUBLIC_NAME))
    assert recipe.public_keys() == {"north": key, "south": key}


@pytest.mark.parametrize("given", ["", "abc", "nowhere.pem", ".", PRIVATE_NAME])
def test_what_is_no_public_key_is_named(tmp_path, monkeypatch, given):
    make_identity(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"sites\.north=.*not a public key.*federate keys"):
        _recipe(tmp_path, north=given).public_keys()


@pytest.fixture
def begun(tmp_path):
    """A recipe whose run is finished."""
    coordinator = make_coordinator(tmp_path / "work" / "coordinator")
    path = coordinator.work / COORDINATOR_NAME
    write_atomic(path, coordinator.model_dump_json())
    run(coordinator, FakeNetwork({name: FakeSite(name) for name in NAMES}))
    path = tmp_path / "federation.toml"
    lines = [f'{name} = "{key}"' for name, key in coordinator.sites.items()]
    path.write_text('model = "model"\nwork = "work"\n[sites]\n' + "\n".join(lines))
    return path


def test_the_work_folder_without_a_site_fits_a_recipe_without_it(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["federate", "unlearn", "west", "--config", str(begun), "--out", "new"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "new: the run with 0 of its rounds" in result.output
    made = load_json(Coordinator, tmp_path / "new" / "coordinator" / COORDINATOR_NAME)
    assert "west" not in made.sites
    plan = made.plan
    recipe = FederationRecipe(
        model=tmp_path / "model",
        work=tmp_path / "new",
        sites=made.sites,
        federated=plan.federated,
        lora=plan.lora,
        train=plan.train,
        seed=plan.seed,
    )
    assert open_plan(recipe) == plan
    assert (tmp_path / "new" / PLAN_NAME).exists()


def test_a_run_that_has_not_begun_is_told_from_one_that_cannot_be_replayed(begun, tmp_path):
    with pytest.raises(RecipeError, match=r"coordinator\.json cannot be read"):
        replay_run_without(_recipe(tmp_path / "other", north="0" * 64), "north", tmp_path / "r")
    recipe = _recipe(tmp_path, north="0" * 64)
    with pytest.raises(InputError, match="took part in no round"):
        replay_run_without(recipe, "nobody", tmp_path / "r")


def test_a_site_s_privacy_is_that_of_its_own_turns():
    def spent(**federated):
        training = PrivateConfig(num_units=100, units_per_step=10.0, noise_multiplier=1.0)
        privacy = PrivacyConfig(epsilon=50.0, delta=1e-4, training=training)
        config = FederatedConfig(privacy=privacy, weighting="equal", **federated)
        return _privacy(Plan(model_sha256="0" * 64, federated=config))

    assert spent(num_rounds=5, turns=2) == spent(num_rounds=3)
    assert spent(num_rounds=5, turns=2) < spent(num_rounds=5)
