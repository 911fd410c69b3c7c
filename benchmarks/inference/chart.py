"""One chart: tokens per second, and bytes read per token, against the memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from inference.peers import PEERS

STYLE = {
    "ours": ("#b8326a", "o", "-"),
    "ours-speculation": ("#d9691e", "D", "-"),
    "ours-bfloat16": ("#5a1f5f", "D", "--"),
    "llama.cpp": ("#9aa7b4", "s", "-"),
    "llama.cpp-tuned": ("#2f6db3", "s", "-"),
    "llama.cpp-ngram": ("#2f6db3", "s", ":"),
    "smaller": ("#3c8f5a", "^", "--"),
    "accelerate": ("#7a5cb0", "v", "-"),
    "airllm": ("#7a5cb0", "P", ":"),
}
"""Colour, marker and line of each peer."""
LEAST_MB = 1.0
"""Where nothing is read, the logarithmic axis shows this."""


def draw(summary: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Write the chart as SVG.

    Args:
        summary: what ``summarize`` returns.
        title: model, machine and date.
        path: file to write.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 8.2), layout="constrained")
        FigureCanvasSVG(figure)
        speed, reading = figure.subplots(2, 1, sharex=True)
        for peer in PEERS:
            if cells := _limited(summary.get(peer.name, {})):
                _draw_peer(speed, reading, peer.name, peer.label, cells)
        _finish(speed, "tokens per second, steady")
        _finish(reading, "MB read from the disk per token")
        reading.set_xlabel("memory limit of the process, page cache included, in MB")
        if not speed.get_legend_handles_labels()[0]:
            raise ValueError("nothing to draw: no run under a limit has succeeded")
        figure.legend(
            *speed.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _limited(cells: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [cell for cell in cells.values() if cell["limit_bytes"] and "tokens_per_s" in cell]
    return sorted(rows, key=lambda cell: float(cell["limit_bytes"]))


def _draw_peer(
    speed: Axes, reading: Axes, name: str, label: str, cells: list[dict[str, Any]]
) -> None:
    """Draw one peer at the budget that all have; what it got beside that is in its label."""
    color, marker, line = STYLE[name]
    budgets = [(cell["limit_bytes"] - cell["extra_bytes"]) / 1e6 for cell in cells]
    extra = max(cell["extra_bytes"] for cell in cells) / 1e6
    if extra:
        label += f" (given up to {extra:.0f} MB more)"
    for axes, figure, scale, least in (
        (speed, "tokens_per_s", 1.0, 0.0),
        (reading, "bytes_per_token", 1e-6, LEAST_MB),
    ):
        rows = [(x, cell[figure]) for x, cell in zip(budgets, cells, strict=True) if figure in cell]
        medians = [max(least, spread["median"] * scale) for _, spread in rows]
        lows = [max(least, spread["lowest"] * scale) for _, spread in rows]
        highs = [max(least, spread["highest"] * scale) for _, spread in rows]
        style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
        axes.plot([x for x, _ in rows], medians, label=label, **style)
        axes.vlines([x for x, _ in rows], lows, highs, color=color, linewidth=1)


def _finish(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(visible=True, which="major", color="#d5dae0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")
