"""What people see while something runs: one console, one progress style, one log format.

Progress and messages go to standard error, so that standard output carries only results
(and stays parseable with ``--json``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")

console = Console(stderr=True, highlight=False)
"""Messages and progress, on standard error."""

output = Console(highlight=False)
"""Results, on standard output."""


def configure_logging(verbose: bool = False) -> None:
    """Send log records to the console: warnings by default, everything when verbose."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[handler],
        force=True,
    )


def step_progress() -> Progress:
    """Return a progress bar that counts steps."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def download_progress() -> Progress:
    """Return a progress bar that counts bytes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def part_progress(description: str) -> Iterator[Callable[[float], None]]:
    """Show a bar; what is yielded is told the part that is done, 0 to 1."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with progress:
        task = progress.add_task(description, total=1.0)
        yield lambda part: progress.update(task, completed=part)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while a bar shows how many have passed."""
    with step_progress() as progress:
        yield from progress.track(items, total=total, description=description)


def format_bytes(num_bytes: float) -> str:
    """Return a size for people, in decimal units: '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a duration for people: '1 min 05 s', '4.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
