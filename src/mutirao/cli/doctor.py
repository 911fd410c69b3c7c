"""``mutirao doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import typer

from mutirao.cli.options import AsJson


def doctor(json: AsJson = False) -> None:
    """Check the installation, the machine, the cache, and the optional parts."""
    from mutirao.cli.checkup import examine, print_findings

    findings = examine()
    if json:
        import json as json_module

        typer.echo(json_module.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        print_findings(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)
