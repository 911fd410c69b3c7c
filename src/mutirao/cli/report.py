"""``mutirao report``: a run's page for people, made again from its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mutirao.cli.options import AsJson


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    json: AsJson = False,
) -> None:
    """Write RUN/report.html and print the run's tables."""
    from mutirao.console import console, output
    from mutirao.report import print_summary, summarize, write_report

    path = write_report(run)
    summary = summarize(run)
    if json:
        output.print_json(summary.to_json())
        return
    print_summary(summary, console)
    output.print(f"report: {path}", soft_wrap=True)
