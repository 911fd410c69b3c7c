from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from synthetic_run import write_synthetic_run

from mutirao.report import print_summary, summarize


def print_to_text(run: Path) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_summary(summarize(run), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_hold_the_same_numbers_as_the_page(run: Path) -> None:
    text = print_to_text(run)
    for words in (
        "22\N{NO-BREAK SPACE}% lower perplexity",
        "−0.210 ± 0.018",
        "66/68",
        "0.560 → 0.740",
        "0.29",
        "Names of people are not removed",
        "flatters",
        "no medical advice",
    ):
        assert words in text


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    silos = ("[bold]a", "[red]b[/]", "[/]c")
    text = print_to_text(write_synthetic_run(tmp_path / "run", silos=silos, answer="[link=x]y[/]"))
    for words in (*silos, "[link=x]y[/]"):
        assert words in text


def test_partial_run_prints_what_is_missing(tmp_path: Path) -> None:
    text = print_to_text(write_synthetic_run(tmp_path / "run", until="data"))
    assert "Not there yet" in text
    assert "(merged)" in text
