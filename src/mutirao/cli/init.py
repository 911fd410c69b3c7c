"""``mutirao init``: a complete recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.toml"),
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write a recipe that holds every key with its default and what it means."""
    from mutirao.artifact import write_atomic
    from mutirao.config import recipe_template
    from mutirao.demo.recipe import DemoRecipe
    from mutirao.errors import InputError

    if path.exists() and not force:
        raise InputError(f"{path} exists; name another file, or use --force to write over it")
    write_atomic(path, recipe_template(DemoRecipe()))
    typer.echo(f"wrote {path}; run it with: mutirao demo --config {path}")
