"""Figures of an advice: what each way costs, the law it follows, and which layers bear least.

Intervals are 95 %. Measured dots are filled, predicted ones hollow. Nothing is drawn that the
document does not have: the law's line ends where its noise was calibrated, and its band stands
where the advice foretold something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mutirao.console import format_bytes
from mutirao.report.advice.document import AdviceDocument, OtherWay, Row
from mutirao.report.advice.rises import (
    Label,
    Point,
    draw_key,
    draw_points,
    in_percent,
    label_points,
    number_words,
    percent_words,
    set_rise_axis,
    set_size_axis,
)
from mutirao.report.axes import finish_axes, make_axes
from mutirao.report.drawing import INK, MUTED, inline_figure, series_style

TOP = 40
"""Pixels over the plot for the names of the series."""
ATTENTION = re.compile(r"att", re.IGNORECASE)


def methods(advice: AdviceDocument) -> list[str]:
    """Return the names of all methods, in the order of their colours."""
    known = [each.method for each in (*advice.candidates, *advice.other_measured)]
    return sorted(set(known))


def draw_advice(advice: AdviceDocument) -> dict[str, Markup | None]:
    """Draw what is known; None for a figure that has nothing to show."""
    return {
        "choice": draw_choice(advice),
        "law": draw_law(advice),
        "layers": draw_layers(advice),
    }


def draw_choice(advice: AdviceDocument) -> Markup:
    """Bytes on disk against the rise of the loss, with the budget and the one to take."""
    names, budget, chosen = methods(advice), advice.budget, advice.chosen
    points = [
        Point(
            each.total_bytes,
            in_percent(each.rise, advice.loss),
            names.index(each.method),
            each.measured is not None,
            is_pale=not each.fits and each is not chosen,
        )
        for each in advice.candidates
    ]
    ring = Label(
        chosen.total_bytes,
        in_percent(chosen.rise, advice.loss).mean,
        chosen.words,
        is_main=True,
        short=f"{chosen.bits} bits",
    )
    allowed = None if budget.loss_share is None else 100 * budget.loss_share

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=64, right=24, bottom=46, top=TOP)
        front = [each for each in advice.candidates if each.is_pareto]
        axes.plot(
            [each.total_bytes for each in front],
            [in_percent(each.rise, advice.loss).mean for each in front],
            color=MUTED, linewidth=1.4, zorder=2,
        )  # fmt: skip
        draw_points(axes, points)
        finish_axes(axes, "bytes on disk, scales included", "rise of the loss, % of the loss")
        set_size_axis(axes, [*(each.x for each in points), *_shown(budget.disk_bytes)], width)
        set_rise_axis(axes, points, allowed)
        _shade_limits(axes, budget.disk_bytes, allowed)
        axes.plot(
            [ring.x], [ring.y], marker="o", markersize=17, color=INK, markerfacecolor="none",
            markeredgewidth=1.8, zorder=5,
        )  # fmt: skip
        label_points(axes, [ring, *_front_labels(front, advice.loss, chosen)], points, width)
        draw_key(axes, names, "filled: measured, hollow: predicted")

    return inline_figure(
        "choice",
        f"Rise of the loss against bytes on disk of {len(points)} ways of rounding, with 95 % "
        f"intervals; the one to take is {chosen.words}, {format_bytes(chosen.total_bytes)}, "
        f"{percent_words(ring.y)}.",
        lambda width: 430 if width > 400 else 380,
        draw,
    )


def _shown(size: int | None) -> list[float]:
    return [] if size is None else [size]


def _front_labels(front: Sequence[Row], loss: float, chosen: Row) -> list[Label]:
    """Name the first way of each number of bits along the front."""
    seen = {chosen.bits}
    labels = []
    for each in front:
        if each.bits not in seen:
            seen.add(each.bits)
            y = in_percent(each.rise, loss).mean
            labels.append(Label(each.total_bytes, y, f"{each.bits} bits"))
    return labels


def _shade_limits(axes: Any, disk_bytes: int | None, allowed: float | None) -> None:
    """Shade what is over the budget, and name its edge."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    shade = {"color": MUTED, "alpha": 0.13, "linewidth": 0, "zorder": 0}
    edge = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}
    words = {"color": MUTED, "fontsize": 11, "textcoords": "offset points"}
    if disk_bytes is not None:
        axes.axvspan(disk_bytes, right, **shade)
        axes.axvline(disk_bytes, **edge)
        text = f"disk {format_bytes(disk_bytes)}"
        axes.annotate(text, (disk_bytes, low), xytext=(-4, 6), ha="right", **words)
    if allowed is not None:
        axes.axhspan(allowed, high, **shade)
        axes.axhline(allowed, **edge)
        text = f"allowed {allowed:g} %"
        axes.annotate(text, (right, allowed), xytext=(-4, 5), ha="right", **words)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


