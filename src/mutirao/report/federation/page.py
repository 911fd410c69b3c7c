"""The coordinator's page: one HTML file in the style of a run's report, at any time of the run.

Same style sheet, same drawing, same template engine as ``report.page``; so it loads nothing,
runs no script, and whatever sites sent is escaped. The same numbers go to the terminal.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mutirao import __version__
from mutirao.artifact import write_atomic
from mutirao.console import format_bytes, format_duration
from mutirao.evaluate.losses import Difference
from mutirao.federated.coordinator.measures import GLOBAL
from mutirao.report import wording
from mutirao.report.federation.curves import draw_figures
from mutirao.report.federation.folder import FederationSummary, Traffic, read_federation
from mutirao.report.federation.measures import Matrix, Measures
from mutirao.report.page import PAGE_NAME, Tile, heat, make_environment

MAX_REFUSALS = 200
"""Refusals that the page shows, the newest; a choice."""
STATES = {
    "running": "the run goes on",
    "finished": "the run is finished",
    "failed": "the run stopped",
    "unknown": "how the run stands is not written down",
}


def write_federation_report(work: Path) -> Path:
    """Write WORK/report.html from a coordinator's folder, and return its path.

    Raises:
        InputError: it is no such folder.
        ArtifactError: a file of it is damaged.
        DiskFullError: no room; an earlier page is as it was.
    """
    path = work / PAGE_NAME
    write_atomic(path, render_federation(read_federation(work)))
    return path


def render_federation(summary: FederationSummary) -> str:
    """Return the page of a summary; the same summary gives the same text."""
    environment = make_environment()
    environment.filters.update(
        number=lambda value: "–" if value is None else f"{value:.3f}",
        signed=lambda value: "–" if value is None else wording.signed(value),
    )
    largest = [max(each.bytes_sent, each.bytes_received) for each in _traffics(summary)]
    return environment.get_template("federation.html.j2").render(
        summary=summary,
        headline=headline(summary),
        tiles=headline_tiles(summary),
        figures=draw_figures(summary),
        settings=settings(summary),
        pull=pull_sentence(summary),
        traffic_scale=max([1, *largest]),
        shown_refusals=summary.refusals[-MAX_REFUSALS:],
        heats=_heats(summary.measures) if summary.measures else {},
        is_secure=any(each.is_secure for each in summary.rounds),
        plan=json.dumps(summary.plan.model_dump(mode="json"), indent=2, ensure_ascii=False)
        if summary.plan
        else None,
        command=f"mutirao report {shlex.quote(summary.work)}",
        version=__version__,
    )


def headline(summary: FederationSummary) -> str:
    """Return how the run stands, in one sentence."""
    num, done = len(summary.sites), len(summary.rounds)
    who = wording.SMALL_NUMBERS[num] if 0 < num < len(wording.SMALL_NUMBERS) else str(num)
    who = f"{who} site{'' if num == 1 else 's'}" if num else "A federation"
    rounds = f"{done} of {summary.num_rounds} rounds" if summary.plan else f"{done} rounds"
    state = STATES.get(summary.state, STATES["unknown"])
    return f"{who} trained together for {rounds}; {state}."


def headline_tiles(summary: FederationSummary) -> list[Tile]:
    """Return the headline figures that are known."""
    total = summary.total_traffic
    tiles = []
    losses = mean_losses(summary)
    if losses is not None:
        first, last = losses
        tiles.append(
            Tile(
                f"{first:.3f} → {last:.3f}",
                "nats per token",
                "held-out loss of the global model, mean of the sites",
                "as received in the first and in the last round, before that round's training",
            )
        )
    if total.num_bytes:
        saved = total.saving
        unit = "times fewer bytes than synchronous training" if saved else "moved in all"
        value = wording.ratio(saved) if saved else format_bytes(total.num_bytes)
        up, down = format_bytes(total.bytes_sent), format_bytes(total.bytes_received)
        tiles.append(Tile(value, unit, f"{up} from the sites, {down} to them"))
    spent = [each for site in summary.sites if (each := summary.epsilon(site)) is not None]
    if spent:
        plan = summary.plan.federated.privacy if summary.plan else None
        note = f"at δ = {plan.delta:g}; budget {plan.epsilon:g}" if plan else ""
        tiles.append(Tile(f"{max(spent):.3g}", "ε spent", "by the site that spent most", note))
    if summary.rounds:
        seconds = math.fsum(each.seconds for each in summary.rounds)
        tiles.append(Tile(format_duration(seconds), "in rounds", "wall time at the coordinator"))
    return [*tiles, *_fault_tiles(summary, is_short=len(tiles) > 3)]


def _fault_tiles(summary: FederationSummary, *, is_short: bool) -> list[Tile]:
    """Return one tile or two: the style sheet fills its rows with five."""
    missing, refused = sum(len(each.missing) for each in summary.rounds), len(summary.refusals)
    label = f"update{'' if missing == 1 else 's'} missing"
    if is_short:
        return [Tile(str(refused), "refused", f"and {missing} {label}")]
    return [
        Tile(str(refused), "refused", "answers, and requests that a site refused"),
        Tile(str(missing), label, "in finished rounds"),
    ]


def mean_losses(summary: FederationSummary) -> tuple[float, float] | None:
    """Return the first and last held-out loss, averaged over sites that measured both."""
    pairs = []
    for site in summary.sites:
        known = [
            row.heldout_loss
            for _, row in summary.rows(site)
            if row.heldout_loss is not None and math.isfinite(row.heldout_loss)
        ]
        if len(known) > 1:
            pairs.append((known[0], known[-1]))
    if not pairs:
        return None
    first, last = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return first, last


def settings(summary: FederationSummary) -> list[tuple[str, str]]:
    """Return what was agreed, in words."""
    if summary.plan is None:
        return []
    plan, config = summary.plan, summary.plan.federated
    secure, privacy = config.secure, config.privacy
    trained = "all weights" if plan.lora is None else f"a LoRA adapter of rank {plan.lora.rank}"
    if summary.num_values is not None:
        trained += f", {summary.num_values:,} values in {summary.num_tensors} tensors"
    return [
        ("trained", trained),
        ("aggregation", f"{config.aggregation}, weights: {config.weighting}"),
        ("outer optimizer", config.outer.rule),
        ("on the wire", f"{config.upload.format} up, {config.download.format} down"),
        (
            "secure aggregation",
            f"the coordinator sees sums alone; values clipped to ±{secure.clip:g}"
            if secure
            else "none: the coordinator sees each update",
        ),
        (
            "differential privacy",
            f"ε at most {privacy.epsilon:g} at δ = {privacy.delta:g}; noise "
            f"{privacy.training.noise_multiplier:g}, clip {privacy.training.max_unit_norm:g}"
            if privacy
            else "none",
        ),
        ("quorum", f"{config.quorum} sites" if config.quorum else "all sites"),
    ]


def pull_sentence(summary: FederationSummary) -> str:
    """Say which site pulls least and most with the others; empty where cosines are not known."""
    means = {site: summary.mean_cosine(site) for site in summary.sites}
    known = {site: mean for site, mean in means.items() if mean is not None}
    if len(known) < 2:
        return ""
    least, most = min(known, key=lambda site: known[site]), max(known, key=lambda site: known[site])
    told = (
        f"The updates of {most} point most with the mean (cosine {known[most]:.2f} on average), "
        f"those of {least} least ({wording.signed(known[least], 2)})."
    )
    if known[least] < 0:
        told += f" {least} pulls against the others."
    return told


def print_federation(summary: FederationSummary, console: Console) -> None:
    """Print the rounds and what each site moved and spent."""
    console.print()
    console.print(Text(headline(summary), style="bold"))
    if summary.message:
        console.print(Text(summary.message, style="yellow"))
    table = Table(title="Sites", title_justify="left")
    columns = ["site", "rounds", "held-out loss", "sent", "received", "fewer bytes", "cosine", "ε"]
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for site in summary.sites:
        rows, traffic = summary.rows(site), summary.traffic(site)
        losses = [row.heldout_loss for _, row in rows if row.heldout_loss is not None]
        cosine, epsilon = summary.mean_cosine(site), summary.epsilon(site)
        cells = [
            site,
            str(len(rows)),
            f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else "–",
            format_bytes(traffic.bytes_sent),
            format_bytes(traffic.bytes_received),
            f"{wording.ratio(traffic.saving)} ×" if traffic.saving else "–",
            wording.signed(cosine, 2) if cosine is not None else "–",
            f"{epsilon:.3g}" if epsilon is not None else "none",
        ]
        table.add_row(*map(Text, cells))
    console.print(table)
    for each in summary.refusals[-3:]:
        console.print(Text(f"refused in round {each.round}, {each.site}: {each.sentence}"))


def _traffics(summary: FederationSummary) -> list[Traffic]:
    return [summary.traffic(site) for site in summary.sites]


def _heats(measures: Measures) -> dict[str, dict[str, dict[str, Markup]]]:
    """Return the style of each cell: blue where a model or a site is good for a text.

    Losses of models are compared with the global model's on the same text, or with the mean of
    the column where that was not measured.
    """
    compared: Matrix = {}
    for label, row in measures.cross_site.items():
        compared[label] = {
            site: loss - _reference(measures.cross_site, site) for site, loss in row.items()
        }
    helped = {
        label: {site: -more for site, more in row.items()}
        for label, row in measures.leave_one_out.items()
    }
    return {"cross_site": _styles(compared), "leave_one_out": _styles(helped)}


def _reference(matrix: Matrix, site: str) -> float:
    if site in matrix.get(GLOBAL, {}):
        return matrix[GLOBAL][site]
    column = [row[site] for row in matrix.values() if site in row]
    return math.fsum(column) / len(column)


def _styles(matrix: Matrix) -> dict[str, dict[str, Markup]]:
    scale = max((abs(value) for row in matrix.values() for value in row.values()), default=0.0)
    return {
        label: {site: heat(Difference(value, 0.0), scale) for site, value in row.items()}
        for label, row in matrix.items()
    }
