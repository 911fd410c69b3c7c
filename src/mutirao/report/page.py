"""The run's page: one HTML file that needs nothing else, from file:// on any screen.

Style and figures stand inside it, there is no script, and a content security policy forbids
the browser to load anything. What comes from artifacts is escaped by the template engine.
Excerpts of dropped records are left out on purpose: the page is made to be passed on, and
each silo's own ``report.json`` stays where it is.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mutirao import __version__
from mutirao.artifact import write_atomic
from mutirao.console import format_bytes, format_duration
from mutirao.evaluate.losses import Difference
from mutirao.report import figures, wording
from mutirao.report.collect import summarize
from mutirao.report.documents import Stage
from mutirao.report.pedigree import Ancestor
from mutirao.report.summary import NAME_TYPES, RunSummary

PAGE_NAME = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
FULL_HEAT = 0.55
"""Opacity of the strongest colour in the loss table."""


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    value: str
    unit: str
    label: str
    note: str = ""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the run's artifacts, whole or partial.

    Args:
        run: the run's folder.

    Returns:
        The page's path.

    Raises:
        InputError: the folder is no run.
        ArtifactError: a file of the run is damaged.
        DiskFullError: no room; an earlier page is as it was.
    """
    path = run / PAGE_NAME
    write_atomic(path, render_page(summarize(run)))
    return path


def render_page(summary: RunSummary) -> str:
    """Return the page of a summary; the same summary gives the same text."""
    template = make_environment().get_template("report.html.j2")
    return template.render(
        summary=summary,
        headline=wording.headline(summary),
        tiles=headline_tiles(summary),
        stages=stage_rows(summary.stages),
        reasons=_union(each.dropped for each in summary.preparations.values()),
        types=_union(
            {**each.identifiers, **(each.injected or {})} for each in summary.preparations.values()
        ),
        name_types=NAME_TYPES,
        notices=sorted({each.notice for each in summary.preparations.values() if each.notice}),
        heat=lambda difference: heat(difference, _heat_scale(summary)),
        figures={
            "rounds": figures.draw_rounds(summary),
            "losses": figures.draw_losses(summary),
            "questions": figures.draw_questions(summary),
            "outcomes": figures.draw_outcomes(summary),
            "bits": figures.draw_bits(summary),
        },
        traffic_scale=max(
            [1, *(max(row.bytes_sent, row.bytes_stayed or 0) for row in summary.traffic.values())]
        ),
        family=family_tree(summary.lineage),
        recipe=json.dumps(summary.recipe, indent=2, ensure_ascii=False) if summary.recipe else None,
        commands=next_commands(summary),
        words=wording,
        version=__version__,
    )


