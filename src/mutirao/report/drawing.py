"""How figures are drawn: matplotlib's SVG, made to live inside a page.

Text stays text (small, sharp, searchable). Colours are drawn as placeholders and become CSS
variables of the page, so that one drawing serves light and dark. Identifiers get the
figure's name before them, as several drawings share a page. The same figure gives the same
bytes. Nothing touches pyplot's global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDE, NARROW = 768, 340
"""Widths of the two drawings of a figure, in CSS pixels: a page's column, a phone's."""
INK, MUTED, RULE, PAPER, FEDERATED = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
MARKERS = ("o", "s", "^", "D", "v", "P")
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    FEDERATED: "var(--federated)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
"""Placeholder colours, and what each is called in the page's style sheet."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": RULE,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
GLYPH_WIDTH = 6.6
"""Mean width of a letter at the figures' text size, in pixels; measured in Chromium."""

Draw = Callable[[Any, int], None]
"""Fills a figure, given the width it is drawn for."""


def series_style(index: int) -> tuple[str, str]:
    """Return colour and marker of the index-th series; pairs repeat only after 36."""
    return SERIES[index % 6], MARKERS[(index + index // 6) % 6]


def shorten(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters, its end replaced by an ellipsis."""
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move label positions apart to at least ``gap``, in their order, around their centre."""
    if not positions:
        return []
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = (sum(placed) - sum(positions)) / len(positions)
    return [position - shift for position in placed]


def inline_figure(
    name: str, description: str, height: Callable[[int], float], draw: Draw
) -> Markup:
    """Draw a figure for a wide page and for a phone; the style sheet shows one of them.

    Args:
        name: unique on the page, letters and dashes.
        description: what the figure shows, for those who cannot see it.
        height: height in pixels for a width.
        draw: fills the figure.
    """
    drawings = [
        _draw_svg(f"{name}-{kind}", kind, description, width, height(width), draw)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    ]
    return Markup("").join(drawings)


def _draw_svg(
    name: str, kind: str, description: str, width: int, height: float, draw: Draw
) -> Markup:
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A silo may be named in letters that the layout's font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # 72 dots per inch: one point of the drawing is one CSS pixel of the page.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        draw(figure, width)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    return _adopt(buffer.getvalue(), name, kind, description, width, height)


def _adopt(svg: str, name: str, kind: str, description: str, width: int, height: float) -> Markup:
    """Turn a stand-alone SVG file into an element of the page."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    body = re.sub(
        "|".join(VARIABLES), lambda match: VARIABLES[match.group()], body, flags=re.IGNORECASE
    )
    body = re.sub(r"\n\s*", "\n", body).strip()
    head = (
        f'<svg class="figure {kind}" viewBox="0 0 {width} {height:g}" '
        f'style="max-width:{width}px" role="img" aria-label="{escape(description)}">'
    )
    return Markup(f"{head}{body}</svg>")
