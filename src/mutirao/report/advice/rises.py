"""Rises of the loss as people read them: in per cent of the loss, on axes and in words.

A rise may lie below zero within its uncertainty, so that its axis is logarithmic away from zero
and linear around it. Names stand beside their points, apart from each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullLocator,
    SymmetricalLogLocator,
)
from matplotlib.transforms import ScaledTranslation

from mutirao.console import format_bytes
from mutirao.report import wording
from mutirao.report.advice.document import Interval
from mutirao.report.drawing import GLYPH_WIDTH, INK, MUTED, PAPER, series_style

LARGEST = 1e12
"""Per cent; what is drawn ends there."""
ROUND = (1.0, 5.0, 2.0, 3.0, 1.5, 7.0, 4.0, 6.0, 8.0, 9.0, 2.5, 1.2, 1.8, 4.5, 3.5, 5.5, 1.1)
"""Where the ticks of sizes may stand within a power of ten, the roundest first."""
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Point:
    """A dot with its interval, in the chart's units."""

    x: float
    rise: Interval
    """In per cent of the loss."""
    series: int = 0
    is_measured: bool = True
    is_pale: bool = False


@dataclass(frozen=True)
class Label:
    """Words beside a point."""

    x: float
    y: float
    text: str
    color: str = MUTED
    is_main: bool = False
    short: str = ""
    """Instead of the text, where that has no room on either side."""


def in_percent(rise: Interval, loss: float) -> Interval:
    """Return a rise in nats as per cent of a loss; clipped to what can be drawn."""
    mean, low, high = (
        max(-LARGEST, min(LARGEST, 100 * each / loss)) for each in (rise.mean, rise.low, rise.high)
    )
    return Interval(mean, low, high)


def percent_words(value: float, like: float | None = None) -> str:
    """Return a signed percentage; ``like`` is the number whose digits it shares."""
    size = abs(value if like is None else like)
    decimals = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{wording.signed(value, decimals)}{NO_BREAK}%"


def interval_words(rise: Interval) -> str:
    """Return 'mean ± half' of an interval in per cent."""
    half = (rise.high - rise.low) / 2
    return f"{percent_words(rise.mean)} ± {percent_words(half, like=rise.mean).lstrip('+')}"


def range_words(rise: Interval) -> str:
    """Return 'mean (low to high)' of an interval in per cent."""
    low, high = (percent_words(each, like=rise.mean) for each in (rise.low, rise.high))
    return f"{percent_words(rise.mean)} ({low.removesuffix(f'{NO_BREAK}%')} to {high})"


def draw_points(axes: Any, points: Iterable[Point]) -> None:
    """Draw dots with intervals: measured ones filled, predicted ones hollow."""
    for each in points:
        color, marker = series_style(each.series)
        below, above = each.rise.mean - each.rise.low, each.rise.high - each.rise.mean
        axes.errorbar(
            [each.x], [each.rise.mean], yerr=[[max(below, 0)], [max(above, 0)]], color=color,
            marker=marker, markersize=7, linestyle="none", elinewidth=1.3, markeredgewidth=1.5,
            markerfacecolor=color if each.is_measured else PAPER,
            alpha=0.4 if each.is_pale else None, zorder=4 if each.is_measured else 3,
        )  # fmt: skip


def set_rise_axis(axes: Any, points: Sequence[Point], limit: float | None = None) -> None:
    """Make y an axis of rises: logarithmic where all are clearly above zero, else linear near it.

    Args:
        axes: filled already.
        points: what is on it; intervals of predictions may leave it.
        limit: another value that must be on it.
    """
    measured = [each.rise for each in points if each.is_measured]
    shown = [each.rise.mean for each in points] + [
        value for rise in measured for value in (rise.low, rise.high)
    ]
    shown += [limit] if limit is not None else []
    low, high = min(shown), max(shown)
    if low > 0:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 100 * low else (1.0,)))
    else:
        unclear = [max(-rise.low, rise.high, 1e-9) for rise in measured if rise.low <= 0]
        least = 10.0 ** round(math.log10(max(unclear, default=max(high, -low, 1e-9))))
        axes.set_yscale("symlog", linthresh=least, linscale=0.7)
        axes.set_ylim(min(low * 1.5, 0) - 0.2 * least, max(high * 1.8, 1.2 * least))
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=least))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{NO_BREAK}%"))


