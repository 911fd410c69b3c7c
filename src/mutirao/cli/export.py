"""``mutirao export``: a model for other programs, read back before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.options import AsJson, DryRun

if TYPE_CHECKING:
    from mutirao.compress.export import Export, ExportPlan


def export(
    model: Annotated[
        str, typer.Argument(help="A model's folder, plain or compressed, or hf:ORG/NAME.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    format_: Annotated[
        str, typer.Option("--format", help="gguf, or huggingface: a plain directory.")
    ] = "gguf",
    weight_type: Annotated[
        str,
        typer.Option(
            "--type",
            help="auto, f32, f16, bf16; of gguf also q8_0, q4_0, q4_1. auto keeps weights, and the "
            "codes of a compressed model, as they are; of huggingface it is bf16.",
        ),
    ] = "auto",
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not read the export back and compare it.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Accept so much mean KL divergence from the source, in nats per token; default: "
            "by what was done to the weights.",
        ),
    ] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Write a model as GGUF, or as a plain Hugging Face directory, and check it."""
    from mutirao.compress.export import ExportConfig, export_model, plan_export
    from mutirao.config import parse_recipe
    from mutirao.console import output
    from mutirao.inference.model_source import locate_model
    from mutirao.inference.read_back import engine_logits

    config = parse_recipe(
        ExportConfig,
        {
            "format": format_,
            "weight_type": weight_type,
            "check": not no_check,
            "tolerance": tolerance,
        },
        origin="export",
    )
    path = locate_model(model)
    if dry_run:
        plan = plan_export(path, config, out)
        if json:
            output.print_json(data=plan.to_json())
        else:
            _print_plan(plan, config.check)
        return
    done = export_model(path, out, config, read_logits=engine_logits)
    if json:
        output.print_json(data=done.to_json())
    else:
        _print(done)


def _print_plan(plan: ExportPlan, is_checked: bool) -> None:
    from mutirao.console import format_bytes, output

    output.print(
        f"would write {format_bytes(plan.size_bytes)} as {plan.format}: {_types(plan)}",
        soft_wrap=True,
    )
    for note in plan.notes:
        output.print(note, markup=False, soft_wrap=True)
    if is_checked:
        output.print(f"comparing takes {format_bytes(plan.check_bytes)} of memory for weights")


def _print(done: Export) -> None:
    from mutirao.console import format_bytes, output

    output.print(
        f"wrote {done.model_path}, {format_bytes(done.plan.size_bytes)}: {_types(done.plan)}",
        markup=False,
        soft_wrap=True,
    )
    for note in done.plan.notes:
        output.print(note, markup=False, soft_wrap=True)
    if done.parity is None:
        output.print("not compared with its source")
        return
    output.print(
        f"read back and compared on {done.parity.num_tokens} tokens: max |Δ logit| "
        f"{done.parity.max_logit_difference:.2g}, mean KL {done.parity.mean_kl_nats:.2g} nats "
        f"(accepted up to {done.parity.tolerance_kl_nats:g}), same likeliest token at "
        f"{100 * done.parity.same_top_share:.1f} %",
        soft_wrap=True,
    )


def _types(plan: ExportPlan) -> str:
    return ", ".join(f"{num} {kind}" for kind, num in plan.num_tensors_by_type.items())
