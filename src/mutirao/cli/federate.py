"""``mutirao federate``: train together, and show what left a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutirao.cli import federation
from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from mutirao.federated.audit.check import Totals, Verification
    from mutirao.federated.audit.record import AuditRecord, Release

app = typer.Typer(
    help="Train together with others; show and check what left a site.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("simulate")(federation.simulate)
app.command("server")(federation.server)
app.command("invite")(federation.invite)
app.command("site")(federation.site)
app.command("moments")(federation.moments)
app.command("unlearn")(federation.unlearn)
app.command("personalise")(federation.personalise)

_MANY = 10
"""Tensor names that a line shows before it only counts them."""


@app.command("audit")
def audit(
    log: Annotated[Path, typer.Argument(help="A site's audit log, audit.jsonl.")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            help="The site's public key, known from elsewhere: a PEM file or 64 hexadecimal "
            "digits. Default: the key that the log itself names.",
            metavar="PUBLIC_KEY",
        ),
    ] = None,
    receipt: Annotated[
        list[Path] | None,
        typer.Option(
            "--receipt",
            help="A head of the log, or a receipt of one, kept elsewhere; may be given again.",
            metavar="FILE",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Print what left a site, and verify that nothing was altered or removed."""
    import json as json_module

    from mutirao.federated.audit.check import verify_log
    from mutirao.federated.identity import parse_public_key

    verification = verify_log(log, parse_public_key(key) if key else None, receipt or ())
    if json:
        typer.echo(json_module.dumps(_to_json(verification), indent=2))
    else:
        _print(verification)
    verification.require_whole()


@app.command("keys")
def keys(
    out: Annotated[Path, typer.Argument(help="Folder of the files.")],
    coordinator: Annotated[
        bool,
        typer.Option("--coordinator", help="Make a coordinator's certificates instead."),
    ] = False,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="Host name or IP address under which sites reach the coordinator; may be given "
            "again.",
            metavar="HOST",
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Make a site's key pair, or a coordinator's certificates.

    A site's key says who it is, and signs its audit log; it belongs in the folder "identity" of
    the site's work folder. A coordinator's own key is made with its work.
    """
    import json as json_module

    if coordinator:
        from mutirao.federated.flower.certificates import make_certificates

        made = make_certificates(out, host or [])
        files = {"ca": made.ca, "certificate": made.server, "key": made.server_key}
        told = {name: str(path) for name, path in files.items()}
        lines = [
            f"{made.ca}: the authority's certificate, which goes to the sites with their invites",
            f"{made.server}: the coordinator's certificate",
            f"{made.server_key}: its private key; it stays here",
        ]
    else:
        if host:
            raise typer.BadParameter("--host belongs to --coordinator")
        from mutirao.federated.identity import PRIVATE_NAME, PUBLIC_NAME, make_identity, public_hex

        public_key = public_hex(make_identity(out))
        private, public = str(out / PRIVATE_NAME), str(out / PUBLIC_NAME)
        told = {"public_key": public_key, "private_file": private, "public_file": public}
        lines = [
            f"{private}: the private key; it stays at the site, and a copy in its safe",
            f"{public}: the public key, for whoever checks the site's log",
            f"public key: {public_key}",
        ]
    typer.echo(json_module.dumps(told, indent=2) if json else "\n".join(lines))


def _to_json(verification: Verification) -> dict[str, Any]:
    from dataclasses import asdict

    from mutirao.federated.audit.check import total_bytes

    totals = total_bytes(verification.records)
    return {
        "whole": verification.fault is None,
        "fault": asdict(verification.fault) if verification.fault else None,
        "notes": verification.notes,
        "public_key": verification.public_key,
        "totals": {"num_bytes": totals.num_bytes, **asdict(totals)},
        "records": [record.model_dump(mode="json") for record in verification.records],
    }


def _print(verification: Verification) -> None:
    from mutirao.federated.audit.check import total_bytes

    for record in verification.records:
        typer.echo(_printable(_line(record)))
    for line in _total_lines(total_bytes(verification.records)):
        typer.echo(_printable(line))
    for note in verification.notes:
        typer.echo(f"note: {note}")
    if verification.fault is None:
        num_records, key = len(verification.records), verification.public_key
        typer.echo(f"whole: {num_records} records" + (f", signed with {key}" if key else ""))


def _line(record: AuditRecord) -> str:
    """Return one record in one line."""
    entry = record.entry
    start = f"{record.sequence} {record.time}"
    if entry.event == "opening":
        return f"{start} opened: the log of site {entry.site}, key {entry.public_key}"
    if entry.event == "torn line":
        return f"{start} an unfinished line of {entry.num_bytes} bytes was kept in {entry.kept_in}"
    where = f"run {entry.run}" + (f" round {entry.round}" if entry.round is not None else "")
    what = f"{entry.kind}: {entry.content}" if entry.content else entry.kind
    return (
        f"{start} {where} to {entry.recipient}: {entry.payload_bytes} bytes, {what} "
        f"[{', '.join(_protections(entry))}; sha256 {entry.payload_sha256}]"
    )


def _protections(release: Release) -> list[str]:
    """Return in words how a payload was encoded and protected."""
    names = release.tensors
    told = [release.codec]
    if names:
        told.append(", ".join(names) if len(names) <= _MANY else f"{len(names)} tensors")
    mask, noise = release.mask, release.noise
    told.append(f"masked among {mask.cohort_size} sites" if mask else "not masked")
    told.append(
        f"noise {noise.noise_multiplier:g}, clip {noise.clip_norm:g}, epsilon {noise.epsilon:g} "
        f"at delta {noise.delta:g}"
        if noise
        else "no noise"
    )
    policy = release.policy_sha256
    told.append(f"policy {policy[:12]}" if policy else "no policy")
    return told


def _total_lines(totals: Totals) -> list[str]:
    groups = {"day": totals.per_day, "run": totals.per_run, "kind": totals.per_kind}
    told = [
        f"{name} {key}: {num_bytes} bytes"
        for name, group in groups.items()
        for key, num_bytes in group.items()
    ]
    return [*told, f"in all: {totals.num_bytes} bytes"]


def _printable(text: str) -> str:
    """Return a text that is safe for a terminal: a log's strings come from other machines."""
    return "".join(each if each.isprintable() else " " for each in text)
