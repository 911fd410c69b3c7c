"""Figures of a federation: one line for each site, by round; names stand at the lines' ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mutirao.federated.coordinator.journal import SiteRound
from mutirao.report.axes import (
    Curve,
    columns,
    finish_axes,
    label_ends,
    label_margin,
    make_axes,
)
from mutirao.report.drawing import MUTED, inline_figure, series_style
from mutirao.report.federation.folder import FederationSummary

Read = Callable[[SiteRound], float | None]
REFERENCE_ROOM = 16
"""Pixels over the plot for the name of a reference line."""


def draw_figures(summary: FederationSummary) -> dict[str, Markup | None]:
    """Draw what is known; None for a figure without a point."""
    privacy = summary.plan.federated.privacy if summary.plan else None
    return {
        "heldout": draw_curves(
            "heldout",
            "Held-out loss of the global model by site against rounds of training behind it.",
            site_curves(summary, lambda row: row.heldout_loss, shift=-1),
            ("rounds of training behind the model", "held-out loss, nats per token"),
        ),
        "training": draw_curves(
            "training",
            "Mean training loss of each site in each round.",
            site_curves(summary, lambda row: row.train_loss),
            ("round", "training loss, nats per token"),
        ),
        "norms": draw_curves(
            "norms",
            "L2 norm of each site's update in each round.",
            site_curves(summary, lambda row: row.update_norm),
            ("round", "L2 norm of the update"),
        ),
        "cosines": draw_curves(
            "cosines",
            "Cosine of each site's update to the round's mean.",
            site_curves(summary, lambda row: row.cosine_to_mean),
            ("round", "cosine to the round's mean"),
        ),
        "epsilon": draw_curves(
            "epsilon",
            "Epsilon that each site has spent after each round.",
            site_curves(summary, lambda row: row.epsilon),
            ("round", "ε spent so far"),
            reference=(privacy.epsilon, "budget") if privacy else None,
        ),
    }


def site_curves(summary: FederationSummary, read: Read, *, shift: int = 0) -> dict[str, Curve]:
    """Return a curve for each site that has a finite value in any round.

    Args:
        summary: the federation.
        read: the value of a site's round.
        shift: added to the round's number.
    """
    curves = {}
    for site in summary.sites:
        values = [(each.round + shift, read(row)) for each, row in summary.rows(site)]
        curve = [(float(x), y) for x, y in values if y is not None and math.isfinite(y)]
        if curve:
            curves[site] = curve
    return curves


def draw_curves(
    name: str,
    description: str,
    curves: dict[str, Curve],
    labels: tuple[str, str],
    *,
    reference: tuple[float, str] | None = None,
) -> Markup | None:
    """Draw one line for each site; a reference is a line across, with its name."""
    if not curves:
        return None
    places = [x for curve in curves.values() for x, _ in curve]
    first, last = min(places), max(places)

    def draw(figure: Any, width: int) -> None:
        margin, top = label_margin(curves, width), REFERENCE_ROOM if reference else 10
        axes = make_axes(figure, width, left=58, right=margin, bottom=46, top=top)
        for index, curve in enumerate(curves.values()):
            color, marker = series_style(index)
            axes.plot(
                *columns(curve), color=color, marker=marker, linewidth=2, markersize=6,
                clip_on=False,
            )  # fmt: skip
        if reference is not None:
            axes.axhline(reference[0], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                reference[1], (first, reference[0]), xytext=(0, 4), textcoords="offset points",
                color=MUTED, fontsize=11, annotation_clip=False,
            )  # fmt: skip
        finish_axes(axes, *labels)
        axes.set_xlim(first - 0.15, last + 0.05)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = [curve[-1][1] for curve in curves.values()]
        label_ends(figure, axes, last, ends, list(curves), width)

    return inline_figure(name, description, lambda width: 300 if width > 400 else 270, draw)
