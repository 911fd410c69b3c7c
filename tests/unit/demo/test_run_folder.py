"""A run's folder is not written over by another subject, and keeps what is not the run's."""

import pytest

from mutirao.artifact import write_artifact
from mutirao.compress.config import CompressConfig
from mutirao.config import parse_recipe
from mutirao.demo.recipe import DemoRecipe, label_compressions
from mutirao.demo.road import Road, check_recipe, compress_steps
from mutirao.demo.run_folder import refuse_other_subject, remove_stale
from mutirao.demo.steps import Step, do_step
from mutirao.errors import InputError, RecipeError


def _silos(tmp_path, *names):
    folders = {name: str(tmp_path / name) for name in names}
    return DemoRecipe(silos=folders)


def test_a_run_on_other_silos_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(_silos(tmp_path, "a", "b").model_dump_json())
    refuse_other_subject(tmp_path, _silos(tmp_path, "a", "b"))
    with pytest.raises(InputError, match="--fresh"):
        refuse_other_subject(tmp_path, DemoRecipe())
    with pytest.raises(InputError, match="silos"):
        refuse_other_subject(tmp_path, _silos(tmp_path, "a", "c"))


def test_other_settings_of_the_same_run_are_fine(tmp_path):
    (tmp_path / "recipe.json").write_text(DemoRecipe().model_dump_json())
    refuse_other_subject(tmp_path, DemoRecipe(question="Another?"))


def test_only_what_a_step_made_is_removed(tmp_path):
    def make(path):
        def write():
            with write_artifact(path, "data") as writer:
                (writer.path / "file").write_text("x")

        return Step(path, write)

    old, kept = tmp_path / "compressed" / "2-bit", tmp_path / "compressed" / "8-bit"
    for path in (old, kept):
        do_step(make(path), tmp_path / "steps")
    (tmp_path / "compressed" / "my own").mkdir()
    (tmp_path / "compressed" / "notes.txt").write_text("mine")
    remove_stale(tmp_path, {kept})
    left = sorted(path.name for path in (tmp_path / "compressed").iterdir())
    assert left == ["8-bit", "my own", "notes.txt"]


@pytest.mark.parametrize("second", ["same", "same/inner"])
def test_silos_must_not_share_a_folder(tmp_path, second):
    silos = {"a": str(tmp_path / "same"), "b": str(tmp_path / second)}
    with pytest.raises(RecipeError, match="share a folder"):
        parse_recipe(DemoRecipe, {"silos": silos})


@pytest.mark.parametrize("compress", [[], [{"bits": 4}, {"bits": 4, "group_size": 64}]])
def test_each_bit_width_is_named_once(compress):
    with pytest.raises(RecipeError, match="each once"):
        parse_recipe(DemoRecipe, {"compress": compress})


def test_silos_that_train_in_turns_are_refused(tmp_path):
    recipe = parse_recipe(DemoRecipe, {"federated": {"turns": 2}})
    with pytest.raises(RecipeError, match="each silo alone"):
        check_recipe(recipe)


def test_compressed_models_are_told_apart_by_method_where_they_share_bits(tmp_path):
    assert label_compressions(DemoRecipe().compress) == ["8-bit", "4-bit", "3-bit"]
    ways = [
        CompressConfig(method="rtn"),
        CompressConfig(method="nf4"),
        CompressConfig(method="magnitude,rtn", bits=8),
        CompressConfig(bits=3),
        CompressConfig(method="fp8"),
    ]
    labels = ["rtn-4-bit", "nf4-4-bit", "magnitude+rtn-8-bit", "3-bit", "fp8-8-bit"]
    steps = compress_steps(Road(DemoRecipe(compress=ways), tmp_path))
    assert [step.path for step in steps[::2]] == [tmp_path / "compressed" / each for each in labels]
    assert [step.path for step in steps[1::2]] == [
        tmp_path / "evaluation" / each for each in labels
    ]
    for same in ([], [CompressConfig(), CompressConfig(group_size=64)]):
        with pytest.raises(ValueError, match="by method and bits, and each once"):
            DemoRecipe(compress=same)
