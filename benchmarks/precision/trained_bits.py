"""Training in few bits: what it costs, and whether it makes rounding afterwards harmless.

    cd benchmarks && python -m precision.trained_bits

For each run of the sweep with ``--train-bits``, beside the run of the same width, seed and bytes
in full precision: the loss as it was trained (rounded weights), the effective share of N that
costs as much, and the loss after every rounding. What is read is in the sweep's folder; writes
docs/benchmarks/data/precision/trained_bits.json and a figure beside.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bench_precision import read_rows
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mutirao.artifact import write_atomic
from mutirao.environment import cache_directory
from mutirao.precision.law import KUMAR, TrainingPrecision
from precision.family import SIZES, make_model
from precision.rounding import HELDOUT_WINDOWS, window_losses
from precision.text import Text
from precision.training import STEP_TOKENS, Run, checkpoint, rounded_weights

Row = dict[str, Any]
COLOURS = {None: "#444444", 2: "#b8326a", 3: "#d98c2b", 4: "#3a8a5f", 6: "#2f6db3"}


def main() -> None:
    """Measure, write, draw and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    rows = [
        row for path in sorted((options.folder / "rows").glob("*.jsonl")) for row in read_rows(path)
    ]
    decayed = [row for row in rows if row["is_decayed"]]
    trained = _as_trained(options.folder, decayed)
    found = [_compare(each, decayed) for each in trained]
    write_atomic(options.out, json.dumps(found, indent=1) + "\n")
    _draw(found, options.out.parents[2] / "trained-bits.svg")
    _show(found)


def _as_trained(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """Return the loss of each checkpoint with the rounded weights that it was trained with."""
    ids_WT = Text(folder / "text").heldout(HELDOUT_WINDOWS)
    keys = sorted(
        {
            (row["size"], row["seed"], row["train_bits"], row["num_tokens"])
            for row in rows
            if row["train_bits"]
        },
        key=lambda key: (int(key[0]), *key[1:]),
    )
    found = []
    for size, seed, bits, num_tokens in keys:
        run = Run(size, seed, (num_tokens // STEP_TOKENS,), bits)
        path = checkpoint(folder / "runs", run, run.num_steps[0], is_decayed=True)
        model = make_model(SIZES[size], seed)
        model.load_state_dict(torch.load(path))
        model.eval()
        with rounded_weights(model, bits):
            loss = float(window_losses(model, ids_WT).mean())
        about = {"size": size, "seed": seed, "train_bits": bits, "num_tokens": num_tokens}
        found.append({**about, "loss_as_trained": loss})
    return found


def _compare(trained: Row, rows: Sequence[Row]) -> Row:
    """Set a run beside that in full precision."""

    def select(train_bits: int | None) -> list[Row]:
        return [
            row
            for row in rows
            if row["train_bits"] == train_bits
            and all(row[name] == trained[name] for name in ("size", "seed", "num_tokens"))
        ]

    own, full = select(trained["train_bits"]), select(None)
    after = {
        _cell(row): {
            "rise": row["delta"],
            "standard_error": row["standard_error"],
            "loss": row["loss"] + row["delta"],
        }
        for row in own
    }
    for row in full:
        if _cell(row) in after:
            more = {"full_rise": row["delta"], "full_loss": row["loss"] + row["delta"]}
            after[_cell(row)].update(more)
    precision = TrainingPrecision(weights=trained["train_bits"])
    return {
        **trained,
        "loss_unrounded": own[0]["loss"],
        "full_loss": full[0]["loss"],
        "effective_share": _effective_share(trained, rows),
        "kumar_effective_share": KUMAR.effective_share(precision),
        "after": after,
    }


def _cell(row: Row) -> str:
    return f"{row['method']}/{row['group']}/{row['bits']}"


def _effective_share(trained: Row, rows: Sequence[Row]) -> float:
    """Return N_eff / N: how large a model in full precision has the loss as trained.

    The losses of the sweep's widths, at as many bytes and the same seed, are a straight line in
    log N, by least squares; it is left on the lower side where fewer bits cost more than the
    smallest width.
    """
    losses = {
        row["num_parameters"]: row["loss"]
        for row in rows
        if not row["train_bits"]
        and row["num_tokens"] == trained["num_tokens"]
        and row["seed"] == trained["seed"]
    }
    slope = np.polyfit([math.log(size) for size in losses], list(losses.values()), 1)[0]
    num_parameters = SIZES[trained["size"]].num_parameters
    # From the run's own loss in full precision, so that its distance from the line cancels.
    gap = trained["loss_as_trained"] - losses[num_parameters]
    return float(math.exp(gap / slope))


def _draw(found: Sequence[Row], path: Path) -> None:
    size = min((each["size"] for each in found), key=int)
    runs = [each for each in found if each["size"] == size]
    tokens = [each["num_tokens"] for each in runs]
    most = max(tokens, key=lambda each: (tokens.count(each), each))
    shown = [each for each in runs if each["num_tokens"] == most]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 9}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, group in zip(figure.subplots(1, 2, sharey=True), ("channel", "g32"), strict=True):
            cells = [f"rtn/{group}/{bits}" for bits in (2, 3, 4, 5)]
            first = shown[0]["after"]
            full = [first[cell]["full_loss"] for cell in cells]
            axes.plot([2, 3, 4, 5], full, "o-", color=COLOURS[None], label="full precision")
            for each in shown:
                bits = each["train_bits"]
                losses = [each["after"][cell]["loss"] for cell in cells]
                axes.plot([2, 3, 4, 5], losses, "o-", color=COLOURS[bits], label=f"{bits} bits")
            where = "one scale a row" if group == "channel" else "groups of 32"
            axes.set(xlabel="bits after training, to nearest", title=where, xticks=[2, 3, 4, 5])
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set(ylabel="loss, nats per byte")
        figure.axes[0].legend(title=f"trained in, {most / 1e6:.1f} MB", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _show(found: Sequence[Row]) -> None:
    for each in found:
        after = each["after"]
        cells = [f"rtn/channel/{bits}" for bits in (2, 3, 4)] + ["gptq/g32/2", "gptq/g32/3"]
        rises = "; ".join(
            f"{cell} {after[cell]['rise']:.3f} for {after[cell]['full_rise']:.3f}" for cell in cells
        )
        print(
            f"| {each['size']} | {each['num_tokens'] / 1e6:.1f} | {each['train_bits']} "
            f"| {each['full_loss']:.4f} | {each['loss_as_trained']:.4f} "
            f"| {each['loss_unrounded']:.4f} | {each['effective_share']:.2f} "
            f"| {each['kumar_effective_share']:.2f} | {rises} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_directory() / "bench-precision")
    parser.add_argument("--threads", type=int, default=1)
    docs = Path(__file__).parents[2] / "docs" / "benchmarks" / "data" / "precision"
    parser.add_argument("--out", type=Path, default=docs / "trained_bits.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
