"""``mutirao compress``: fewer bits or fewer weights, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mutirao.cli.options import AsJson

METHOD_HELP = (
    "Steps in order, separated by commas: any of wanda, magnitude, svd, share, distill, qat, then "
    "at most one of rtn, gptq, awq, 'awq,gptq', nf4 and fp8; after the first four, tune. Most need "
    "--text."
)
TRAINED = ("distill", "qat", "tune")
"""Steps that train."""


def compress(
    model: Annotated[
        str, typer.Argument(help="A model's folder, or hf:ORG/NAME; not compressed already.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    method: Annotated[str, typer.Option("--method", help=METHOD_HELP)] = "rtn",
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="For rtn, gptq and awq: 2, 3, 4 (the default) or 8."),
    ] = None,
    bits_from: Annotated[
        Path | None,
        typer.Option(
            "--bits-from",
            help="For rtn, gptq and awq: bits layer by layer, by an advice of mutirao advise "
            "(its folder or its advice.json).",
            metavar="ADVICE",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            help="For rtn, gptq and awq: weights that share a scale and a zero point; default 32, "
            "or as in --bits-from.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option("--sparsity", help="For wanda and magnitude: share of zeros; default 0.5."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help="For wanda and magnitude: free (the default) or 2:4."),
    ] = None,
    kept_parameters: Annotated[
        float | None,
        typer.Option(
            "--kept-parameters", help="For svd: share of a layer's parameters; default 0.8."
        ),
    ] = None,
    share_every: Annotated[
        int | None,
        typer.Option("--share-every", help="For share: blocks with one set of weights; default 2."),
    ] = None,
    student_layers: Annotated[
        int | None,
        typer.Option("--student-layers", help="For distill: the student's blocks; default half."),
    ] = None,
    student_width: Annotated[
        int | None,
        typer.Option("--student-width", help="For distill: its channels; default the model's."),
    ] = None,
    training_steps: Annotated[
        int | None,
        typer.Option(
            "--training-steps", help="For distill (default 200), qat (100) and tune (two passes)."
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="For distill (default 1e-4), qat (2e-5), tune (2 / width)."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="A folder or file of text like what the model is for; the loss is measured on "
            "its last fifth, which no method sees.",
        ),
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option("--calibration-windows", help="Windows that methods look at.")
    ] = 64,
    heldout_windows: Annotated[
        int, typer.Option("--heldout-windows", help="Other windows, to measure the loss on.")
    ] = 48,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", help="Tokens of a window.")
    ] = 256,
    json: AsJson = False,
) -> None:
    """Make a model smaller, open the result from disk, and measure it."""
    from mutirao.compress.compression import compress_model
    from mutirao.compress.config import (
        STEP_CONFIGS,
        CompressConfig,
        TextConfig,
        split_method,
    )
    from mutirao.config import parse_recipe
    from mutirao.console import output
    from mutirao.errors import InputError
    from mutirao.inference.model_source import locate_model

    training = {"steps": training_steps, "learning_rate": learning_rate}
    given: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "prune": _given({"sparsity": sparsity, "pattern": pattern}),
        "low_rank": _given({"kept": kept_parameters}),
        "sharing": _given({"every": share_every}),
        "distillation": _given({"layers": student_layers, "hidden": student_width}),
    }
    if bits_from is not None:
        given |= _mix(bits_from, bits, group_size)
    trained = [step for step in TRAINED if step in split_method(method)]
    if _given(training) and not trained:
        raise InputError(
            f"--training-steps and --learning-rate are for {' and '.join(TRAINED)}; "
            f"--method={method} has none of them, leave them out"
        )
    for step in trained:
        field = STEP_CONFIGS[step]
        given[field] = _given({**(given.get(field) or {}), **training})
    config = parse_recipe(CompressConfig, _given(given) or {}, origin="compress")
    text_config = parse_recipe(
        TextConfig,
        {
            "calibration_windows": calibration_windows,
            "heldout_windows": heldout_windows,
            "window_tokens": window_tokens,
        },
        origin="text",
    )
    metrics = compress_model(locate_model(model), out, config, text=text, text_config=text_config)
    if json:
        output.print_json(data={"path": str(out), **metrics})
    else:
        _print(out, metrics)


def _mix(advice: Path, bits: int | None, group_size: int | None) -> dict[str, Any]:
    """Return the fields of an advice's mix of bits.

    Raises:
        InputError: options contradict it, or it has none.
    """
    from mutirao.advise.written_mix import read_mix
    from mutirao.errors import InputError

    mix = read_mix(advice)
    if bits is not None:
        raise InputError(
            f"--bits={bits} and --bits-from={advice} were given (expected one of both)"
        )
    if group_size not in (None, mix.group_size):
        raise InputError(
            f"--group-size={group_size} was given, and the mix of {advice} is for groups of "
            f"{mix.group_size}; leave it out"
        )
    return {"bits": mix.uniform_bits, "layer_bits": mix.bits, "group_size": mix.group_size}


def _given(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return the options that were given; None for none at all."""
    return {name: value for name, value in options.items() if value is not None} or None


def _print(out: Path, metrics: dict[str, Any]) -> None:
    from mutirao.console import format_bytes, output

    share = metrics["total_bytes"] / metrics["original_bytes"]
    output.print(
        f"wrote {out}: {format_bytes(metrics['total_bytes'])}, "
        f"{metrics['bits_per_weight']:.2f} bits per weight with scales and embeddings, "
        f"{share:.2f} of the original's bfloat16 bytes",
        markup=False,
        soft_wrap=True,
    )
    if "ideal_bytes" in metrics:
        output.print(
            "a format for zeros, low ranks and shared blocks would take "
            f"{format_bytes(metrics['ideal_bytes'])}",
            soft_wrap=True,
        )
    if "heldout.rise" not in metrics:
        output.print("its loss was not measured: name text with --text")
        return
    output.print(
        f"opened from disk: loss {metrics['heldout.original']:.4f} → "
        f"{metrics['heldout.compressed']:.4f} nats per token, a rise of "
        f"{metrics['heldout.rise']:+.4f} ± {metrics['heldout.standard_error']:.4f}; KL "
        f"{metrics['heldout.divergence']:.4f} nats per token "
        f"({metrics['heldout.num_tokens']:,} held-out tokens)",
        soft_wrap=True,
    )
