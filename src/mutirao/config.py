"""Recipes: one TOML file per run, checked key by key before anything starts.

Each component declares a small frozen ``Config`` beside the code it configures; a verb's
recipe is composed of them, and this module reads, overrides and explains any such recipe.
It knows nothing of the components themselves.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mutirao.errors import RecipeError


class Config(BaseModel):
    """Base of every configuration: frozen, without unknown keys, each field documented."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


C = TypeVar("C", bound=Config)


def load_recipe(kind: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Read a recipe, apply ``a.b=c`` overrides, and check it.

    Args:
        kind: the recipe's type; its defaults are used where the file is silent.
        path: TOML file, or None for the defaults alone.
        overrides: ``dotted.key=value``; values are TOML, bare words count as strings.

    Raises:
        RecipeError: the file is missing or not TOML, a key is unknown, a value is bad.
    """
    document = _read_toml(path) if path is not None else {}
    for override in overrides:
        _apply_override(document, override)
    return parse_recipe(kind, document, origin=str(path) if path else "recipe")


def parse_recipe(kind: type[C], document: dict[str, Any], origin: str = "recipe") -> C:
    """Check a recipe that is already a mapping.

    Raises:
        RecipeError: a key is unknown or a value is bad; all problems in one message.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(_explain(kind, dict(item)) for item in error.errors())
        raise RecipeError(f"{origin}: {problems}") from None


def load_json(kind: type[C], path: Path) -> C:
    """Read a configuration that one of our own processes wrote as JSON.

    Raises:
        RecipeError: the file is missing, is not JSON, or does not fit.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    return parse_recipe(kind, document, origin=str(path))


def recipe_schema(kind: type[Config]) -> dict[str, Any]:
    """Return the recipe's JSON schema, with descriptions and defaults."""
    return kind.model_json_schema()


def recipe_template(recipe: Config) -> str:
    """Return a recipe as a TOML text that explains every key, and loads back as the same."""
    return "\n".join(_template_lines(recipe, "")).strip() + "\n"


def _template_lines(config: Config, prefix: str) -> list[str]:
    """Lines of one table: its plain values first, as TOML wants, then the tables inside it."""
    plain: list[str] = []
    tables: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        comment = [f"# {line}" for line in (field.description or "").splitlines()]
        if isinstance(value, Config):
            tables += [
                "",
                *comment,
                f"[{prefix}{name}]",
                *_template_lines(value, f"{prefix}{name}."),
            ]
        elif isinstance(value, tuple) and value and isinstance(value[0], Config):
            tables += ["", *comment]
            for each in value:
                tables += [f"[[{prefix}{name}]]", *_template_lines(each, f"{prefix}{name}."), ""]
        elif isinstance(value, dict):
            pairs = ", ".join(
                f"{toml_value(key)} = {toml_value(each)}" for key, each in value.items()
            )
            plain += [*comment, f"{name} = {{{pairs}}}"]
        elif value is not None:
            plain += [*comment, f"{name} = {toml_value(value)}"]
    return plain + tables


def toml_value(value: Any) -> str:
    """Return one value as TOML; JSON's strings, numbers, booleans and lists are TOML's too."""
    if isinstance(value, tuple | list | set | frozenset):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # DEL is the one character that JSON leaves as it is and TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {path} does not exist; `mutirao init` writes one to start from"
        ) from None
    except (IsADirectoryError, PermissionError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {path} is not UTF-8 text; recipes are TOML files") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not valid TOML: {error}") from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or not all(names):
        raise RecipeError(f"--set {override} is not understood (expected dotted.key=value)")
    table = document
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {name} is a value, not a table")
    table[names[-1]] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[BaseModel], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _field_names(kind, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {name} ({hint})"
    if problem["type"] == "missing":
        return f"{name} is missing"
    accepted = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if problem["type"] == "value_error":
        return f"{name}: {accepted}" if name else accepted
    return f"{name}={_show(problem['input'])} is not accepted (expected {accepted})"


def _show(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return str(value)


def _field_names(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names accepted at a place in the recipe, following nested tables and lists."""
    for part in location:
        if part in kind.model_fields:
            nested = _nested_model(kind.model_fields[part].annotation)
            if nested is None:
                return []
            kind = nested
    return list(kind.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_nested_model(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)
