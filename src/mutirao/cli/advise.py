"""``mutirao advise``: how few bits a model bears, with intervals and a reason."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mutirao.cli.options import AsJson

if TYPE_CHECKING:
    from mutirao.advise.choosing import Candidate
    from mutirao.advise.findings import Advice


def advise(
    model: Annotated[
        str, typer.Argument(help="A model's folder, or hf:ORG/NAME; not compressed already.")
    ],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            help="A folder or file of text like what the model is for; losses are measured on its "
            "last fifth.",
        ),
    ],
    memory: Annotated[
        str | None, typer.Option("--memory", help="To run it in, such as 600MB.")
    ] = None,
    disk: Annotated[
        str | None, typer.Option("--disk", help="For its weights, such as 400MB.")
    ] = None,
    loss_budget: Annotated[
        str | None, typer.Option("--loss-budget", help="Most that the loss may rise, such as 2%.")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            "--interval",
            help="Half of the 95 % interval that is wanted at 4 bits, such as 0.5% of the loss.",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="To choose from: rtn, gptq, awq, awq+gptq, gptq+tune.")
    ] = "rtn,gptq",
    group_sizes: Annotated[
        str, typer.Option("--group-sizes", help="To choose from: weights that share a scale.")
    ] = "32,64,128",
    training_tokens: Annotated[
        float | None,
        typer.Option("--training-tokens", help="That it was trained on, such as 2e12."),
    ] = None,
    decayed: Annotated[
        bool,
        typer.Option(
            "--decayed/--not-decayed", help="Whether the learning rate had decayed at the end."
        ),
    ] = True,
    requests: Annotated[
        float | None, typer.Option("--requests", help="In its life: adds the bill.")
    ] = None,
    tokens_per_request: Annotated[
        float, typer.Option("--tokens-per-request", help="Read and written.")
    ] = 1000,
    price: Annotated[
        float | None, typer.Option("--price", help="Of an accelerator for an hour.")
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option("--calibration-windows", help="Windows that methods look at.")
    ] = 64,
    heldout_windows: Annotated[
        int, typer.Option("--heldout-windows", help="Other windows, to measure losses on.")
    ] = 48,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", help="Tokens of a window.")
    ] = 256,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Look for bits layer by layer, too.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for advice.json and report.html.", metavar="FOLDER"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Measure what rounding costs a model, and say how few bits it bears."""
    import json as json_module

    from mutirao.advise.advice import advise as find_advice
    from mutirao.advise.config import AdviseConfig, Budget, Outlook
    from mutirao.config import parse_recipe
    from mutirao.errors import InputError
    from mutirao.inference.model_source import locate_model
    from mutirao.inference.sizes import parse_size

    config = parse_recipe(
        AdviseConfig,
        {
            "methods": _split(methods),
            "group_sizes": group_sizes.split(","),
            "half_width": _share(interval, "--interval"),
            "text": {
                "calibration_windows": calibration_windows,
                "heldout_windows": heldout_windows,
                "window_tokens": window_tokens,
            },
            **({} if layers else {"sensitivity_windows": 0}),
        },
        origin="advise",
    )
    budget = Budget(
        memory_bytes=None if memory is None else parse_size(memory),
        disk_bytes=None if disk is None else parse_size(disk),
        loss_share=_share(loss_budget, "--loss-budget"),
    )
    outlook = parse_recipe(
        Outlook,
        {
            "training_tokens": training_tokens,
            "is_decayed": decayed,
            "num_requests": requests,
            "tokens_per_request": tokens_per_request,
        },
        origin="outlook",
    )
    if price is not None:
        if not price > 0:
            raise InputError(f"--price {price:g} is not accepted (expected a number above 0)")
        priced = outlook.accelerator.model_copy(update={"price_per_hour": price})
        outlook = outlook.model_copy(update={"accelerator": priced})
    found = find_advice(
        locate_model(model), text, config=config, budget=budget, outlook=outlook, out=out
    )
    if out is not None:
        from mutirao.report.advice import write_advice_report

        write_advice_report(out)
    if json:
        typer.echo(json_module.dumps(found.to_json(), indent=2))
        return
    _print(found)


def _split(methods: str) -> list[str]:
    """Return the methods; one of two steps is written with a plus."""
    return [each.strip().replace("+", ",") for each in methods.split(",")]


def _share(text: str | None, option: str) -> float | None:
    """Read '2%' or '0.02'.

    Raises:
        InputError: it is neither.
    """
    from mutirao.errors import InputError

    if text is None:
        return None
    is_percent = text.strip().endswith("%")
    try:
        value = float(text.rstrip("% ")) / (100 if is_percent else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < (100 if is_percent else 1):
        raise InputError(f"{option} {text!r} is not understood (expected for example 2% or 0.02)")
    return value


def _print(found: Advice) -> None:
    from rich.table import Table

    from mutirao.console import format_bytes, output

    output.print(found.model, style="bold", markup=False)
    output.print(
        f"{format_bytes(found.original_bytes)} in bfloat16, loss {found.loss:.4f} nats per token "
        f"on {found.num_tokens:,} held-out tokens",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("way", no_wrap=True)
    for heading in ("on disk", "bits/weight", "predicted rise", "measured rise", "to run"):
        table.add_column(heading, justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("")
    for each in found.candidates:
        if each.is_pareto or each.way == found.chosen.way:
            table.add_row(*_row(found, each))
    output.print(table)
    output.print("Rises in % of the loss, with 95 % intervals; ways that others beat are left out.")
    output.print()
    output.print(found.sentence, style="bold", markup=False, soft_wrap=True)
    for sentence in found.remarks():
        output.print(sentence, markup=False, soft_wrap=True)


def _row(found: Advice, each: Candidate) -> list[str]:
    from mutirao.console import format_bytes

    predicted, measured = "–", "–"
    if each.predicted is not None:
        low, high = each.predicted.low / found.loss, each.predicted.high / found.loss
        predicted = f"{each.predicted.mean / found.loss:.2%} ({low:.2%} to {high:.2%})"
    if each.measured is not None:
        half = (each.rise.high - each.rise.low) / 2
        measured = f"{each.rise.mean / found.loss:.2%} ± {half / found.loss:.2%}"
    speed = each.speed
    return [
        str(each.way),
        format_bytes(each.total_bytes),
        f"{each.bits_per_weight:.2f}",
        predicted,
        measured,
        format_bytes(speed.resident_bytes) if speed else "–",
        f"{speed.tokens_per_s:.1f}" if speed and speed.tokens_per_s else "–",
        "← take this" if each.way == found.chosen.way else "",
    ]
