"""The page of one or more compressed models: bytes against what they cost.

In the style of a run's report, and as inert. It stands beside the first model's folder, which is
an artifact, or wherever it is asked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mutirao import __version__
from mutirao.artifact import write_atomic
from mutirao.console import format_bytes, format_duration
from mutirao.errors import InputError
from mutirao.report import wording
from mutirao.report.advice.charts import TOP
from mutirao.report.advice.models import CompressedModel, find_differences, read_models
from mutirao.report.advice.rises import (
    Label,
    Point,
    draw_key,
    draw_points,
    in_percent,
    interval_words,
    label_points,
    set_rise_axis,
    set_size_axis,
)
from mutirao.report.axes import finish_axes, make_axes
from mutirao.report.drawing import inline_figure, series_style, shorten
from mutirao.report.page import Tile, family_tree, make_environment

LONGEST = 34
"""Characters of a model's name in the figure and in the heading."""
NOT_MEASURED = "not measured"


def write_models_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page that compares compressed models, and return its path.

    Args:
        folders: of compressed models, at least one.
        out: the page's file; None for one beside the first folder, named like it.

    Raises:
        InputError: one is no compressed model, or ``out`` is a folder.
        ArtifactError: a manifest is damaged.
        DiskFullError: no room; an earlier page is as it was.
    """
    models = read_models(folders)
    if out is None:
        first = folders[0].resolve()
        out = first.with_name(f"{first.name}.html")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file for the page with --out")
    write_atomic(out, render_models(models, out))
    return out


def render_models(models: Sequence[CompressedModel], out: Path) -> str:
    """Return the page of some models; the same models give the same text."""
    folders = " ".join(shlex.quote(each.folder) for each in models)
    environment = make_environment()
    environment.filters.update(rise=rise_words, divergence=_divergence, method=method_words)
    return environment.get_template("compressed.html.j2").render(
        models=models,
        headline=headline(models),
        tiles=headline_tiles(models),
        figure=draw_models(models),
        differences=find_differences(models),
        families=[family_tree(each.lineage) for each in models],
        command=f"mutirao report {folders} --out {shlex.quote(str(out))}",
        version=__version__,
    )


def headline(models: Sequence[CompressedModel]) -> str:
    """Return what the models are, in one sentence."""
    smallest = models[-1]
    name = shorten(smallest.label, LONGEST)
    if len(models) > 1:
        number = len(models)
        who = wording.SMALL_NUMBERS[number] if number < len(wording.SMALL_NUMBERS) else str(number)
        told = f"{who} compressed models; the smallest, {name}, takes "
    else:
        told = f"{name} takes "
    told += f"{format_bytes(smallest.total_bytes)}, {smallest.bits_per_weight:.2f} bits per weight"
    if smallest.heldout is None:
        return f"{told}; what it costs was {NOT_MEASURED}."
    verb = "rises" if smallest.heldout.rise > 0 else "changes"
    return f"{told}, and its loss {verb} by {rise_words(smallest).lstrip('+')}."


def headline_tiles(models: Sequence[CompressedModel]) -> list[Tile]:
    """Return the headline figures that are known."""
    smallest = models[-1]
    then = format_bytes(smallest.total_bytes)
    tiles = []
    if smallest.original_bytes:
        now = format_bytes(smallest.original_bytes)
        ratio = wording.ratio(smallest.original_bytes / smallest.total_bytes)
        label = f"{ratio} times smaller than in bfloat16; scales included"
        tiles.append(Tile(then, f"on disk, {now} before", label, shorten(smallest.label, LONGEST)))
    measured = [each for each in models if each.heldout is not None]
    if measured:
        best = min(measured, key=lambda each: _percent(each).rise.mean)
        heldout = best.heldout
        assert heldout is not None
        mean, _, half = rise_words(best).partition(" ± ")
        label = f"smallest rise of the loss, on {heldout.num_tokens:,} held-out tokens"
        tiles.append(Tile(mean, f"± {half}", label, f"{shorten(best.label, LONGEST)}; 95 %"))
    tiles.append(
        Tile(str(len(models)), "compared", f"{len(models) - len(measured)} {NOT_MEASURED}")
    )
    return tiles


def draw_models(models: Sequence[CompressedModel]) -> Markup | None:
    """Bytes against the rise of the loss; None where no rise was measured."""
    measured = [each for each in models if each.heldout is not None]
    if not measured:
        return None
    names = sorted({each.method for each in measured})
    points = [_percent(each, names.index(each.method)) for each in measured]
    labels = [
        Label(point.x, point.rise.mean, shorten(each.label, LONGEST), series_style(point.series)[0])
        for each, point in zip(measured, points, strict=True)
    ]

    def draw(figure: Any, width: int) -> None:
        axes = make_axes(figure, width, left=64, right=24, bottom=46, top=TOP)
        draw_points(axes, points)
        finish_axes(axes, "bytes on disk, scales included", "rise of the loss, % of the loss")
        set_size_axis(axes, [each.x for each in points], width)
        set_rise_axis(axes, points)
        label_points(axes, labels, points, width)
        draw_key(axes, [shorten(name, 24) for name in names], "")

    described = "; ".join(
        f"{each.label} {format_bytes(each.total_bytes)}, {rise_words(each)}" for each in measured
    )
    return inline_figure(
        "models",
        f"Rise of the loss against bytes on disk, with 95 % intervals: {described}.",
        lambda width: 380 if width > 400 else 340,
        draw,
    )


def rise_words(model: CompressedModel) -> str:
    """Return a model's rise in per cent of the loss with its interval, or that there is none."""
    if model.heldout is None:
        return NOT_MEASURED
    return interval_words(_percent(model).rise)


def method_words(model: CompressedModel) -> str:
    """Return the steps of the method in order, and the groups."""
    steps = model.method.replace(",", ", ")
    return f"{steps}, groups of {model.group_size}" if model.group_size else steps


def print_models(models: Sequence[CompressedModel], console: Console) -> None:
    """Print the models beside each other."""
    console.print()
    console.print(Text(headline(models), style="bold"))
    for reason in find_differences(models):
        console.print(Text(f"Rises cannot be held against each other: {reason}.", style="yellow"))
    table = Table(title="Compressed models", title_justify="left")
    columns = ("model", "method", "bits", "on disk", "bits/weight", "rise", "divergence", "time")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for each in models:
        cells = [
            each.label,
            method_words(each),
            "–" if each.weight_bits is None else f"{each.weight_bits:g}",
            format_bytes(each.total_bytes),
            f"{each.bits_per_weight:.2f}",
            rise_words(each),
            _divergence(each),
            "–" if each.compress_s is None else format_duration(each.compress_s),
        ]
        table.add_row(*map(Text, cells))
    console.print(table)


def _percent(model: CompressedModel, series: int = 0) -> Point:
    assert model.heldout is not None
    rise = in_percent(model.heldout.interval, model.heldout.original)
    return Point(model.total_bytes, rise, series)


def _divergence(model: CompressedModel) -> str:
    if model.heldout is None or model.heldout.divergence is None:
        return "–"
    return f"{model.heldout.divergence:.3g}"
