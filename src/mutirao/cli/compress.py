"""``mutirao compress``: fewer bits per weight, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mutirao.cli.options import AsJson


def compress(
    model: Annotated[
        str, typer.Argument(help="A model's folder, or hf:ORG/NAME; not compressed already.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", metavar="FOLDER")],
    method: Annotated[str, typer.Option("--method", help="rtn, or gptq, which needs --text.")] = (
        "rtn"
    ),
    bits: Annotated[int, typer.Option("--bits", help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights that share a scale and a zero point.")
    ] = 32,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="A folder or file of text like what the model is for; the loss is measured on "
            "its last fifth, which no method sees.",
        ),
    ] = None,
    calibration_windows: Annotated[
        int, typer.Option("--calibration-windows", help="Windows that gptq looks at.")
    ] = 64,
    heldout_windows: Annotated[
        int, typer.Option("--heldout-windows", help="Other windows, to measure the loss on.")
    ] = 48,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", help="Tokens of a window.")
    ] = 256,
    json: AsJson = False,
) -> None:
    """Round a model's weights to a few bits, open the result from disk, and measure it."""
    from mutirao.compress.compression import compress_model
    from mutirao.compress.config import CompressConfig, TextConfig
    from mutirao.config import parse_recipe
    from mutirao.console import output
    from mutirao.inference.model_source import locate_model

    config = parse_recipe(
        CompressConfig,
        {"method": method, "bits": bits, "group_size": group_size},
        origin="compress",
    )
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


def _print(out: Path, metrics: dict[str, Any]) -> None:
    from mutirao.console import format_bytes, output

    share = metrics["total_bytes"] / metrics["original_bytes"]
    output.print(
        f"wrote {out}: {format_bytes(metrics['total_bytes'])}, "
        f"{metrics['bits_per_weight']:.2f} bits per weight with scales and embeddings, "
        f"{share:.2f} of the bfloat16 bytes",
        markup=False,
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