@dataclass(frozen=True)
class LawPoints:
    """What the law's figure shows, rises in per cent of the loss."""

    measured: tuple[Point, ...]
    num_below: int
    """Measured ways without a rise above zero, which a logarithmic axis does not have."""
    lines: dict[str, tuple[tuple[float, float], tuple[float, float]]]
    """By method: noise at both ends, and the rises there."""
    bands: dict[str, tuple[tuple[float, float, float], ...]]
    """By method: (noise, low, high) of what was foretold, by noise."""


def law_points(advice: AdviceDocument) -> LawPoints | None:
    """Return what there is to draw; None where noise was not written down."""
    names, law = methods(advice), advice.law
    ways: list[Row | OtherWay] = [*advice.candidates, *advice.other_measured]
    known = [(each, each.noise, each.measured) for each in ways if each.noise and each.noise > 0]
    measured = [
        Point(noise, in_percent(found.interval, advice.loss), names.index(each.method))
        for each, noise, found in known
        if found is not None
    ]
    if not measured or law is None:
        return None
    above = tuple(each for each in measured if each.rise.mean > 0)
    lines = {name: law_line(advice, name) for name in names}
    low, high = law.noise[0] / 1.001, law.noise[1] * 1.001
    bands = {}
    for name in names:
        rows = sorted(
            (each.noise, rise.low, rise.high)
            for each in advice.candidates
            if each.method == name and each.noise is not None and each.predicted is not None
            if low <= each.noise <= high
            for rise in [in_percent(each.predicted, advice.loss)]
            if rise.low > 0
        )
        if len(rows) > 1:
            bands[name] = tuple(rows)
    return LawPoints(
        above,
        len(measured) - len(above),
        {name: line for name, line in lines.items() if line is not None},
        bands,
    )


def law_line(
    advice: AdviceDocument, method: str
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return both ends of a method's line: noise, and the rise in per cent of the loss."""
    law = advice.law
    constant = law.parameters.get(f"log_c[{method}]") if law else None
    power = law.parameters.get("noise_power") if law else None
    if law is None or constant is None or power is None:
        return None
    low, high = (math.exp(min(constant + power * math.log(noise), 50)) for noise in law.noise)
    return law.noise, (100 * low / advice.loss, 100 * high / advice.loss)


def draw_law(advice: AdviceDocument) -> Markup | None:
    """The rise against the noise of rounding, what was measured and the fitted lines."""
    found = law_points(advice)
    if found is None or not found.measured:
        return None
    names = methods(advice)

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=84, right=24, bottom=46, top=TOP)
        for name, rows in found.bands.items():
            noise, low, high = zip(*rows, strict=True)
            color = series_style(names.index(name))[0]
            axes.fill_between(noise, low, high, color=color, alpha=0.12, linewidth=0, zorder=1)
        for name, (noises, rises) in found.lines.items():
            axes.plot(noises, rises, color=series_style(names.index(name))[0], linewidth=1.8)
        draw_points(axes, found.measured)
        finish_axes(
            axes, "noise: squared error over squared weights", "rise of the loss, % of the loss"
        )
        _set_log_axes(axes, found)
        draw_key(axes, names, "dots: measured, lines: the law")

    return inline_figure(
        "law",
        f"Measured rise of the loss against the noise of rounding for {len(found.measured)} ways, "
        "with 95 % intervals, and the law fitted to them.",
        lambda width: 380 if width > 400 else 340,
        draw,
    )