def make_environment() -> Environment:
    """Return the template engine of all pages; whatever it prints is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        duration=format_duration,
        percent=wording.percent,
        plus_minus=wording.plus_minus,
        ratio=wording.ratio,
        model_words=wording.model_words,
        thousands=lambda number: f"{number:,}",
    )
    return environment


def headline_tiles(summary: RunSummary) -> list[Tile]:
    """Return the headline figures that are known."""
    tiles = []
    difference = summary.mean_difference
    if difference is not None:
        value, error = wording.plus_minus(difference).split(" ± ")
        note = f"mean of {len(summary.losses)} silos; negative is better"
        label = "held-out loss, federated minus base"
        tiles.append(Tile(value, f"± {error} nats per token", label, note))
    traffic = summary.total_traffic
    if traffic is not None:
        stayed = "an unknown size"
        if traffic.bytes_stayed is not None:
            stayed = format_bytes(traffic.bytes_stayed)
        tiles.append(
            Tile(
                wording.ratio(traffic.ratio),
                "bytes left per byte that stayed",
                f"{format_bytes(traffic.bytes_sent)} left the silos, {stayed} of text stayed",
            )
        )
    tiles += _identifier_tiles(summary)
    auroc = summary.mean_auroc()
    if auroc is not None:
        label = "AUROC of the predicted outcome, before → after"
        note = "mean over hospitals" + (
            "; synthetic patients" if summary.synthetic_patients else ""
        )
        tiles.append(Tile(f"{auroc[0]:.2f} → {auroc[1]:.2f}", "0.5 is a coin toss", label, note))
    if summary.stages:
        peak = format_bytes(summary.peak_memory_bytes)
        label = f"for {len(summary.stages)} stages; memory of all processes together"
        tiles.append(Tile(format_duration(summary.seconds), f"peak {peak}", label))
    return tiles


def _identifier_tiles(summary: RunSummary) -> list[Tile]:
    if not summary.preparations:
        return []
    caught, injected = summary.injected(names=False)
    _, num_names = summary.injected(names=True)
    note = "" if summary.removes_names else "names are not removed"
    if num_names and note:
        note = f"the {num_names} injected names aside: {note}"
    total = f"{summary.num_identifiers:,} identifiers replaced in all"
    if not injected:
        return [Tile(f"{summary.num_identifiers:,}", "identifiers", "replaced by their type", note)]
    return [Tile(f"{caught} of {injected}", "injected identifiers caught", total, note)]


@dataclass(frozen=True)
class StageRow:
    """One stage of the road, with the lengths of its bars in percent."""

    stage: Stage
    words: str
    time_share: float
    memory_share: float


def stage_rows(stages: tuple[Stage, ...]) -> list[StageRow]:
    """Return the stages with bars relative to the longest and the largest of them."""
    longest = max((stage.seconds for stage in stages), default=0) or 1
    largest = max((stage.peak_memory_bytes for stage in stages), default=0) or 1
    return [
        StageRow(
            stage,
            wording.STAGE_WORDS.get(stage.stage, stage.stage),
            100 * stage.seconds / longest,
            100 * stage.peak_memory_bytes / largest,
        )
        for stage in stages
    ]


@dataclass(frozen=True)
class Relative:
    """An ancestor with the ancestors it was made from."""

    ancestor: Ancestor
    parents: list[Relative]


def family_tree(lineage: tuple[Ancestor, ...]) -> list[Relative]:
    """Nest the rows of a lineage by their depth."""
    roots: list[Relative] = []
    path: list[Relative] = []
    for ancestor in lineage:
        relative = Relative(ancestor, [])
        del path[ancestor.depth :]
        (path[-1].parents if path else roots).append(relative)
        path.append(relative)
    return roots


def heat(difference: Difference | None, scale: float) -> Markup:
    """Return a cell's style: blue for better, orange for worse, as strong as the difference."""
    if difference is None or not math.isfinite(difference.mean) or scale <= 0:
        return Markup("")
    strength = FULL_HEAT * min(1.0, abs(difference.mean) / scale)
    color = "0, 114, 178" if difference.mean < 0 else "230, 120, 0"
    return Markup(f"background: rgba({color}, {strength:.3f})")


def _heat_scale(summary: RunSummary) -> float:
    values = [
        abs(difference.mean)
        for row in summary.losses
        for difference in row.differences.values()
        if difference is not None and math.isfinite(difference.mean)
    ]
    return max(values, default=0.0)


def next_commands(summary: RunSummary) -> list[tuple[str, str]]:
    """Return what can be typed next, with what it does; only what this run is ready for."""
    run = Path(summary.run)
    have_merged = (run / "merged").is_dir()
    rows = []
    if have_merged:
        rows.append((f"mutirao chat {_quote(run / 'merged')}", "talk with the federated model"))
    labels = [row.label for row in summary.compressions]
    if labels:
        label = next((each for each in labels if each.endswith("4-bit")), labels[-1])
        command = f"mutirao run {_quote(run / 'compressed' / label)} --prompt "
        prompt = "'What are early signs of diabetes?'"
        rows.append((command + prompt, f"ask the {label} model one thing"))
    if summary.missing:
        rows.append((f"mutirao demo --out {_quote(run)}", "go on where this run stopped"))
    rows.append((f"mutirao report {_quote(run)}", "make this page again"))
    own = "mutirao demo --silo clinic=/path/to/clinic --silo lab=/path/to/lab"
    rows.append((own, "the same road on your own folders of text"))
    return rows


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _union(mappings: Iterable[Iterable[str]]) -> list[str]:
    """Return the keys of several mappings, each once, in alphabetic order."""
    return sorted({key for mapping in mappings for key in mapping})
