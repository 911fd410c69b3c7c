"""The page of an advice: what to take and why, in the style of a run's report.

Same style sheet, same drawing, same template engine as ``report.page``; so it loads nothing, runs
no script, and whatever the document says is escaped. The same numbers go to the terminal.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mutirao import __version__
from mutirao.artifact import write_atomic
from mutirao.console import format_bytes
from mutirao.report import wording
from mutirao.report.advice.charts import draw_advice, law_points
from mutirao.report.advice.document import AdviceDocument, Interval, OtherSize, Span, read_advice
from mutirao.report.advice.rises import (
    in_percent,
    interval_words,
    number_words,
    percent_words,
    range_words,
)
from mutirao.report.page import PAGE_NAME, Tile, family_tree, make_environment


def write_advice_report(folder: Path) -> Path:
    """Write FOLDER/report.html beside the advice's files, and return its path.

    The manifest does not name the page, so that the artifact stays whole.

    Raises:
        ArtifactError: it is no advice, or its file is damaged.
        DiskFullError: no room; an earlier page is as it was.
    """
    path = folder / PAGE_NAME
    write_atomic(path, render_advice(read_advice(folder)))
    return path


def render_advice(advice: AdviceDocument) -> str:
    """Return the page of an advice; the same document gives the same text."""
    points = law_points(advice)
    environment = make_environment()
    environment.filters.update(
        measured=lambda rise: interval_words(in_percent(rise, advice.loss)),
        predicted=lambda rise: range_words(in_percent(rise, advice.loss)),
        number=number_words,
        money=_money,
    )
    return environment.get_template("advice.html.j2").render(
        advice=advice,
        tiles=headline_tiles(advice),
        figures=draw_advice(advice),
        has_noise=points is not None,
        num_below=points.num_below if points else 0,
        law=law_words(advice),
        others=_others(advice),
        prospects=prospect_rows(advice),
        family=family_tree(advice.lineage),
        recipe=json.dumps(advice.recipe, indent=2, ensure_ascii=False) if advice.recipe else None,
        command=f"mutirao report {shlex.quote(advice.folder)}",
        version=__version__,
    )


def headline_tiles(advice: AdviceDocument) -> list[Tile]:
    """Return the headline figures that are known."""
    chosen, budget = advice.chosen, advice.budget
    speed = chosen.speed
    rise = in_percent(chosen.rise, advice.loss)
    how = "measured" if chosen.measured else "predicted, not measured"
    now, then = format_bytes(advice.original_bytes), format_bytes(chosen.total_bytes)
    before = 8 * advice.original_bytes / advice.num_weights
    half = percent_words((rise.high - rise.low) / 2, like=rise.mean).lstrip("+")
    spread = f"± {half}" if chosen.measured else range_words(rise).partition(" ")[2]
    tiles = [
        Tile(
            then,
            f"on disk, {now} now",
            f"{before:.3g} → {chosen.bits_per_weight:.2f} bits per weight, scales included",
        ),
        Tile(
            percent_words(rise.mean),
            spread,
            f"rise of the loss from {advice.loss:.4f} nats per token, {how}",
            "95 % interval",
        ),
    ]
    if speed is not None:
        asked = format_bytes(budget.memory_bytes) if budget.memory_bytes else None
        within = f"within the {asked} asked for" if asked else "within the memory that is free"
        tiles.append(
            Tile(
                format_bytes(speed.resident_bytes),
                "to run in",
                f"all weights in memory; from {format_bytes(speed.least_bytes)} on, streamed",
                f"predicted, as {speed.quantization}",
            )
        )
        rate = "does not run" if speed.tokens_per_s is None else f"{speed.tokens_per_s:.1f}"
        unit = "" if speed.tokens_per_s is None else "tokens per second"
        tiles.append(Tile(rate, unit, within, "predicted for this machine's engine"))
    num = len(advice.candidates)
    tiles.append(
        Tile(
            str(advice.num_measured),
            "ways measured",
            f"on {advice.num_tokens:,} held-out tokens; {num} to choose from",
        )
    )
    return tiles


def law_words(advice: AdviceDocument) -> str:
    """Return the fitted law in one sentence; empty where there is none."""
    law = advice.law
    power = law.parameters.get("noise_power") if law else None
    if law is None or power is None:
        return ""
    error = law.standard_errors.get("noise_power")
    shown = f"{power:.2f}" + ("" if error is None else f" ± {error:.2f}")
    told = f"The rise goes with the noise to the power of {shown} (one standard error)"
    if law.num_rows is not None:
        told += f", fitted to {law.num_rows} ways whose rise is clear"
    low, high = law.noise
    told += f", for noise from {low:.2g} to {high:.2g}"
    if law.num_too_large:
        told += f"; {law.num_too_large} that cost more than a nat were left out"
    return f"{told}."


def prospect_rows(advice: AdviceDocument) -> list[tuple[str, str, str]]:
    """Return what lies beyond the checkpoint as (question, answer, how sure)."""
    found, rows = advice.prospects, []
    for other in found.other_sizes:
        verb = "loses" if other.change > 0 else "gains"
        size = {0.5: "half", 2.0: "twice"}.get(other.size, f"{other.size:g} times")
        share = percent_words(100 * other.change / advice.loss)
        rows.append(
            (
                f"A model {size} as large, at {other.bits:g} bits",
                f"{verb} {abs(other.change):.3f} nats per token against this choice ({share})",
                _change_words(other),
            )
        )
    more = found.more_training
    if more is not None:
        verdict = {True: "would hurt", False: "would still help", None: "may help or hurt"}
        rows.append(
            (
                "More training, once rounded so",
                f"{verdict[more.would_hurt]}; it hurts from "
                f"{number_words(more.critical_tokens.mean)} tokens on",
                _span_words(more.critical_tokens),
            )
        )
    if found.qat_share is not None:
        rows.append(
            (
                "Trained for these bits",
                f"{wording.percent(found.qat_share)} of the tokens with rounding on",
                "no interval",
            )
        )
    bill = found.bill
    if bill is not None and bill.smaller is None:
        none = "no training takes it to the same loss, by Kumar's law"
        rows.append(("A model half as large", none, "no interval"))
    elif bill is not None:
        requests = bill.break_even_requests
        when = "never" if requests is None else f"from {number_words(requests)} requests on"
        rows.append(
            ("A model half as large, trained to the same loss", f"costs less {when}", "no interval")
        )
    return rows


def _change_words(other: OtherSize) -> str:
    if other.low is None or other.high is None:
        return "no interval"
    return f"{wording.signed(other.low)} to {wording.signed(other.high)} nats"


def advice_json(advice: AdviceDocument) -> dict[str, Any]:
    """Return the numbers of the page: the document, with rises over the loss beside it."""
    found = asdict(advice)
    for row, each in zip(found["candidates"], advice.candidates, strict=True):
        row["rise_share"] = _share(each.rise, advice.loss)
    found["chosen"] = found["candidates"][advice.recommended]
    return found


def print_advice(advice: AdviceDocument, console: Console) -> None:
    """Print the ways that no other beats, and the one to take."""
    console.print()
    console.print(Text(advice.sentence, style="bold"))
    table = Table(title=Text(f"Ways to round {advice.model}"), title_justify="left")
    for index, column in enumerate(("way", "on disk", "bits/weight", "rise of the loss", "")):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for each in advice.candidates:
        if not each.is_pareto and each is not advice.chosen:
            continue
        how = "measured" if each.measured else "predicted"
        cells = [
            each.words,
            format_bytes(each.total_bytes),
            f"{each.bits_per_weight:.2f}",
            f"{interval_words(in_percent(each.rise, advice.loss))} {how}",
            "← take this" if each is advice.chosen else "",
        ]
        table.add_row(*map(Text, cells))
    console.print(table)


def _others(advice: AdviceDocument) -> list[tuple[str, Interval, float]]:
    """Return what was measured for the law alone: the way, its rise, its divergence."""
    return [
        (each.words, each.measured.interval, each.measured.divergence)
        for each in advice.other_measured
    ]


def _share(rise: Interval, loss: float) -> dict[str, float]:
    return {name: value / loss for name, value in asdict(rise).items()}


def _span_words(span: Span) -> str:
    return f"{number_words(span.low)} to {number_words(span.high)}"


def _money(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else number_words(value)
