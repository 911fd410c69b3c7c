"""Runs the road stage by stage, each in a process of its own, and goes on where it stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from pydantic import JsonValue

from mutirao.artifact import write_atomic
from mutirao.console import configure_logging, console, format_bytes, format_duration
from mutirao.demo.meter import Meter
from mutirao.demo.recipe import DemoRecipe
from mutirao.demo.road import STAGES, Road, Stage, check_recipe
from mutirao.demo.run_folder import claim_folder, refuse_other_subject, remove_stale
from mutirao.demo.steps import do_step, is_done
from mutirao.environment import silence
from mutirao.errors import InputError, MutiraoError, explain_disk_errors
from mutirao.federated.flower.deployment import end_with_parent

STOP_GRACE_S = 20.0
MAX_SENTENCE = 4_000
"""Characters of a stage's error: well below what a pipe holds while nobody reads it."""
RECORD_KEYS = {"stage", "seconds", "peak_memory_bytes", "resumed"}


class StageError(MutiraoError):
    """A stage's process ended without a word of its own."""


def run_demo(recipe: DemoRecipe, run: Path, *, fresh: bool = False) -> Path:
    """Go the whole road, or what is left of it.

    Args:
        recipe: all settings.
        run: the run's folder; finished stages in it are kept.
        fresh: throw away an earlier run in the folder first.

    Returns:
        The path of the report.

    Raises:
        MutiraoError: a stage failed; the finished ones are kept.
    """
    check_recipe(recipe)
    with claim_folder(run, fresh=fresh):
        refuse_other_subject(run, recipe)
        return _go(Road(recipe, run.resolve()))


def _go(road: Road) -> Path:
    run, recipe = road.run, road.recipe
    write_atomic(run / "recipe.json", recipe.model_dump_json(indent=1))
    remove_stale(run, {step.path for stage in STAGES for step in stage.steps(road)})
    records = _read_records(run)
    for number, stage in enumerate(STAGES, start=1):
        record = run_stage(road, stage, f"[{number}/{len(STAGES)}]", records.get(stage.name))
        if record is not None:
            records[stage.name] = record
            rows = [records[each.name] for each in STAGES if each.name in records]
            write_atomic(run / "stages.json", json.dumps(rows, indent=1))
    from mutirao.report import write_report

    return write_report(run)


def run_stage(
    road: Road, stage: Stage, prefix: str, earlier: dict[str, JsonValue] | None
) -> dict[str, JsonValue] | None:
    """Run what is left of one stage.

    Args:
        road: the run.
        stage: which stage.
        prefix: shown before its title.
        earlier: the stage's record of an earlier call, if any.

    Returns:
        The stage's record: time and peak memory; None where it has no step.
    """
    steps = stage.steps(road)
    if not steps:
        return None
    if all(_is_ready(road, stage)):
        console.print(f"[green]✓[/] {prefix} {stage.title} [dim](kept from before)[/]")
        known: dict[str, JsonValue] = {"seconds": 0.0, "peak_memory_bytes": 0}
        return {**known, **(earlier or {}), "stage": stage.name, "resumed": True}
    console.print(f"[bold]▸ {prefix} {stage.title}[/]")
    with Meter() as meter:
        _run_apart(road, stage)
    console.print(
        f"[green]✓[/] {prefix} {stage.title} [dim]({format_duration(meter.seconds)}, peak "
        f"{format_bytes(meter.peak_memory_bytes)})[/]"
    )
    return {
        "stage": stage.name,
        "seconds": round(meter.seconds, 2),
        "peak_memory_bytes": meter.peak_memory_bytes,
        "resumed": False,
    }


def _is_ready(road: Road, stage: Stage) -> list[bool]:
    return [is_done(step, road.records) for step in stage.steps(road)]


def _run_apart(road: Road, stage: Stage) -> None:
    """Run a stage in a new process and wait for it, or for Ctrl-C."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    recipe_json = road.recipe.model_dump_json()
    arguments = (stage.name, recipe_json, str(road.run), sender, os.getpid())
    process = context.Process(target=_stage_main, args=arguments, name=f"mutirao-{stage.name}")
    process.start()
    sender.close()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join(STOP_GRACE_S)
        if process.is_alive():
            process.kill()
        raise
    if process.exitcode != 0:
        raise _stage_failure(stage, process.exitcode, receiver)


def _stage_failure(stage: Stage, exit_code: int | None, receiver: Connection) -> MutiraoError:
    """Return the error that the stage told, or one that says how it ended."""
    try:
        code, message = receiver.recv()
    except EOFError:
        code = 1
        how = f"exit code {exit_code}"
        if exit_code is not None and exit_code < 0:
            how = f"signal {signal.Signals(-exit_code).name}"
        message = (
            f"stage {stage.name} ended unexpectedly ({how}); finished stages are kept: run the "
            "same command again"
        )
    return InputError(message) if code == InputError.exit_code else StageError(message)


def _stage_main(name: str, recipe_json: str, run: str, sender: Connection, parent: int) -> None:
    """What a stage's own process does."""
    end_with_parent(
        parent, signal.SIGINT
    )  # as Ctrl-C does: partial folders and sites are tidied away
    silence()
    configure_logging()
    stage = next(each for each in STAGES if each.name == name)
    road = Road(DemoRecipe.model_validate_json(recipe_json), Path(run))
    try:
        for step in stage.steps(road):
            if not is_done(step, road.records):
                with explain_disk_errors(step.path):
                    do_step(step, road.records)
    except MutiraoError as error:
        sender.send((error.exit_code, str(error)[:MAX_SENTENCE]))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        os._exit(130)  # what was begun is in hidden partial folders; nothing more to tidy


def _read_records(run: Path) -> dict[str, dict[str, JsonValue]]:
    """Return what each stage took in earlier calls; damaged rows are left out."""
    try:
        rows = json.loads((run / "stages.json").read_bytes())
        return {str(row["stage"]): row for row in rows if set(row) == RECORD_KEYS}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
