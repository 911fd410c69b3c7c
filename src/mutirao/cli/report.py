"""``mutirao report``: a page for people, of a run, a federation, a site, an advice, or models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mutirao.cli.options import AsJson


def report(
    run: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run, of a coordinator, of a site (--evidence), of an advice, or of "
            "one or more compressed models."
        ),
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
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Page of compressed models. Default: beside the first one's folder.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Write RUN/report.html, RUN/evidence.html, or MODEL.html, and print the tables."""
    from mutirao.errors import InputError

    if not evidence and _write_models(run, out, json):
        return
    if out is not None:
        raise InputError("--out is for the page of compressed models; leave it out")
    if len(run) > 1:
        raise InputError(
            f"{len(run)} folders were named; only compressed models are shown together: name one"
        )
    _write_one(run[0], policy, key, attacks, language, json, evidence=evidence)


def _write_one(
    run: Path,
    policy: Path | None,
    key: str | None,
    attacks: Path | None,
    language: str,
    json: bool,
    *,
    evidence: bool,
) -> None:
    if evidence:
        _write_evidence(run, policy, key, attacks, language, json)
        return
    from mutirao.report.federation import is_federation

    if is_federation(run):
        _write_federation(run, json)
        return
    from mutirao.report.advice import is_advice

    if is_advice(run):
        _write_advice(run, json)
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


def _write_models(folders: list[Path], out: Path | None, json: bool) -> bool:
    """Write the page of compressed models; say whether the folders are models."""
    from mutirao.report.advice import is_model, print_models, read_models, write_models_report
    from mutirao.report.federation import is_federation

    if not any(not is_federation(folder) and is_model(folder) for folder in folders):
        return False
    from mutirao.console import console, output

    path = write_models_report(folders, out)
    models = read_models(folders)
    if json:
        output.print_json(data=[each.to_json() for each in models])
        return True
    print_models(models, console)
    output.print(f"report: {path}", soft_wrap=True, markup=False)
    return True


def _write_advice(folder: Path, json: bool) -> None:
    from mutirao.console import console, output
    from mutirao.report.advice import advice_json, print_advice, read_advice, write_advice_report

    path = write_advice_report(folder)
    advice = read_advice(folder)
    if json:
        output.print_json(data=advice_json(advice))
        return
    print_advice(advice, console)
    output.print(f"report: {path}", soft_wrap=True, markup=False)


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
