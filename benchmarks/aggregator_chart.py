"""One figure: the server's peak memory against the number of sites, and of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

STYLE = {
    "mutirao": ("Mutirão", "#b8326a", "o", "-"),
    "flower": ("Flower, its FedAvg", "#2f6db3", "s", "-"),
    "nvflare": ("NVFlare, FedAvg", "#7a5cb0", "v", "-"),
    "nvflare-offload": ("NVFlare, replies on the disk", "#7a5cb0", "P", ":"),
}
"""Label, colour, marker and line of each peer."""
SITES_SIZE = "4M"
"""Size at which numbers of sites are compared."""


def draw(summary: dict[str, Any], title: str, path: Path) -> None:
    """Write the figure as SVG.

    Args:
        summary: what ``summarize`` returns.
        title: what was measured, and when.
        path: file to write.
    """
    cases = [
        case
        for case in summary["cases"].values()
        if "peak_bytes" in case and not case["disturbed"] and case["num_rounds"] < 3
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        by_sites, by_size = figure.subplots(1, 2)
        for peer in STYLE:
            own = [case for case in cases if case["peer"] == peer]
            _plot(by_sites, peer, _of_sites(own), "num_sites", 1.0)
            few = [c for c in own if c["num_sites"] == 4]
            if peer == "mutirao":
                few = [c for c in few if c["upload"] == "bf16"]
            _plot(by_size, peer, few, "num_parameters", 1e6)
        _finish(by_sites, f"sites, {SITES_SIZE[:-1]} million parameters")
        by_sites.set_xticks([4, 32])
        _finish(by_size, "million parameters, 4 sites")
        handles, labels = by_size.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _of_sites(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in cases if each["size"] == SITES_SIZE and each["upload"] != "bf16"]


def _plot(axes: Axes, peer: str, cases: list[dict[str, Any]], what: str, unit: float) -> None:
    if not cases:
        return
    label, color, marker, line = STYLE[peer]
    cases = sorted(cases, key=lambda case: float(case[what]))
    places = [case[what] / unit for case in cases]
    peaks = [case["peak_bytes"] for case in cases]
    style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
    axes.plot(places, [each["median"] / 1e9 for each in peaks], label=label, **style)
    lows = [each["lowest"] / 1e9 for each in peaks]
    axes.vlines(places, lows, [each["highest"] / 1e9 for each in peaks], color=color, linewidth=1)


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("peak memory of the server's processes, GB")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, which="major", color="#d5dae0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
