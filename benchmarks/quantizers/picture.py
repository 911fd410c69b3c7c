"""The figure of the quantizers: what each costs in loss, over its true bits per weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TOOLS = {
    "llm-compressor": ("llm-compressor", "#2f6db3"),
    "auto-round": ("AutoRound", "#d9691e"),
    "llama.cpp": ("llama.cpp", "#3c8f5a"),
    "ours": ("Mutirão", "#b8326a"),
}
"""Name and colour; the last is drawn on top."""
MARKERS = {
    "rtn": "o",
    "gptq": "s",
    "awq": "^",
    "awq,gptq": "D",
    "gptq,tune": "*",
    "awq,gptq,tune": "X",
    "signround": "v",
    "llama.cpp": "P",
}
OTHER_MARKER = "h"


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write the figure as SVG.

    Args:
        rows: as ``table.summarize`` returns them; a setting without a rise cannot be drawn.
        title: model and windows.
        path: file to write.
    """
    style = {"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["tool"] in TOOLS and row["rise"] > 0:
                method = row["method"].replace("awq-", "awq,")
                groups[row["tool"], method, _is_hollow(row)].append(row)
        for tool, method, is_hollow in sorted(groups, key=_order):
            _draw_group(axes, tool, method, is_hollow, groups[tool, method, is_hollow])
        axes.set(
            yscale="log", xlabel="bits per weight of the blocks' linear layers, scales and all"
        )
        axes.set_ylabel("rise of the loss on held-out text, nats per token, ± 2 SE")
        axes.grid(visible=True, which="major", color="#d5dae0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if groups:
            figure.legend(loc="outside right upper", frameon=False)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _is_hollow(row: dict[str, Any]) -> bool:
    """Say whether a setting is of the kind beside the usual one: no zero points, rows folded."""
    is_folded = bool(row["options"].get("fold"))
    return is_folded or (row["symmetric"] and row["tool"] != "llama.cpp")


def _order(key: tuple[str, str, bool]) -> tuple[int, str, bool]:
    tool, method, is_hollow = key
    return list(TOOLS).index(tool), method, is_hollow


def _draw_group(
    axes: Any, tool: str, method: str, is_hollow: bool, rows: Sequence[dict[str, Any]]
) -> None:
    name, colour = TOOLS[tool]
    label = name if method == tool else f"{name} {method.replace(',', '+')}"
    if is_hollow:
        label += ", rows folded" if tool == "llama.cpp" else ", symmetric"
    axes.errorbar(
        [row["bits_per_weight"] for row in rows],
        [row["rise"] for row in rows],
        [2 * row["rise_standard_error"] for row in rows],
        fmt=MARKERS.get(method, OTHER_MARKER),
        color=colour,
        markerfacecolor="white" if is_hollow else colour,
        markersize=7 if tool == "ours" else 5,
        elinewidth=0.8,
        label=label,
    )
    if tool != "llama.cpp":
        return
    for row in rows:
        axes.annotate(
            row["options"]["type"],
            (row["bits_per_weight"], row["rise"]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )
