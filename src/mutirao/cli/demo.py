"""``mutirao demo``: the whole road on real text and a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mutirao.cli.options import AsJson, DryRun, Overrides, RecipeFile


def demo(
    silo: Annotated[
        list[str] | None,
        typer.Option(
            "--silo", help="Your own folder of text, at least two of them.", metavar="NAME=FOLDER"
        ),
    ] = None,
    config: RecipeFile = None,
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run; default: runs/demo under MUTIRAO_HOME."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw away an earlier run in that folder first.")
    ] = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Train one model in three places, compress it, ask it, and write a report.

    Interrupted, the same command goes on from the last finished stage.
    """
    from mutirao.config import load_recipe
    from mutirao.console import console, output
    from mutirao.demo.recipe import DemoRecipe
    from mutirao.environment import runs_directory

    overrides = [*_silo_overrides(silo or []), *(set_ or [])]
    recipe = load_recipe(DemoRecipe, config, overrides)
    run = (out or runs_directory() / "demo").expanduser()
    if dry_run:
        from mutirao.demo.estimate import estimate_demo, print_estimate

        print_estimate(estimate_demo(recipe, run), as_json=json)
        return
    from mutirao.demo.runner import run_demo

    path = run_demo(recipe, run, fresh=fresh)
    from mutirao.report import print_summary, summarize

    summary = summarize(run)
    if json:
        output.print_json(summary.to_json())
        return
    print_summary(summary, console)
    output.print(f"report: {path}", soft_wrap=True)


def _silo_overrides(silos: list[str]) -> list[str]:
    """Turn --silo NAME=FOLDER into recipe overrides, one table for all."""
    from mutirao.errors import RecipeError

    if not silos:
        return []
    folders: dict[str, str] = {}
    for text in silos:
        name, separator, folder = text.partition("=")
        if not separator or not name or not folder:
            raise RecipeError(f"--silo {text} is not understood (expected NAME=FOLDER)")
        if name in folders:
            raise RecipeError(f"--silo {name} was given twice; every silo needs its own name")
        folders[name] = str(Path(folder).expanduser().resolve())
    from mutirao.config import toml_value

    table = ", ".join(f"{toml_value(name)} = {toml_value(path)}" for name, path in folders.items())
    return [f"silos={{{table}}}"]
