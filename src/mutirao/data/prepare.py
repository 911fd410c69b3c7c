"""Make one silo's text ready, on its owner's machine: what is kept, what goes, and why.

The order is: read, judge quality, drop exact and near duplicates, replace identifiers by
their type, split into train and held-out. The result is an artifact with both sides as
JSONL and a report of counts that holds no text but a few redacted excerpts. Records pass
one by one; besides them only what duplicates are found by is held in memory.

Names of people are NOT removed; ``identifiers`` says what else is not.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TextIO

from pydantic import Field, ValidationError

from mutirao.artifact import open_artifact, write_artifact, write_atomic
from mutirao.config import Config
from mutirao.console import track
from mutirao.data.config import DataConfig
from mutirao.data.duplicates import DuplicateFilter
from mutirao.data.identifiers.replacement import Put, redact, type_in_brackets
from mutirao.data.identifiers.search import NOT_REMOVED, Identifier, find_identifiers
from mutirao.data.identifiers.surrogates import surrogate, value_hash
from mutirao.data.quality import QualityFilter
from mutirao.data.readers.folder import folder_sha256, read_folder
from mutirao.data.readers.problems import CountedProblems, Problems
from mutirao.data.records import Record
from mutirao.data.split import Side, side_of
from mutirao.errors import ArtifactError, DataError

SIDES: tuple[Side, ...] = ("train", "heldout")
REPORT_NAME = "report.json"
AUDIT_NAME = "audit.jsonl"
_EXCERPT_CHARACTERS = 120
_EXCERPTS_PER_REASON = 3


class InjectedIdentifier(Config):
    """An identifier put into a record on purpose, to see whether it is caught."""

    id: str
    """Id of the record, as the reader gives it."""
    start: int = Field(ge=0)
    """First character in the record's text, from 0."""
    end: int
    """One past the last character."""
    type: str
    """Its true type; NAME among them, which no recogniser finds."""
    value: str
    """What stands there; checked against the text."""


class InjectedCount(Config):
    """How many identifiers of one type were injected, and caught whole."""

    num: int = 0
    """Injected into records that reached the search."""
    caught: int = 0
    """Covered from first to last character by one detected identifier, of any type."""


class PreparationReport(Config):
    """What happened to a silo's text, in counts."""

    num_records_in: int
    """Records read."""
    num_bytes_in: int
    """Their text in UTF-8, bytes."""
    num_kept: int
    """Records kept, both sides together."""
    num_train: int
    """Records to train on."""
    num_heldout: int
    """Records to evaluate on."""
    num_bytes_kept: int
    """The kept records' text in UTF-8 after redaction, bytes: the data that stays."""
    dropped: dict[str, int]
    """Dropped records per reason."""
    identifiers: dict[str, int]
    """Identifiers replaced, per type."""
    injected: dict[str, InjectedCount] | None = None
    """Injected identifiers per type; None where none were injected."""
    examples_dropped: dict[str, list[str]]
    """A few short excerpts per reason, identifiers already replaced."""
    problems: dict[str, int] = Field(default_factory=dict)
    """Files and rows that could not be read, or were mended, per kind."""
    problem_places: dict[str, list[str]] = Field(default_factory=dict)
    """Where the first few of each kind are: file, and line or piece."""
    notice: str = NOT_REMOVED
    """What was not removed; to be shown beside the counts."""


