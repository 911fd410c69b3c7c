"""A site's own copy of the final model."""

import pytest
from tiny_sites import FEDERATED, LORA, TRAIN, make_model, make_silo, make_site

from mutirao.artifact import open_artifact
from mutirao.errors import InputError
from mutirao.federated.audit.log import LOG_NAME
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.simulation import simulate
from mutirao.federated.site.personal import personalise


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    return make_model(tiny_model_directory, tmp_path_factory.mktemp("personal") / "model")


@pytest.mark.parametrize(("lora", "kind"), [(LORA, "adapter"), (None, "model")])
def test_a_site_goes_on_alone_and_nothing_leaves_it(tmp_path, model, lora, kind):
    sites = [
        make_site(tmp_path, model, make_silo(tmp_path / f"{name}-data", seed=seed), name)
        for seed, name in enumerate(("north", "south"))
    ]
    config = FEDERATED.model_copy(update={"num_rounds": 2})
    work = tmp_path / "coordinator"
    train = TRAIN.model_copy(update={"final_learning_rate_share": 1.0})
    simulate(write_start(model, work, config, lora, train, 0), sites, work)
    log = (sites[0].work / LOG_NAME).read_bytes()
    made = personalise(sites[0], tmp_path / "own")
    open_artifact(tmp_path / "own", kind)
    assert made.metrics["heldout_loss_after"] < made.metrics["heldout_loss_before"]
    assert made.recipe["is_private"] is False
    assert (sites[0].work / LOG_NAME).read_bytes() == log
    again = personalise(sites[0], tmp_path / "again")
    assert again.files == made.files


def test_a_site_that_took_part_in_nothing_is_told(tmp_path, model):
    site = make_site(tmp_path, model, make_silo(tmp_path / "data"), "north")
    with pytest.raises(InputError, match="took part in no run yet"):
        personalise(site, tmp_path / "own")
