"""``mutirao federate server``, ``site``, ``invite`` and ``simulate``: train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutirao.cli.options import AsJson, DryRun, Overrides, RecipeFile

if TYPE_CHECKING:
    from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord
    from mutirao.federated.plan import Plan, Site
    from mutirao.federated.recipe import Estimate, FederationRecipe


def server(
    config: RecipeFile = None,
    set_: Overrides = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Address to listen on. Default: all with certificates."),
    ] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Coordinate a federation: wait for its sites, and run all rounds.

    Interrupted, the same command goes on from the last finished round.
    """
    from mutirao.federated.flower.deployment import ANYWHERE, LOOPBACK, serve_coordinator
    from mutirao.federated.flower.invite import node_keys, open_run

    recipe = _load(config, set_)
    plan, coordinator, certificates = open_run(recipe)
    if dry_run:
        _print_estimate(recipe, plan, as_json=json)
        return
    with _progress(coordinator.work, plan, sorted(coordinator.sites)) as show:
        records = serve_coordinator(
            coordinator,
            port=recipe.port,
            host=host or (ANYWHERE if certificates else LOOPBACK),
            certificates=certificates,
            node_keys=node_keys(recipe) if certificates else (),
            on_watch=show,
        )
    _print_records(records, as_json=json)


def simulate(
    config: RecipeFile = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Run a federation on this machine, its sites in turns."""
    from mutirao.federated.recipe import open_plan, simulated_sites
    from mutirao.federated.simulation import simulate as run

    recipe = _load(config, set_)
    plan = open_plan(recipe)
    if dry_run:
        _print_estimate(recipe, plan, as_json=json)
        return
    sites = simulated_sites(recipe)
    work = recipe.coordinator_folder
    with _progress(work, plan, [site.name for site in sites]) as show:
        records = run(plan, sites, work, on_event=lambda _: show())
    _print_records(records, as_json=json)


def invite(
    config: RecipeFile = None,
    set_: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the invites.", metavar="FOLDER")
    ] = Path("invites"),
    json: AsJson = False,
) -> None:
    """Write one file for each site, with which it joins; those that are there stay."""
    import json as json_module

    from mutirao.federated.flower.invite import write_invites

    recipe = _load(config, set_)
    paths = write_invites(recipe, out)
    if json:
        typer.echo(json_module.dumps({"invites": [str(path) for path in paths]}, indent=2))
        return
    for path in paths:
        typer.echo(f"{path}: hand it to the site over a channel that others cannot read")


def site(
    invite: Annotated[Path, typer.Argument(help="The site's invite.")],
    data: Annotated[
        Path, typer.Option("--data", help="The site's text: a folder, or prepared data.")
    ],
    model: Annotated[Path, typer.Option("--model", help="The base model's folder.")],
    work: Annotated[
        Path, typer.Option("--work", help="Folder of the site's key, journal and logs.")
    ],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="The site's policy, a TOML file.")
    ] = None,
) -> None:
    """Take part in a federation until the coordinator or Ctrl-C ends it."""
    from mutirao.console import configure_logging, console
    from mutirao.federated.flower.invite import join, read_invite

    configure_logging()
    known = read_invite(invite)

    def tell(site: Site) -> None:
        console.print(f"site {site.name}, plan {known.plan_sha256}", soft_wrap=True)
        console.print(f"coordinator {known.connection.address}, key {known.coordinator_key}")
        for name, key in sorted(known.identities.items()):
            console.print(f"[dim]key of {name}: {key}[/]", soft_wrap=True)
        if policy is None:
            console.print("[yellow]no policy: this site trains whatever the coordinator asks[/]")

    join(known, model=model, data=data, work=work, policy=policy, on_ready=tell)


def _load(config: Path | None, overrides: list[str] | None) -> FederationRecipe:
    from mutirao.config import load_recipe
    from mutirao.federated.recipe import FederationRecipe

    return load_recipe(FederationRecipe, config, overrides or [])


def _print_estimate(recipe: FederationRecipe, plan: Plan, *, as_json: bool) -> None:
    import json as json_module

    from mutirao.federated.recipe import estimate

    found = estimate(recipe, plan)
    if as_json:
        typer.echo(json_module.dumps(found.to_json(), indent=2))
        return
    for line in _estimate_lines(found):
        typer.echo(line)


def _estimate_lines(found: Estimate) -> list[str]:
    from mutirao.console import format_bytes

    lines = [
        f"plan: {found.plan_sha256}",
        f"{found.num_values} trained values, {found.num_sites} sites, {found.num_rounds} rounds",
        f"each round: {format_bytes(found.upload_bytes)} from a site, "
        f"{format_bytes(found.download_bytes)} to it",
        f"once: {format_bytes(found.first_download_bytes)} to each site, the first state",
    ]
    if found.epsilon is None:
        return [*lines, "no differential privacy"]
    return [*lines, f"epsilon {found.epsilon:.3g} at delta {found.delta:g} after all rounds"]


def _print_records(records: list[RoundRecord], *, as_json: bool) -> None:
    import json as json_module

    from mutirao.console import format_bytes, format_duration

    if as_json:
        rows = [record.model_dump(mode="json") for record in records]
        typer.echo(json_module.dumps({"rounds": rows}, indent=2))
        return
    for record in records:
        sent = sum(each.bytes_sent for each in record.sites.values())
        missing = f", without {', '.join(record.missing)}" if record.missing else ""
        typer.echo(
            f"round {record.round}: {len(record.sites)} sites{missing}, {format_bytes(sent)} "
            f"received, {format_duration(record.seconds)}"
        )
    if records:
        typer.echo(f"final state: {records[-1].global_sha256}")


@contextmanager
def _progress(work: Path, plan: Plan, sites: list[str]) -> Iterator[Callable[[], None]]:
    """Show how the run stands, from the journal; what is yielded looks again."""
    from mutirao.console import step_progress
    from mutirao.federated.coordinator.journal import CoordinatorJournal

    journal = CoordinatorJournal(work)
    with step_progress() as bars:
        rounds = bars.add_task("rounds", total=plan.federated.num_rounds)
        answers = bars.add_task("waiting for sites", total=len(sites))

        def show() -> None:
            status = _status(journal)
            waiting = status.get("waiting", [])
            bars.update(rounds, completed=len(journal.records()))
            if status.get("phase"):
                told = f"round {status['round']}, {status['phase']}"
                names = f": {', '.join(waiting)}" if waiting else ""
                done = len(sites) - len(waiting)
                bars.update(answers, description=told + names, completed=done)

        yield show


def _status(journal: CoordinatorJournal) -> dict[str, Any]:
    try:
        return journal.read_status()
    except ValueError:  # it is written anew just now
        return {}
