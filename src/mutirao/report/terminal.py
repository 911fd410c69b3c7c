"""The run's main tables, printed in the terminal from the same summary as the page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mutirao.console import format_bytes, format_duration
from mutirao.evaluate.choices import QuestionResult
from mutirao.evaluate.outcomes import OutcomeResult
from mutirao.report import wording
from mutirao.report.summary import NAME_TYPES, RunSummary


def print_summary(summary: RunSummary, console: Console) -> None:
    """Print what happened, who gained what, what left and what it cost.

    Args:
        summary: the run in numbers.
        console: where to print.
    """
    console.print()
    console.print(Text(wording.headline(summary), style="bold"))
    for table in (
        _preparation_table(summary),
        _loss_table(summary),
        _task_table(summary),
        _traffic_table(summary),
        _compression_table(summary),
    ):
        if table is not None:
            console.print()
            console.print(table)
    _print_remarks(summary, console)


def _print_remarks(summary: RunSummary, console: Console) -> None:
    if summary.answer is not None:
        console.print()
        console.print(Text(summary.answer.prompt, style="dim"))
        console.print(Text(summary.answer.answer))
        console.print(Text("(no medical advice)", style="dim"))
    if summary.preparations and not summary.removes_names:
        console.print()
        console.print(Text("Names of people are not removed from the text.", style="bold yellow"))
    if summary.stages:
        console.print(
            Text(
                f"Time {format_duration(summary.seconds)}, peak memory "
                f"{format_bytes(summary.peak_memory_bytes)} (all processes together)."
            )
        )
    if summary.missing:
        console.print(Text("Not there yet: " + "; ".join(summary.missing) + ".", style="yellow"))


def _table(title: str, columns: list[str], caption: str = "") -> Table:
    table = Table(
        title=title, caption=caption or None, title_justify="left", caption_justify="left"
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right", overflow="fold")
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    """Add cells as plain text, whatever brackets an artifact has in its names."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _preparation_table(summary: RunSummary) -> Table | None:
    if not summary.preparations:
        return None
    columns = ["silo", "records", "kept", "dropped", "identifiers", "injected caught", "text kept"]
    table = _table("Text", columns, "injected identifiers: names aside")
    for name, each in summary.preparations.items():
        counts = [c for kind, c in (each.injected or {}).items() if kind not in NAME_TYPES]
        injected = f"{sum(c.caught for c in counts)}/{sum(c.num for c in counts)}"
        _add_row(
            table,
            name,
            f"{each.num_records_in:,}",
            f"{each.num_kept:,}",
            f"{each.num_records_in - each.num_kept:,}",
            f"{sum(each.identifiers.values()):,}",
            injected if each.injected else "–",
            format_bytes(each.num_bytes_kept),
        )
    return table


def _loss_table(summary: RunSummary) -> Table | None:
    if not summary.losses:
        return None
    table = _table(
        "Held-out loss minus the base model's, nats per token",
        ["text of", "base", *map(wording.model_words, summary.model_labels)],
        "± one standard error; negative is better; bold: clearly best of its row",
    )
    for row in summary.losses:
        cells = [Text(f"0 ({row.base_loss:.3f})", style="bold" if row.best == "base" else "")]
        for label in summary.model_labels:
            style = "bold green" if label == row.best else ""
            cells.append(Text(wording.plus_minus(row.differences[label]), style=style))
        _add_row(table, row.silo, *cells)
    return table


def _task_table(summary: RunSummary) -> Table | None:
    if not summary.questions and not summary.outcomes:
        return None
    table = _table(
        "Tasks, base → federated",
        ["silo", "log-prob. of right option", "accuracy", "chance", "AUROC"],
        "AUROC of synthetic patients' outcomes" if summary.synthetic_patients else "",
    )
    questions = {row.silo: row for row in summary.questions}
    outcomes = {row.silo: row for row in summary.outcomes}
    for silo in summary.silos:
        logprob = accuracy = chance = auroc = "–"
        if silo in questions:
            pair = questions[silo].before, questions[silo].after
            found = [each for each in pair if isinstance(each, QuestionResult)]
            logprob = " → ".join(wording.signed(each.logprob) for each in found)
            accuracy = " → ".join(wording.percent(each.accuracy) for each in found)
            chance = wording.percent(found[0].chance)
        if silo in outcomes:
            rows = outcomes[silo].before, outcomes[silo].after
            auroc = " → ".join(
                f"{each.auroc:.3f}" for each in rows if isinstance(each, OutcomeResult)
            )
        _add_row(table, silo, logprob, accuracy, chance, auroc)
    return table


def _traffic_table(summary: RunSummary) -> Table | None:
    total = summary.total_traffic
    if total is None:
        return None
    table = _table("Bytes that left and text that stayed", ["silo", "left", "stayed", "ratio"])
    for name, row in [*summary.traffic.items(), ("all", total)]:
        stayed = format_bytes(row.bytes_stayed) if row.bytes_stayed is not None else "unknown"
        _add_row(table, name, format_bytes(row.bytes_sent), stayed, wording.ratio(row.ratio))
    return table


def _compression_table(summary: RunSummary) -> Table | None:
    if not summary.compressions:
        return None
    caption = ""
    if summary.baseline is not None and summary.baseline.is_4_bit:
        caption = (
            "this model comes from a 4-bit file, so its 4-bit figure flatters: the original here "
            "had been rounded once before"
        )
    columns = ["model", "size", "bits per weight", "loss minus original, nats per token"]
    table = _table("Fewer bits", columns, caption)
    for row in summary.compressions:
        size, bits = format_bytes(row.total_bytes), f"{row.bits_per_weight:.2f}"
        _add_row(table, row.words, size, bits, wording.plus_minus(row.mean))
    return table
