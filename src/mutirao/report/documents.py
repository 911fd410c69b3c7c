"""The JSON files of a run, read into plain dataclasses.

A file that is not there yet gives None or nothing; a file that is there and does not fit is
an error, never a silent gap. Keys that are not named here are left alone, so that a stage
may write more than the page shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

from mutirao.artifact import MANIFEST_NAME, Manifest, read_manifest
from mutirao.errors import ArtifactError, InputError

T = TypeVar("T")

STAGE_FOLDERS = ("model", "silos", "data", "evaluation", "federated", "alone", "merged")
LATE_FOLDERS = ("compressed", "answer")
RUN_FILES = ("recipe.json", "stages.json")


@dataclass(frozen=True)
class Stage:
    """What one stage of the run took."""

    stage: str
    seconds: float
    """Wall time of the call that did the work."""
    peak_memory_bytes: int
    """All its processes together."""
    resumed: bool = False
    """Whether the last call found it done already."""


@dataclass(frozen=True)
class InjectedCount:
    """Identifiers put in on purpose, and how many of them were caught."""

    num: int
    caught: int


@dataclass(frozen=True)
class Preparation:
    """What happened to one silo's text, in counts."""

    num_records_in: int
    num_bytes_in: int
    num_kept: int
    num_train: int
    num_heldout: int
    num_bytes_kept: int
    """UTF-8 bytes of the text that was used, and stays."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records per reason."""
    identifiers: dict[str, int] = field(default_factory=dict)
    """Replaced identifiers per type."""
    injected: dict[str, InjectedCount] | None = None
    notice: str = ""
    """What was not removed."""


@dataclass(frozen=True)
class SiteRound:
    """What one site did in one round."""

    train_loss: float | None
    """Nats per token; None under differential privacy."""
    heldout_loss: float | None
    """Of the global model as received, nats per token."""
    num_tokens: int
    bytes_sent: int
    bytes_received: int
    seconds: float
    update_sha256: str


@dataclass(frozen=True)
class Round:
    """One finished round."""

    round: int
    seconds: float
    sites: dict[str, SiteRound]


@dataclass(frozen=True)
class Answer:
    """The finished model's answer to the run's question."""

    prompt: str
    answer: str
    seconds: float | None = None
    tokens_per_s: float | None = None
    model: str = "merged"


def check_is_run(run: Path) -> None:
    """Refuse a folder that holds nothing of a run.

    Raises:
        InputError: it is no folder, or has neither a run's files nor a stage's artifact.
    """
    if not run.is_dir():
        raise InputError(
            f"{run} is not a folder; name the run's folder that `mutirao demo` printed"
        )
    if any((run / name).is_file() for name in RUN_FILES):
        return
    for name in (*STAGE_FOLDERS, *LATE_FOLDERS):
        if any((run / name).glob(MANIFEST_NAME)) or any((run / name).glob(f"*/{MANIFEST_NAME}")):
            return
    raise InputError(
        f"{run} is not a run: it has no {' or '.join(RUN_FILES)} and no stage's artifact; "
        "name the folder that `mutirao demo` printed"
    )


def read_document(kind: type[T], path: Path) -> T | None:
    """Read a JSON file as ``kind``; None where it is not there.

    Raises:
        ArtifactError: the file is damaged or of another shape.
    """
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"at {where!r}: {first['msg']}" if where else first["msg"]
        raise ArtifactError(
            f"{path} is damaged ({what}); run the stage that wrote it again"
        ) from None


def find_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest; None where it is not an artifact yet.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    return read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None


def artifacts_in(folder: Path) -> dict[str, Path]:
    """Return the finished artifacts directly inside a folder, by name, in order."""
    if not folder.is_dir():
        return {}
    found = sorted(child for child in folder.iterdir() if (child / MANIFEST_NAME).is_file())
    return {child.name: child for child in found if not child.name.startswith(".")}


def read_stages(run: Path) -> tuple[Stage, ...]:
    """Read what each stage took; empty where nothing was recorded."""
    return tuple(read_document(list[Stage], run / "stages.json") or ())


def read_preparations(run: Path) -> dict[str, Preparation]:
    """Read each silo's counts, by silo."""
    reports = {
        name: read_document(Preparation, folder / "report.json")
        for name, folder in artifacts_in(run / "data").items()
    }
    return {name: report for name, report in reports.items() if report is not None}


def read_rounds(run: Path) -> tuple[Round, ...]:
    """Read the federation's rounds, in order; empty where there are none."""
    return tuple(read_document(list[Round], run / "federated" / "rounds.json") or ())


def read_answer(run: Path) -> Answer | None:
    """Read the answer; None where nothing was asked yet."""
    return read_document(Answer, run / "answer" / "answer.json")


def read_recipe(run: Path) -> dict[str, JsonValue] | None:
    """Read the run's resolved recipe."""
    return read_document(dict[str, Any], run / "recipe.json")
