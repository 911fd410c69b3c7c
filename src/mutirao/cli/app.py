"""The verbs together."""

from __future__ import annotations

from typing import Annotated

import typer

from mutirao import __version__
from mutirao.cli import (
    advise,
    compress,
    data,
    demo,
    doctor,
    export,
    federate,
    init,
    plan,
    report,
    run,
    schema,
    serve,
)

app = typer.Typer(
    name="mutirao",
    help="Train one language model across organisations that may not pool their data, and run "
    "it privately.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""


app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
app.command("init")(init.init)
app.command("report")(report.report)
app.command("advise")(advise.advise)
app.command("compress")(compress.compress)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("chat")(run.chat)
app.command("serve")(serve.serve)
app.add_typer(data.app, name="data")
app.add_typer(federate.app, name="federate")
