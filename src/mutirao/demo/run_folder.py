"""A run's folder: whose it is, who works in it, and what no longer belongs there."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from mutirao.console import format_bytes
from mutirao.demo.recipe import DemoRecipe
from mutirao.demo.steps import made_paths
from mutirao.errors import DiskFullError, InputError, explain_disk_errors

NEEDED_BYTES = 1_500_000_000
"""Room a run takes with the default model: 1.3 GB measured, rounded up."""
LOCK_NAME = ".lock"
RUN_NAMES = (
    "model",
    "silos",
    "data",
    "evaluation",
    "federated",
    "alone",
    "merged",
    "compressed",
    "answer",
    "steps",
    "work",
    "stages.json",
    "report.html",
    "recipe.json",
)
"""What a run leaves in its folder; ``recipe.json``, which marks it as a run, goes last."""


@contextmanager
def claim_folder(run: Path, *, fresh: bool) -> Iterator[None]:
    """Make the run's folder and hold it for this process alone.

    Args:
        run: the folder.
        fresh: remove an earlier run in it first.

    Raises:
        InputError: it is no folder, holds something else, or another command is at work.
        DiskFullError: too little room is left for a run.
    """
    _check_folder(run)
    with explain_disk_errors(run), _lock(run):
        for left in (*run.rglob(".*.partial"), *run.rglob(".*.old")):
            _remove(left)
        if fresh:
            _remove_run(run)
        missing = NEEDED_BYTES - _used_bytes(run) - shutil.disk_usage(run).free
        if missing > 0:
            raise DiskFullError(
                f"{run} has too little room: {format_bytes(missing)} more are needed; free some, "
                "or name another folder with --out"
            )
        yield


def _check_folder(run: Path) -> None:
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is a file; name a folder for the run with --out")
    if not run.is_dir() or _is_run(run):
        return
    if any(child.name != LOCK_NAME for child in run.iterdir()):
        raise InputError(
            f"{run} is not empty and holds no run of this demonstration; name another folder "
            "with --out"
        )


def _is_run(run: Path) -> bool:
    """Whether the folder's recipe is one of ours, or damaged and beside finished steps."""
    try:
        content = (run / "recipe.json").read_bytes()
        DemoRecipe.model_validate_json(content)
    except OSError:
        return False
    except ValidationError:
        return (run / "steps").is_dir()
    return True


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Keep a second command out of the folder; a process that dies holds nothing."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK_NAME).open("a")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(
            f"{run} cannot be made or written: {error.strerror}; name another folder with --out"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another command is at work in {run}; wait until it ends, or name another "
                "folder with --out"
            ) from None
        yield


def _remove_run(run: Path) -> None:
    """Remove what a run leaves, and nothing else that someone may keep in its folder."""
    for name in RUN_NAMES:
        _remove(run / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _used_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove_stale(run: Path, wanted: set[Path]) -> None:
    """Remove what steps of an earlier recipe made, such as for silos it no longer names.

    Args:
        run: the folder; what no step of a run has made there is left alone.
        wanted: every artifact that the recipe leads to.
    """
    for path in made_paths(run / "steps"):
        if path not in wanted:
            _remove(path)


def refuse_other_subject(run: Path, recipe: DemoRecipe) -> None:
    """Refuse to go on in a folder whose run was made from other silos or another model.

    Raises:
        InputError: it was; going on would write over its result.
    """
    try:
        earlier = DemoRecipe.model_validate_json((run / "recipe.json").read_bytes())
    except (OSError, ValidationError):
        return
    for name in ("model", "silos"):
        if getattr(earlier, name) != getattr(recipe, name):
            raise InputError(
                f"{run} holds a run with another {name} setting, which would be written over; "
                "name another folder with --out, or throw that run away with --fresh"
            )
