"""``mutirao plan``: will a model run here, how fast, in which memory; before it is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

    from mutirao.inference.planning.machine import Machine
    from mutirao.inference.planning.model_plans import ModelPlans
    from mutirao.inference.planning.planner import Plan

Model = Annotated[
    str,
    typer.Argument(
        help="A GGUF file, a folder, a config.json alone, or another source; of hf:ORG/NAME only "
        "config.json is downloaded."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Peak of the whole process, such as 600MB; default: what is available."
    ),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Most tokens of prompt and answer; default 2048."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Default: all cores.")]
Quantization = Annotated[
    list[str] | None,
    typer.Option(
        "--quantization",
        help="Assume this one, such as Q4_K_M; may be given again. Default: the weights as they "
        "are or, of a config.json, the usual ones.",
    ),
]
Probe = Annotated[
    bool, typer.Option("--probe", help="Measure this machine again, whatever is known of it.")
]


def plan(
    model: Model,
    memory: Memory = None,
    context: Context = None,
    threads: Threads = None,
    quantization: Quantization = None,
    probe: Probe = False,
    json: AsJson = False,
) -> None:
    """Predict how fast a model would run in some memory, and how."""
    import json as json_module

    from mutirao.errors import InputError
    from mutirao.inference.planning.model_plans import plan_model
    from mutirao.inference.sizes import parse_size

    planned = plan_model(
        model,
        memory_bytes=None if memory is None else parse_size(memory),
        context=context,
        num_threads=threads,
        quantizations=quantization or (),
        refresh_probe=probe,
    )
    if json:
        typer.echo(json_module.dumps(planned.to_json(), indent=2))
    else:
        _print(planned)
    if not any(plans for _, plans in planned.models.values()):
        raise typer.Exit(InputError.exit_code)  # none runs in this memory; the notes say the least


def _print(planned: ModelPlans) -> None:
    from mutirao.console import format_bytes, output

    output.print(planned.name, style="bold", markup=False)
    output.print(
        f"{format_bytes(planned.memory_bytes)} of memory, context of {planned.context} tokens"
    )
    output.print(_about(planned.machine), style="dim", markup=False, soft_wrap=True)
    output.print(_table(planned))
    for note in planned.notes():
        output.print(note, markup=False, soft_wrap=True)


def _about(machine: Machine) -> str:
    from mutirao.console import format_bytes

    fastest = max(each.bytes_per_s for each in machine.reads)
    how = "past the page cache" if machine.direct else "through the page cache: no direct I/O here"
    return (
        f"{machine.processor}, {machine.num_threads} threads, {machine.kernels}; disk "
        f"{format_bytes(fastest)}/s {how}; probed {machine.measured_on}"
    )


def _table(planned: ModelPlans) -> Table:
    from rich.table import Table

    has_several = len(planned.models) > 1
    table = Table(box=None, pad_edge=False)
    if has_several:
        table.add_column("weights")
    table.add_column("plan", no_wrap=True)
    for heading in ("tokens/s", "read/token", "memory", "first token", "drafts"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for quantization, (_, plans) in planned.models.items():
        first = [quantization] if has_several else []
        if plans is None:
            table.add_row(*first, "none: too large")
            continue
        for each in [plans.best] if has_several else plans.plans:
            remark = "" if each.fits else "too large"
            if each is plans.best and not has_several:
                remark = "← run"
            table.add_row(*first, *_cells(each), remark)
    return table


def _rate(tokens_per_s: float) -> str:
    """Three digits, however slow."""
    if tokens_per_s >= 0.1:
        return f"{tokens_per_s:.{1 if tokens_per_s >= 10 else 2}f}"
    return f"{tokens_per_s:.2g}"


def _cells(plan: Plan) -> list[str]:
    from mutirao.console import format_bytes, format_duration

    expected, drafts = plan.prediction, "-"
    if expected.draft_length and expected.acceptance is not None:
        mark = "*" if plan.acceptance_from == "assumption" else ""
        drafts = f"{expected.draft_length} at {100 * expected.acceptance:.0f} %{mark}"
    return [
        plan.name,
        _rate(expected.tokens_per_s),
        format_bytes(expected.bytes_per_token),
        format_bytes(plan.memory.total),
        format_duration(expected.time_to_first_token_s),
        drafts,
    ]
