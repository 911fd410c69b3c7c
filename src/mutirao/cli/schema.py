"""``mutirao schema``: the JSON schema of a recipe."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON schema of the demonstration's recipe."""
    import json

    import typer

    from mutirao.config import recipe_schema
    from mutirao.demo.recipe import DemoRecipe

    typer.echo(json.dumps(recipe_schema(DemoRecipe), indent=2, ensure_ascii=False))
