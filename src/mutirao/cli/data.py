"""``mutirao data``: a site's own text, made ready to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.options import AsJson, Overrides, RecipeFile

if TYPE_CHECKING:
    from mutirao.data.prepare import PreparationReport

app = typer.Typer(
    help="Make a site's own text ready to train on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("prepare")
def prepare(
    folder: Annotated[Path, typer.Argument(help="The site's files.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    config: RecipeFile = None,
    overrides: Overrides = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            help="The site's secret key, for surrogates and the audit; made where there is none. "
            "By default, in Mutirão's own folder.",
            metavar="FILE",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first file or row that cannot be read.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Read, filter, deduplicate, take identifiers out, and split into train and held-out."""
    from mutirao.config import load_recipe
    from mutirao.data.config import DataConfig
    from mutirao.data.identifiers.surrogates import site_key
    from mutirao.data.prepare import prepare_silo
    from mutirao.data.readers.problems import CountedProblems, Problems
    from mutirao.environment import home_directory

    settings = load_recipe(DataConfig, config, overrides or ())
    report = prepare_silo(
        folder.resolve().name,
        folder,
        out,
        settings,
        key=site_key(key or home_directory() / "keys" / "identifiers"),
        problems=Problems() if strict else CountedProblems(),
    )
    if json:
        typer.echo(report.model_dump_json(indent=2))
        return
    _print(report, out)


def _print(report: PreparationReport, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mutirao.console import console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("records read", f"{report.num_records_in:,}")
    for reason, count in report.dropped.items():
        table.add_row(f"  dropped: {escape(reason)}", f"{count:,}")
    table.add_row("kept to train on", f"{report.num_train:,}")
    table.add_row("kept to evaluate on", f"{report.num_heldout:,}")
    for type_, count in report.identifiers.items():
        table.add_row(f"  {type_} found", f"{count:,}")
    console.print(table)
    for kind, count in report.problems.items():
        places = ", ".join(report.problem_places[kind])
        console.print(f"[yellow]not read[/]: {escape(kind)}, {count:,} times ({escape(places)})")
    console.print(f"[bold red]{report.notice}[/]")
    console.print(f"in {escape(str(out))}: train.jsonl, heldout.jsonl, report.json, audit.jsonl")