def set_size_axis(axes: Any, sizes: Sequence[float], width: int) -> None:
    """Make x a logarithmic axis of bytes, with round sizes at its ticks."""
    low, high = min(sizes) / 1.12, max(sizes) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = size_ticks(low, high, most=7 if width > 400 else 4)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(format_bytes(value))))


def size_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Return round numbers between two sizes, as many as there may be."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    gap = (high / low) ** (0.8 / most)
    found: list[float] = []
    for tick in (each * 10.0**exponent for each in ROUND for exponent in exponents):
        is_apart = all(max(tick / other, other / tick) >= gap for other in found)
        if low <= tick <= high and is_apart:
            found.append(tick)
    return sorted(found)


def draw_key(axes: Any, names: Sequence[str], words: str, *, up: float = 20) -> None:
    """Write the series' names in their colours ``up`` pixels over the plot, then what dots mean."""
    x = 0.0
    for index, name in enumerate(names):
        color, marker = series_style(index)
        style = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.plot(
            [0], [1], marker=marker, color=color, markersize=7, linestyle="none", clip_on=False,
            transform=axes.transAxes + _moved(axes, x + 6, up),
        )  # fmt: skip
        axes.annotate(name, (0, 1), xytext=(x + 16, up), color=color, fontsize=12, **style)
        x += 16 + len(name) * GLYPH_WIDTH + 18
    room = axes.get_position().width * axes.figure.get_figwidth() * 72
    if x + len(words) * GLYPH_WIDTH <= room + 40:
        axes.annotate(words, (0, 1), xytext=(x, up), color=MUTED, fontsize=11, **style)


def label_points(axes: Any, labels: Sequence[Label], points: Iterable[Point], width: int) -> None:
    """Write words beside points, each where nothing else stands; limits must be set."""
    taken = [
        (x - 6, y - 6, x + 6, y + 6)
        for x, y in (axes.transData.transform((each.x, each.rise.mean)) for each in points)
    ]
    for each in labels:
        x, y = axes.transData.transform((each.x, each.y))
        away, text = 15 if each.is_main else 11, each.text
        length = len(text) * GLYPH_WIDTH + 4
        if each.short and length + away > max(x, width - x):
            text, length = each.short, len(each.short) * GLYPH_WIDTH + 4
        on_left = x + away + length > width
        left = x - away - length if on_left else x + away
        for step in range(21):
            shift = 8 * ((step + 1) // 2) * (1 if step % 2 else -1)
            box = (left, y + shift - 7, left + length, y + shift + 7)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            text, (each.x, each.y), xytext=(-away if on_left else away, shift),
            textcoords="offset points", va="center", ha="right" if on_left else "left",
            color=INK if each.is_main else each.color, fontsize=12 if each.is_main else 11,
            fontweight="bold" if each.is_main else "normal", annotation_clip=False, zorder=6,
        )  # fmt: skip


def _overlap(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _moved(axes: Any, x: float, y: float) -> Any:
    """Return a shift in pixels."""
    return ScaledTranslation(x / 72, y / 72, axes.figure.dpi_scale_trans)


def _short(text: str) -> str:
    """Return a size without '.0'."""
    return text.replace(".0 ", " ")


def number_words(value: float | None) -> str:
    """Return a number with two digits, or its power of ten; '∞' for one without a bound."""
    if value is None:
        return "∞"
    if 0.001 <= abs(value) < 1e6 or value == 0:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = mantissa.removesuffix(".0").replace("-", wording.MINUS)
    return f"{mantissa}{NO_BREAK}×{NO_BREAK}10{power}"