def prepare_silo(
    name: str,
    folder: Path,
    out: Path,
    config: DataConfig,
    *,
    injected: Path | None = None,
    key: bytes | None = None,
    problems: Problems | None = None,
) -> PreparationReport:
    """Make a silo's folder of raw text into an artifact of kind "data".

    Args:
        name: the silo's name, for messages and lineage.
        folder: raw text; see ``readers``.
        out: the artifact's folder: train.jsonl, heldout.jsonl, report.json, and audit.jsonl where
            there is a key.
        config: limits of every step.
        injected: JSONL of ``InjectedIdentifier`` rows, or None.
        key: the site's own, see ``identifiers.surrogates``; None: identifiers cannot be replaced by
            surrogates, and no audit is written.
        problems: is told what cannot be read; None: the first raises.

    Returns:
        The report, as written in the artifact.

    Raises:
        DataError: the folder or a row cannot be read, too few records are left, or there is no key
            for surrogates.
        DiskFullError: no room; ``out`` is as it was.
    """
    if config.identifiers.mode == "surrogate" and key is None:
        raise DataError("data.identifiers.mode='surrogate' needs the site's key; give one")
    truth = _read_injected(injected) if injected is not None else None
    recipe = config.model_dump(mode="json")
    with write_artifact(out, "data", recipe=recipe) as writer:
        writer.add_source("raw text", f"{name}: folder {folder.name}", folder_sha256(folder))
        audit = _Audit(writer.path / AUDIT_NAME, key) if key is not None else None
        preparation = _Preparation(config, truth, key, audit)
        with (
            (writer.path / "train.jsonl").open("w", encoding="utf-8") as train,
            (writer.path / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
            audit or nullcontext(),
        ):
            files: dict[Side, TextIO] = {"train": train, "heldout": heldout}
            for record in track(read_folder(folder, problems), f"preparing {name}"):
                for kept, side in preparation.process(record):
                    files[side].write(kept.model_dump_json() + "\n")
        report = preparation.report(problems)
        _check_enough(name, folder, report, config)
        write_atomic(writer.path / REPORT_NAME, report.model_dump_json(indent=2))
        writer.metrics.update(
            {
                "num_train": report.num_train,
                "num_heldout": report.num_heldout,
                "num_bytes_kept": report.num_bytes_kept,
            }
        )
    return report


def load_records(artifact: Path, split: Side) -> list[Record]:
    """Read one side of a prepared silo, after checking the artifact.

    Args:
        artifact: folder that ``prepare_silo`` wrote.
        split: "train" or "heldout".

    Raises:
        ArtifactError: the artifact is incomplete, altered, or of another kind.
    """
    open_artifact(artifact, "data")
    path = artifact / f"{split}.jsonl"
    try:
        # Not splitlines(): a record may hold U+2028, which JSON leaves unescaped.
        with path.open(encoding="utf-8", newline="\n") as file:
            return [Record.model_validate_json(line) for line in file]
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); prepare the silo again") from None


def load_report(artifact: Path) -> PreparationReport:
    """Read a prepared silo's report.

    Raises:
        ArtifactError: the report is missing or damaged.
    """
    path = artifact / REPORT_NAME
    try:
        return PreparationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); prepare the silo again") from None


class _Preparation:
    """The steps of one silo, and the counts they leave."""

    def __init__(
        self,
        config: DataConfig,
        truth: dict[str, list[InjectedIdentifier]] | None,
        key: bytes | None,
        audit: _Audit | None,
    ) -> None:
        self._config = config
        self._audit = audit
        self._put = type_in_brackets
        if key is not None and config.identifiers.mode == "surrogate":
            self._put = partial(surrogate, key=key)
        self._truth = truth
        self._quality = QualityFilter(config.quality)
        self._duplicates = DuplicateFilter(config.duplicates)
        self._num_in = self._num_bytes_in = self._num_bytes_kept = 0
        self._num_kept: Counter[Side] = Counter()
        self._dropped: Counter[str] = Counter()
        self._types: Counter[str] = Counter()
        self._excerpts: defaultdict[str, list[str]] = defaultdict(list)
        self._injected: dict[str, InjectedCount] = {}
        self._unseen = set(truth or ())

    def process(self, record: Record) -> Iterator[tuple[Record, Side]]:
        """Yield the record as it is kept, with its side; or nothing, and count why."""
        self._num_in += 1
        self._num_bytes_in += len(record.text.encode("utf-8"))
        truth = self._check_truth(record)
        reason = self._quality.reason(record) or self._duplicates.reason(record)
        if reason is not None:
            self._drop(record, reason)
            return
        identifiers = find_identifiers(record.text)
        self._types.update(item.type for item in identifiers)
        self._count_caught(truth, identifiers)
        if self._audit is not None:
            self._audit.add(record, identifiers)
        if identifiers and self._config.identifiers.mode == "drop":
            self._drop(record, "identifiers")
            return
        side = side_of(record, self._config.heldout_share)
        kept = redact_record(record, identifiers, self._put)
        self._num_kept[side] += 1
        self._num_bytes_kept += len(kept.text.encode("utf-8"))
        yield kept, side

    def report(self, problems: Problems | None) -> PreparationReport:
        """Return the counts so far, with what could not be read.

        Raises:
            DataError: an injected identifier names a record that was not read.
        """
        counted = problems if isinstance(problems, CountedProblems) else CountedProblems()
        if self._unseen:
            raise DataError(
                f"injected identifiers name record {min(self._unseen)!r}, which the silo does "
                "not hold (expected ids such as 'notes.jsonl:12')"
            )
        return PreparationReport(
            num_records_in=self._num_in,
            num_bytes_in=self._num_bytes_in,
            num_kept=self._num_kept.total(),
            num_train=self._num_kept["train"],
            num_heldout=self._num_kept["heldout"],
            num_bytes_kept=self._num_bytes_kept,
            dropped=dict(sorted(self._dropped.items())),
            identifiers=dict(sorted(self._types.items())),
            injected=None if self._truth is None else dict(sorted(self._injected.items())),
            examples_dropped=dict(sorted(self._excerpts.items())),
            problems=dict(sorted(counted.counts.items())),
            problem_places=dict(sorted(counted.places.items())),
        )

    def _check_truth(self, record: Record) -> list[InjectedIdentifier]:
        self._unseen.discard(record.id)
        truth = (self._truth or {}).get(record.id, [])
        for item in truth:
            if record.text[item.start : item.end] != item.value:
                raise DataError(
                    f"injected identifier at {item.id} {item.start}:{item.end} is not what "
                    "stands in the text there; write text and positions together"
                )
        return truth

    def _drop(self, record: Record, reason: str) -> None:
        self._dropped[reason] += 1
        if len(self._excerpts[reason]) < _EXCERPTS_PER_REASON:
            clean = redact(record.text, find_identifiers(record.text))
            short = textwrap.shorten(clean, _EXCERPT_CHARACTERS, placeholder=" …")
            self._excerpts[reason].append(short or clean[:_EXCERPT_CHARACTERS])

    def _count_caught(
        self, truth: Iterable[InjectedIdentifier], identifiers: list[Identifier]
    ) -> None:
        for item in truth:
            caught = any(
                found.start <= item.start and item.end <= found.end for found in identifiers
            )
            before = self._injected.get(item.type, InjectedCount())
            self._injected[item.type] = InjectedCount(
                num=before.num + 1, caught=before.caught + caught
            )


