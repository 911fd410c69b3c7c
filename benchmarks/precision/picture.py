"""The figure of the precision law: what was fitted, and the held-out runs against what was said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mutirao.precision.rows import Measurement

COLOURS = {"rtn": "#2f6db3", "gptq": "#b8326a"}
MARKERS = {2: "o", 3: "s", 4: "^", 5: "D"}
WIDTHS = ("#2f6db3", "#b8326a", "#3a8a5f")
SHOWN = "gptq/32/3"


def draw(fitted: Sequence[Measurement], judged: dict[str, Any], path: Path) -> None:
    """Draw rises of one cell over tokens, and predicted over measured ones of all cells."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 9}):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        growth, against = figure.subplots(1, 2)
        _draw_growth(growth, fitted)
        _draw_against(against, judged)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_growth(axes: Any, fitted: Sequence[Measurement]) -> None:
    sizes = sorted({row.query.num_params for row in fitted})
    for run in sorted({row.run for row in fitted}):
        rows = sorted(
            (row for row in fitted if row.run == run and row.query.cell == SHOWN),
            key=lambda row: row.query.num_tokens,
        )
        axes.errorbar(
            [row.query.num_tokens / 1e6 for row in rows],
            [row.degradation for row in rows],
            [1.96 * row.standard_error for row in rows],
            fmt="o-",
            color=WIDTHS[sizes.index(rows[0].query.num_params)],
            label=f"{rows[0].query.num_params / 1e6:.2f} million weights",
        )
    axes.set(xscale="log", yscale="log", xlabel="million bytes trained on")
    axes.set(ylabel="rise of the loss, nats per byte", title="GPTQ, 3 bits in groups of 32")
    _label(axes)


def _draw_against(axes: Any, judged: dict[str, Any]) -> None:
    for row in judged["rows"]:
        method, _, bits = row["cell"].split("/")
        said, delta = row["predicted"], row["delta"]
        ends = [[max(said["mean"] - said["low"], 0)], [said["high"] - said["mean"]]]
        axes.errorbar(
            [delta],
            [said["mean"]],
            ends,
            fmt=MARKERS[int(bits)],
            color=COLOURS[method],
            label=f"{method}, {bits} bits",
        )
    deltas = [row["delta"] for row in judged["rows"]]
    ends = [min(deltas) / 1.5, max(deltas) * 1.5]
    axes.plot(ends, ends, color="#9aa7b4", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured rise, nats per byte", ylabel="foretold, with 95 % interval")
    axes.set_title(f"held-out runs, form {judged['chosen']}")
    _label(axes)


def _label(axes: Any) -> None:
    """Name each kind once."""
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True)}
    axes.legend(first.values(), first.keys(), frameon=True, framealpha=0.8, edgecolor="none")
