"""``mutirao report``: a page for people, of a run, a federation or what left a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mutirao.cli.options import AsJson


def report(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, of a coordinator, or of a site (--evidence)."),
    ],
    json: AsJson = False,
    evidence: Annotated[
        bool,
        typer.Option("--evidence", help="Write the evidence sheet of the site whose folder it is."),
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="The site's policy file, for --evidence.", metavar="FILE"),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            help="The site's public key, for --evidence: a PEM file or 64 hexadecimal digits. "
            "Default: the one in the site's folder.",
            metavar="PUBLIC_KEY",
        ),
    ] = None,
    attacks: Annotated[
        Path | None,
        typer.Option(
            "--attacks", help="Results of privacy attacks, for --evidence.", metavar="FILE"
        ),
    ] = None,
    language: Annotated[
        str, typer.Option("--language", help="Of the evidence sheet: en or pt-BR.")
    ] = "en",
) -> None:
    """Write RUN/report.html, or RUN/evidence.html, and print the tables."""
    if evidence:
        _write_evidence(run, policy, key, attacks, language, json)
        return
    from mutirao.report.federation import is_federation

    if is_federation(run):
        _write_federation(run, json)
        return
    from mutirao.console import console, output
    from mutirao.report import print_summary, summarize, write_report

    path = write_report(run)
    summary = summarize(run)
    if json:
        output.print_json(summary.to_json())
        return
    print_summary(summary, console)
    output.print(f"report: {path}", soft_wrap=True)


def _write_federation(work: Path, json: bool) -> None:
    from mutirao.console import console, output
    from mutirao.report.federation import (
        print_federation,
        read_federation,
        write_federation_report,
    )

    path = write_federation_report(work)
    summary = read_federation(work)
    if json:
        output.print_json(summary.to_json())
        return
    print_federation(summary, console)
    output.print(f"report: {path}", soft_wrap=True)


def _write_evidence(
    work: Path,
    policy: Path | None,
    key: str | None,
    attacks: Path | None,
    language: str,
    json: bool,
) -> None:
    from mutirao.console import output
    from mutirao.report.federation.evidence import read_evidence
    from mutirao.report.federation.sheet import evidence_json, write_evidence

    path = write_evidence(work, policy=policy, key=key, attacks=attacks, language=language)
    if json:
        output.print_json(
            evidence_json(read_evidence(work, policy=policy, key=key, attacks=attacks))
        )
        return
    output.print(f"evidence: {path}", soft_wrap=True)
