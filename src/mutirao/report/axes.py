"""Axes of the figures: margins in pixels, a quiet grid, names beside the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from mutirao.report.drawing import GLYPH_WIDTH, series_style, shorten, spread

LABEL_GAP = 15.0
"""Least distance of two names at the ends of lines, in pixels."""

Curve = list[tuple[float, float]]


def make_axes(
    figure: Any, width: int, *, left: float, right: float, bottom: float, top: float = 10
) -> Any:
    """Axes with margins in pixels."""
    height = figure.get_figheight() * 72
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure.add_axes(box)


def finish_axes(axes: Any, xlabel: str, ylabel: str | None) -> None:
    """Leave a line below and a grid across, and name the axes."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=11)
    axes.set_xlabel(xlabel, fontsize=11)
    if ylabel is not None:
        axes.set_ylabel(ylabel, fontsize=11)


def label_margin(names: Sequence[str] | dict[str, Any], width: int) -> float:
    """Return the pixels that names at the right need."""
    longest = max((len(name) for name in names), default=0)
    return min(longest * GLYPH_WIDTH + 22, 0.3 * width)


def label_ends(
    figure: Any, axes: Any, x: float, ends: Sequence[float], names: Sequence[str], width: int
) -> None:
    """Write each line's name beside its end, apart from the others."""
    low, high = axes.get_ylim()
    height = figure.get_figheight() * 72 * axes.get_position().height
    gap = (high - low) * LABEL_GAP / height
    length = int((label_margin(names, width) - 14) / GLYPH_WIDTH)
    for index, (place, name) in enumerate(zip(spread(ends, gap), names, strict=True)):
        axes.annotate(
            shorten(name, length), (x, place), xytext=(10, 0), textcoords="offset points",
            va="center", ha="left", color=series_style(index)[0], annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(low, high)


def columns(points: Curve) -> tuple[list[float], list[float]]:
    """Return the x and the y of a curve's points."""
    return [x for x, _ in points], [y for _, y in points]