def _set_log_axes(axes: Any, found: LawPoints) -> None:
    """Make both axes logarithmic; an interval that reaches zero runs out of the plot."""
    rises = [each.rise.mean for each in found.measured]
    rises += [each.rise.low for each in found.measured if each.rise.low > 0.1 * each.rise.mean]
    rises += [each.rise.high for each in found.measured]
    rises += [value for _, ends in found.lines.values() for value in ends]
    noises = [each.x for each in found.measured]
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_xlim(min(noises) / 1.6, max(noises) * 1.6)
    axes.set_ylim(min(rises) / 2, max(rises) * 2)
    for axis, sign in ((axes.xaxis, ""), (axes.yaxis, "\N{NO-BREAK SPACE}%")):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(
            FuncFormatter(lambda value, _, sign=sign: number_words(value) + sign)
        )


@dataclass(frozen=True)
class LayerPoint:
    """One part along the model's depth."""

    depth: int
    divergence: float
    bits: str
    """Of the mix; empty where there is none."""


def layer_series(advice: AdviceDocument) -> dict[str, list[LayerPoint]]:
    """Return the parts of attention and those of the network, by depth."""
    bits: dict[str, set[int]] = {}
    for layer, width in (advice.mix.bits if advice.mix else {}).items():
        bits.setdefault(layer.rpartition(".")[0], set()).add(width)
    series: dict[str, list[LayerPoint]] = {}
    for place, part in enumerate(advice.parts):
        number = re.search(r"\.(\d{1,6})(?:\.|$)", part.name)
        kind = "attention" if ATTENTION.search(part.name.rpartition(".")[2]) else "network"
        widths = "/".join(map(str, sorted(bits.get(part.name, ()))))
        depth = int(number.group(1)) if number else place
        series.setdefault(kind, []).append(LayerPoint(depth, part.divergence, widths))
    return {name: sorted(series[name], key=lambda one: one.depth) for name in sorted(series)}


def draw_layers(advice: AdviceDocument) -> Markup | None:
    """Divergence of each part that is rounded alone, along the depth, and the bits of the mix."""
    series = layer_series(advice)
    if not series:
        return None
    has_bits = any(each.bits for points in series.values() for each in points)
    top = TOP + (20 * len(series) if has_bits else 0)

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=68, right=16, bottom=46, top=top)
        for index, points in enumerate(series.values()):
            color, marker = series_style(index)
            axes.plot(
                [each.depth for each in points], [each.divergence for each in points],
                color=color, marker=marker, markersize=6, linewidth=1.6, clip_on=False,
            )  # fmt: skip
            size = 11 if width > 400 or len(points) < 24 else 8.5
            for each in points if has_bits else ():
                axes.annotate(
                    each.bits, (each.depth, 1), xycoords=axes.get_xaxis_transform(),
                    xytext=(0, 8 + 18 * (len(series) - index)), textcoords="offset points",
                    color=color, fontsize=size, ha="center", va="center", annotation_clip=False,
                )  # fmt: skip
        finish_axes(axes, "block, from the input on", "divergence, nats per token")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.margins(x=0.02)
        words = "numbers: bits of the mix" if has_bits else ""
        draw_key(axes, list(series), words, up=top - 20)

    return inline_figure(
        "layers",
        "Divergence that each block's attention and network causes when it alone is rounded to 3 "
        "bits" + (", and the bits that the mix gives it." if has_bits else "."),
        lambda width: (320 if width > 400 else 290) + (top - TOP),
        draw,
    )