class _Audit:
    """A line for each identifier: its record, its type, and a hash under the site's key."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._key = key
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _Audit:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Record, identifiers: Iterable[Identifier]) -> None:
        for item in identifiers:
            value = record.text[item.start : item.end]
            row = {
                "record": record.id,
                "type": item.type,
                "hash": value_hash(item.type, value, self._key),
            }
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")


def redact_record(
    record: Record, identifiers: Iterable[Identifier], put: Put = type_in_brackets
) -> Record:
    """Return the record with identifiers replaced, its boundary still where it was.

    An identifier that runs across the boundary is replaced on both sides of it. Choices
    are searched and replaced on their own.
    """
    identifiers = list(identifiers)
    boundary = record.context_length
    given = [
        Identifier(item.start, min(item.end, boundary), item.type, item.score)
        for item in identifiers
        if item.start < boundary
    ]
    learned = [
        Identifier(max(item.start - boundary, 0), item.end - boundary, item.type, item.score)
        for item in identifiers
        if item.end > boundary
    ]
    context = redact(record.context, given, put)
    choices = tuple(redact(choice, find_identifiers(choice), put) for choice in record.choices)
    changes = {
        "text": context + redact(record.completion, learned, put),
        "context_length": len(context),
        "choices": choices,
    }
    return record.model_copy(update=changes)


def _read_injected(path: Path) -> dict[str, list[InjectedIdentifier]]:
    truth: defaultdict[str, list[InjectedIdentifier]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"injected identifiers {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                item = InjectedIdentifier.model_validate_json(line)
            except ValidationError:
                raise DataError(
                    f"{path}:{number} is not an injected identifier "
                    '(expected {"id", "start", "end", "type", "value"})'
                ) from None
            truth[item.id].append(item)
    return dict(truth)


def _check_enough(name: str, folder: Path, report: PreparationReport, config: DataConfig) -> None:
    counts = json.dumps(report.dropped, ensure_ascii=False) if report.dropped else "none"
    if not report.num_kept:
        raise DataError(
            f"silo {name}: nothing is left of {report.num_records_in} records in {folder} "
            f"(dropped: {counts}); give other text or relax data.quality"
        )
    if report.num_train < config.min_train_records:
        raise DataError(
            f"silo {name}: {report.num_train} records are left to train on (expected at least "
            f"{config.min_train_records}; read: {report.num_records_in}, dropped: {counts}); "
            "give more text or lower data.min_train_records"
        )
    if report.num_heldout < config.min_heldout_records:
        raise DataError(
            f"silo {name}: {report.num_heldout} of {report.num_kept} records fall on the "
            f"held-out side (expected at least {config.min_heldout_records}); give more text or "
            f"raise data.heldout_share={config.heldout_share}"
        )
