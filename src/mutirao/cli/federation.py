"""``mutirao federate server``, ``site``, ``invite``, ``simulate``, ``unlearn``: train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mutirao.cli.options import AsJson, DryRun, Overrides, RecipeFile

if TYPE_CHECKING:
    from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord
    from mutirao.federated.flower.invite import Invite
    from mutirao.federated.plan import Plan
    from mutirao.federated.recipe import Estimate, FederationRecipe

Trained = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder for what was trained: an adapter, or a model where all weights were.",
        metavar="FOLDER",
    ),
]


def server(
    config: RecipeFile = None,
    set_: Overrides = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="Address to listen on. Default: all with certificates."),
    ] = None,
    out: Trained = None,
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
    _finish(recipe, plan, records, out, as_json=json)


def simulate(
    config: RecipeFile = None,
    set_: Overrides = None,
    out: Trained = None,
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
    _finish(recipe, plan, records, out, as_json=json)


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
    dry_run: DryRun = False,
    json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print one JSON object.")
    ] = False,
) -> None:
    """Take part in a federation until Ctrl-C ends it.

    With --dry-run it connects to nobody, and prints what the invite says: the plan, and keys that
    are to be compared with their owners'.
    """
    import logging

    from mutirao.console import configure_logging
    from mutirao.federated.flower.invite import check_invited, join, read_invite

    configure_logging()
    logging.getLogger("mutirao.federated.flower").setLevel(logging.INFO)
    known = read_invite(invite)
    if dry_run:
        check_invited(known, work, policy)
        _print_invite(known, as_json=json)
        return

    def tell(_: object) -> None:
        _print_invite(known, with_plan=False)
        if policy is None:
            from mutirao.console import console

            console.print("[yellow]no policy: this site trains whatever the coordinator asks[/]")

    join(known, model=model, data=data, work=work, policy=policy, on_ready=tell)


def moments(
    data: Annotated[
        Path,
        typer.Option("--data", help="Text that everybody may see: a folder, or prepared data."),
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder.", metavar="FOLDER")],
    config: RecipeFile = None,
    set_: Overrides = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps to take the mean over.")
    ] = 500,
    json: AsJson = False,
) -> None:
    """Put second moments beside the base model, from which each site's AdamW starts.

    FOLDER becomes a copy of the recipe's model with them: hand it to every site, name it as the
    model, and set federated.second_moments.
    """
    import json as json_module

    from mutirao.console import step_progress
    from mutirao.federated.recipe import write_moments

    recipe = _load(config, set_)
    with step_progress() as progress:
        task = progress.add_task("tokens", total=steps * recipe.train.tokens_per_step)
        made = write_moments(
            recipe,
            data,
            out,
            num_steps=steps,
            on_tokens=lambda tokens: progress.update(task, completed=tokens),
        )
    num_steps = made.metrics["second_moment_steps"]
    if json:
        told = {"path": str(out), "steps": num_steps, "sha256": made.sha256}
        typer.echo(json_module.dumps(told, indent=2))
    else:
        typer.echo(f"{out}: the model with its second moments, from {num_steps} steps")


def unlearn(
    site: Annotated[str, typer.Argument(help="Name of the site that leaves.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder.", metavar="FOLDER")],
    config: RecipeFile = None,
    set_: Overrides = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay", help="Fold the kept updates of the others once more: seconds, approximate."
        ),
    ] = False,
) -> None:
    """Take a site's contribution out of a run.

    Exact: FOLDER becomes the work folder of a run that goes on from before the site's first round,
    and trains the rounds since anew, with the others. With --replay the updates that the others
    made are added up without the site's; they were made from states that it had helped to make.
    """
    from mutirao.federated.coordinator.journal import CoordinatorJournal
    from mutirao.federated.recipe import prepare_run_without, replay_run_without

    recipe = _load(config, set_)
    if replay:
        replayed = replay_run_without(recipe, site, out)
        typer.echo(
            f"{out / 'result'}: trained without site {site}, left out of "
            f"{len(replayed.rounds_with_site)} rounds; the change from the start differs by "
            f"{replayed.relative_distance:.1%}"
        )
        return
    made = prepare_run_without(recipe, site, out)
    num_kept = len(CoordinatorJournal(made.work).records())
    typer.echo(
        f"{out}: the run with {num_kept} of its rounds, none of which site {site} was in; set "
        f"work to this folder and take {site} out of the recipe, write invites, and serve"
    )


def personalise(
    work: Annotated[Path, typer.Argument(help="The site's work folder.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder.", metavar="FOLDER")],
    json: AsJson = False,
) -> None:
    """Train the final model a little further on this site's text alone; nothing leaves the site."""
    import json as json_module

    from mutirao.config import load_json
    from mutirao.console import step_progress
    from mutirao.federated.plan import Site
    from mutirao.federated.site.personal import personalise as train_personal

    site = load_json(Site, work / "site.json").model_copy(update={"work": work.resolve()})
    with step_progress() as progress:
        task = progress.add_task("training tokens", total=None)
        made = train_personal(
            site, out, on_tokens=lambda tokens: progress.update(task, completed=tokens)
        )
    losses = made.metrics["heldout_loss_before"], made.metrics["heldout_loss_after"]
    if json:
        told = {"path": str(out), "heldout_loss_before": losses[0], "heldout_loss_after": losses[1]}
        typer.echo(json_module.dumps(told, indent=2))
    else:
        before, after = (f"{each:.3f}" if isinstance(each, float) else "?" for each in losses)
        typer.echo(f"{out}: loss on this site's held-out text {before} → {after} nats per token")


def _print_invite(known: Invite, *, with_plan: bool = True, as_json: bool = False) -> None:
    """Print what an invite says, without its secrets."""
    if as_json:
        public = known.model_dump_json(exclude={"connection": {"node_key"}}, indent=2)
        typer.echo(public)
        return
    from mutirao.console import console

    console.print(f"site {known.site}, plan {known.plan_sha256}", soft_wrap=True)
    console.print(
        f"coordinator {known.connection.address}, key {known.coordinator_key}", soft_wrap=True
    )
    for name, key in sorted(known.identities.items()):
        console.print(f"[dim]key of {name}: {key}[/]", soft_wrap=True)
    if with_plan and known.plan is not None:
        typer.echo(known.plan.model_dump_json(indent=2))


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


def _finish(
    recipe: FederationRecipe,
    plan: Plan,
    records: list[RoundRecord],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Write what was trained if that is wanted, and print the rounds."""
    if out is not None:
        from mutirao.federated.recipe import write_trained

        write_trained(recipe, plan, out)
    _print_records(records, as_json=as_json)
    if out is not None and not as_json:
        typer.echo(f"trained: {out}")


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
                is_training = status["phase"] == "train"
                asked = plan.federated.group(sites, status["round"]) if is_training else sites
                done = len(asked) - len(waiting)
                bars.update(answers, description=told + names, completed=done, total=len(asked))

        yield show


def _status(journal: CoordinatorJournal) -> dict[str, Any]:
    try:
        return journal.read_status()
    except ValueError:  # it is written anew just now
        return {}
