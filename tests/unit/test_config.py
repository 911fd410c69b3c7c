"""Recipes: reading, overriding, explaining what is wrong, and the template that is written."""

import json
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator, model_validator

from mutirao.config import (
    Config,
    load_json,
    load_recipe,
    parse_recipe,
    recipe_schema,
    recipe_template,
)
from mutirao.errors import RecipeError


class Silo(Config):
    name: str
    """Name of the silo."""
    weight: float = 1.0
    """Share, dimensionless."""


class Tune(Config):
    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    learning_rate: float = 1e-3
    """Step size, dimensionless.
    A second line."""
    kind: Literal["lora", "full"] = "lora"
    """What is trained."""

    @field_validator("learning_rate")
    @classmethod
    def check_rate(cls, rate: float) -> float:
        if rate > 1:
            raise ValueError(f"learning_rate={rate} is too large (expected at most 1)")
        return rate


class Recipe(Config):
    tune: Tune = Tune()
    """How to tune."""
    silos: tuple[Silo, ...] = (Silo(name="a"), Silo(name='b "é"', weight=0.5))
    """Who takes part."""
    seed: int | None = None
    """Random seed."""
    names: tuple[str, ...] = ("x", "y")
    """Plain names."""
    limits: dict[str, int] = Field(default={"a": 1, "b c": 2})
    """Limits by name."""
    is_private: bool = True
    """Whether it is private."""

    @model_validator(mode="after")
    def check_seed(self) -> "Recipe":
        if self.seed == 13:
            raise ValueError("the seed must not be 13 here")
        return self


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_defaults_file_and_overrides(tmp_path: Path) -> None:
    assert load_recipe(Recipe) == Recipe()
    path = write(tmp_path, "seed = 3\n[tune]\nrank = 4\nkind = 'full'\n[[silos]]\nname = 'z'\n")
    recipe = load_recipe(Recipe, path, ["tune.rank=16", "names=['n']", "tune.kind=lora"])
    assert (recipe.seed, recipe.tune.rank, recipe.tune.kind) == (3, 16, "lora")
    assert recipe.names == ("n",)
    assert recipe.silos == (Silo(name="z"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[tune]\nrnak = 4", r"unknown key tune\.rnak \(did you mean rank\?\)"),
        ("sede = 4", r"unknown key sede \(did you mean seed\?\)"),
        ("zzzz = 4", r"unknown key zzzz \(known keys: tune, silos, seed"),
        ("[[silos]]\nnam = 'a'\nname = 'b'", r"unknown key silos\.0\.nam \(did you mean name\?\)"),
        ("[[silos]]\nweight = 1", r"silos\.0\.name is missing"),
        (
            "[tune]\nrank = 0",
            r"tune\.rank=0 is not accepted \(expected greater than or equal to 1\)",
        ),
        ("[tune]\nrank = 'x'", r'tune\.rank="x" is not accepted \(expected a valid integer'),
        (
            "[tune]\nkind = 'loar'",
            r"tune\.kind=\"loar\" is not accepted \(expected 'lora' or 'full'",
        ),
        ("[tune]\nlearning_rate = 2", r"tune\.learning_rate: learning_rate=2\.0 is too large"),
        ("seed = 13", r"recipe\.toml: the seed must not be 13 here"),
        ("tune = 3", r"tune=3 is not accepted"),
        ("seed = 1979-05-27", r"seed="),
        ("seed = ", r"is not valid TOML: "),
        (b"seed = '\xe9'", r"is not UTF-8 text"),
        ("names = " + "[" * 100_000, r"is not valid TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(Recipe, path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(Recipe, {"a_key": 1, "tune": {"rank": -1}})
    assert "a_key" in str(caught.value)
    assert "tune.rank=-1" in str(caught.value)


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist; `mutirao init`"):
        load_recipe(Recipe, tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(Recipe, tmp_path)


@pytest.mark.parametrize("override", ["", "rank", "=3", "tune.=3", ".rank=3"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(RecipeError, match="is not understood"):
        load_recipe(Recipe, overrides=[override])


def test_override_inside_a_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="seed is a value, not a table"):
        load_recipe(Recipe, write(tmp_path, "seed = 3"), ["seed.x=1"])


def test_configs_are_frozen_and_documented() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().tune.rank = 3  # type: ignore[misc]
    schema = recipe_schema(Recipe)
    assert schema["properties"]["seed"]["description"] == "Random seed."
    assert schema["$defs"]["Tune"]["additionalProperties"] is False
    json.dumps(schema)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(seed=4, is_private=False, names=(), limits={}, tune=Tune(learning_rate=1e-30)),
        Recipe(names=('quote " and \\ and \n', "ção 😀 \x7f"), limits={'key "=': 3}),
        Recipe(silos=(Silo(name="only"),)),
    ],
)
def test_template_loads_back_as_the_same(tmp_path: Path, recipe: Recipe) -> None:
    text = recipe_template(recipe)
    assert load_recipe(Recipe, write(tmp_path, text)) == recipe
    assert tomllib.loads(text)["tune"]["kind"] == "lora"
    assert "# Rank of the update.\nrank = 8" in text
    assert "# A second line." in text


def test_load_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    recipe = Recipe(seed=4)
    path.write_text(recipe.model_dump_json())
    assert load_json(Recipe, path) == recipe
    for content in ("{", '{"sede": 1}', "[]", "null", "[" * 100_000):
        path.write_text(content)
        with pytest.raises(RecipeError, match=r"x\.json"):
            load_json(Recipe, path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_json(Recipe, tmp_path / "none.json")
