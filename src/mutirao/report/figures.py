"""The page's figures: loss by round, dots with intervals, loss against bits.

Labels stand beside what they name; there are no legends. Intervals are 95 % (1.96 standard
errors for losses) and every caption says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mutirao.evaluate.choices import QuestionResult
from mutirao.evaluate.outcomes import OutcomeResult
from mutirao.report.axes import (
    Curve,
    columns,
    finish_axes,
    label_ends,
    label_margin,
    make_axes,
)
from mutirao.report.drawing import (
    FEDERATED,
    GLYPH_WIDTH,
    INK,
    MUTED,
    PAPER,
    SERIES,
    inline_figure,
    series_style,
    shorten,
)
from mutirao.report.summary import ALONE, Z_95, Comparison, RunSummary
from mutirao.report.wording import model_words, plus_minus

ROW_HEIGHT = 22.0
SAME_LOSS = 0.01
"""Two measurements of the base that differ by less, in nats per token, count as one."""


@dataclass(frozen=True)
class Dot:
    """One row of an interval figure."""

    label: str
    value: float
    low: float
    high: float
    text: str
    """The value in words, at the right end of the row."""
    color: str = MUTED
    is_main: bool = False
    """Drawn filled and larger, its label in ink."""


@dataclass(frozen=True)
class Group:
    """Rows under one heading."""

    title: str
    dots: list[Dot] = field(default_factory=list)
    mark: tuple[float, str] | None = None
    """A value that concerns the whole group, drawn as a vertical tick, and its name."""


def draw_rounds(summary: RunSummary) -> Markup | None:
    """Held-out loss of the global model by silo, as training goes on."""
    curves = _round_curves(summary)
    if not any(points for points, _ in curves.values()):
        return None
    num_rounds = len(summary.rounds)

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=52, right=label_margin(curves, width), bottom=46)
        for index, (points, anchors) in enumerate(curves.values()):
            color, marker = series_style(index)
            style = {"color": color, "marker": marker, "clip_on": False}
            axes.plot(*columns(points), linewidth=2, markersize=6, **style)
            joint = _joint(points, anchors)
            axes.plot(*columns(joint), color=color, linewidth=1.4, linestyle=(0, (3, 3)))
            hollow = {**style, "markerfacecolor": PAPER, "markeredgewidth": 1.6}
            axes.plot(*columns(anchors), linestyle="none", markersize=8, zorder=3, **hollow)
        finish_axes(axes, "rounds of training behind the model", "held-out loss, nats per token")
        axes.set_xlim(-0.15, num_rounds + 0.05)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = [(anchors or points)[-1][1] for points, anchors in curves.values()]
        label_ends(figure, axes, num_rounds, ends, list(curves), width)

    return inline_figure(
        "rounds",
        "Held-out loss of the global model against rounds of training, one line per silo.",
        lambda width: 330 if width > 400 else 300,
        draw,
    )


def _round_curves(summary: RunSummary) -> dict[str, tuple[Curve, Curve]]:
    """Per silo: what the sites measured as (rounds done, loss), and base and final points."""
    bases = {row.silo: row.base_loss for row in summary.losses}
    curves = {}
    for silo in summary.silos:
        points = [
            (float(each.round - 1), loss)
            for each in summary.rounds
            if silo in each.sites and (loss := each.sites[silo].heldout_loss) is not None
        ]
        anchors = [(0.0, bases[silo])] if silo in bases else []
        if summary.rounds and silo in summary.federated_loss:
            anchors.append((float(len(summary.rounds)), summary.federated_loss[silo]))
        if points or len(anchors) > 1:
            curves[silo] = (points, anchors)
    return curves


def _joint(points: Curve, anchors: Curve) -> Curve:
    """What the dashed line joins: the last two points, if sites measured what anchors did."""
    if len(anchors) < 2 or not points:
        return anchors
    is_same_sample = points[0][0] == 0 and abs(points[0][1] - anchors[0][1]) < SAME_LOSS
    return [points[-1] if is_same_sample else anchors[0], anchors[-1]]


def draw_losses(summary: RunSummary) -> Markup | None:
    """Each model's loss against the base's, per silo, with intervals."""
    groups = []
    for row in summary.losses:
        dots = []
        for label in summary.model_labels:
            difference = row.differences[label]
            if difference is None:
                continue
            is_own, is_federated = label == f"{ALONE}{row.silo}", label not in _alone(summary)
            half = Z_95 * difference.standard_error
            dots.append(
                Dot(
                    label=model_words(label),
                    value=difference.mean,
                    low=difference.mean - half,
                    high=difference.mean + half,
                    text=plus_minus(difference).split(" ±")[0],
                    color=FEDERATED if is_federated else SERIES[1] if is_own else MUTED,
                    is_main=is_federated or is_own,
                )
            )
        if dots:
            groups.append(Group(f"text of {row.silo}", dots))
    return _draw_groups(
        "losses",
        "Loss of each model minus the loss of the base model, with 95 % intervals, by silo.",
        groups,
        "loss minus base, nats per token  (left is better)",
        reference=(0.0, "base"),
    )


def draw_outcomes(summary: RunSummary) -> Markup | None:
    """AUROC per hospital before and after federation."""
    groups = [
        Group(
            row.silo,
            _before_after(row),
            mark=(summary.ceilings[row.silo], "best possible")
            if row.silo in summary.ceilings
            else None,
        )
        for row in summary.outcomes
    ]
    return _draw_groups(
        "outcomes",
        "AUROC of the predicted outcome per hospital, before and after, with 95 % intervals.",
        groups,
        "AUROC  (right is better)",
        reference=(0.5, "coin toss"),
        limits=(0.3, 1.0),
    )


def draw_questions(summary: RunSummary) -> Markup | None:
    """Accuracy on held-out questions, before and after, against chance."""
    groups = []
    for row in summary.questions:
        known = row.after or row.before
        chance = known.chance if isinstance(known, QuestionResult) else None
        mark = (chance, "chance") if chance is not None else None
        groups.append(Group(row.silo, _before_after(row), mark=mark))
    return _draw_groups(
        "questions",
        "Share of questions answered right per silo, before and after, with 95 % intervals.",
        groups,
        "share of questions answered right  (right is better)",
        limits=(0.0, 1.0),
    )


def draw_bits(summary: RunSummary) -> Markup | None:
    """Loss against bits per weight, per silo, relative to the uncompressed model."""
    compressions = summary.compressions
    silos = [
        silo
        for silo in summary.silos
        if compressions and all(row.differences.get(silo) is not None for row in compressions)
    ]
    if not silos:
        return None
    ticks = ["original", *(row.words for row in compressions)]

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=56, right=label_margin(silos, width), bottom=46)
        ends = []
        for index, silo in enumerate(silos):
            color, marker = series_style(index)
            known = [row.differences[silo] for row in compressions]
            values = [0.0, *(each.mean for each in known if each is not None)]
            errors = [0.0, *(Z_95 * each.standard_error for each in known if each is not None)]
            # Side by side, so that one silo's interval does not hide another's.
            places = [place + 0.07 * (index - (len(silos) - 1) / 2) for place in range(len(values))]
            finite = [error if math.isfinite(error) else 0.0 for error in errors]
            axes.errorbar(
                places, values, yerr=finite, color=color, marker=marker, markersize=6,
                linewidth=1.6, elinewidth=1.4, clip_on=False,
            )  # fmt: skip
            ends.append(values[-1])
        axes.axhline(0, color=MUTED, linewidth=1)
        finish_axes(axes, "bits of the stored weights", "loss minus original, nats per token")
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.25, len(ticks) - 0.8)
        label_ends(figure, axes, len(ticks) - 0.85, ends, silos, width)

    return inline_figure(
        "bits",
        "Loss of the compressed models minus the loss of the original, by silo.",
        lambda width: 320 if width > 400 else 290,
        draw,
    )


def _alone(summary: RunSummary) -> set[str]:
    return {f"{ALONE}{silo}" for silo in summary.silos}


def _before_after(row: Comparison) -> list[Dot]:
    dots = []
    for label, result in (("base", row.before), ("federated", row.after)):
        is_after = label == "federated"
        if isinstance(result, OutcomeResult):
            value, low, high = result.auroc, result.auroc_low, result.auroc_high
            text = f"{value:.2f}"
        elif isinstance(result, QuestionResult):
            value, low, high = result.accuracy, result.accuracy_low, result.accuracy_high
            text = f"{100 * value:.0f} %"
        else:
            continue
        color = FEDERATED if is_after else MUTED
        dots.append(Dot(label, value, low, high, text, color, is_after))
    return dots


def _draw_groups(
    name: str,
    description: str,
    groups: Sequence[Group],
    xlabel: str,
    *,
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> Markup | None:
    """Dots with intervals, one row each, under the headings of their groups."""
    groups = [group for group in groups if group.dots]
    if not groups:
        return None
    num_rows = sum(len(group.dots) + 1.35 for group in groups)
    top, bottom = (24 if reference else 6), 44

    def draw(figure: Any, width: int) -> None:
        longest = max(len(dot.label) for group in groups for dot in group.dots)
        left = min(longest * GLYPH_WIDTH + 14, 0.42 * width)
        axes = make_axes(figure, width, left=left, right=56, bottom=bottom, top=top)
        axes.set_ylim(num_rows - 0.4, -0.3)
        if limits is not None:
            lowest = min(dot.low for group in groups for dot in group.dots)
            axes.set_xlim(min(limits[0], lowest - 0.02), limits[1] + 0.01)
        if reference is not None:
            axes.axvline(reference[0], color=MUTED, linewidth=1.2)
        row = 0.3
        for group in groups:
            _draw_group(axes, group, row, int(left / GLYPH_WIDTH) - 1, width)
            row += len(group.dots) + 1.35
        finish_axes(axes, xlabel, None)
        axes.grid(visible=True, axis="x", linewidth=0.8)
        axes.set_yticks([])
        if reference is not None:
            axes.text(
                reference[0], 1.015, reference[1], transform=axes.get_xaxis_transform(),
                ha="center", va="bottom", color=MUTED, fontsize=11,
            )  # fmt: skip

    return inline_figure(
        name, description, lambda width: top + bottom + ROW_HEIGHT * num_rows, draw
    )


def _draw_group(axes: Any, group: Group, row: float, num_characters: int, width: int) -> None:
    across = axes.get_yaxis_transform()
    axes.annotate(
        shorten(group.title, 60 if width > 400 else 34), (0, row), xycoords=across,
        xytext=(-num_characters * GLYPH_WIDTH - 8, 0), textcoords="offset points",
        va="center", ha="left", fontweight="bold", annotation_clip=False,
    )  # fmt: skip
    last = row + len(group.dots)
    if group.mark is not None:
        value, name = group.mark
        span = [row + 0.55, last + 0.4]
        axes.plot([value] * 2, span, color=INK, linewidth=1.4, linestyle=(0, (2, 2)))
        axes.annotate(
            name, (value, row), xytext=(0, -1), textcoords="offset points",
            ha="center", va="center", color=MUTED, fontsize=11, annotation_clip=False,
        )  # fmt: skip
    for place, dot in enumerate(group.dots, start=1):
        y = row + place
        low, high = (end if math.isfinite(end) else dot.value for end in (dot.low, dot.high))
        axes.plot([low, high], [y, y], color=dot.color, linewidth=2.4 if dot.is_main else 1.4)
        axes.plot(
            [dot.value], [y], marker="o", color=dot.color, markersize=8 if dot.is_main else 6,
            markerfacecolor=dot.color if dot.is_main else PAPER, markeredgewidth=1.6,
        )  # fmt: skip
        label_color = INK if dot.is_main else MUTED
        label = shorten(dot.label, num_characters)
        axes.annotate(
            label, (0, y), xycoords=across, xytext=(-8, 0), textcoords="offset points",
            va="center", ha="right", color=label_color, annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            dot.text, (1, y), xycoords=across, xytext=(52, 0), textcoords="offset points",
            va="center", ha="right", color=label_color, annotation_clip=False,
        )  # fmt: skip
