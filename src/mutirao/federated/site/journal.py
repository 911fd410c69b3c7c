"""What a site keeps on disk, so that its process may die at any moment.

    work/log.jsonl                      what came and what left, for people
    work/progress.json                  how far the round has come
    work/runs/RUN/run.json              which run, and the hash of the plan that it began with
    work/runs/RUN/plan.json             that plan
    work/runs/RUN/replica.safetensors   the state that all sites hold alike; its hash is its proof
    work/runs/RUN/privacy.json          what was spent of the run's privacy budget
    work/runs/RUN/round-NNN/            one round: optimizer, residuals, secure aggregation's
                                        session, and last of all the answers

RUN is the first 16 digits of the run's id. A round counts when it has an answer: a round that
was cut short is done again from what an answered round before it left (its base: the last one
whose update counted), and a request that was answered gets the same bytes again. Folders of
rounds before the last two are removed, but for the base of the last one.
Every file is written beside its place, flushed and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mutirao.artifact import canonical_json, write_atomic
from mutirao.config import Config, load_json
from mutirao.errors import ArtifactError, FederationError, UpdateError, explain_disk_errors
from mutirao.federated.arrays import read_arrays, write_arrays
from mutirao.federated.codec import Tensors
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import RUN_ID, Plan
from mutirao.federated.site.replica import hash_tensors

RUNS = "runs"
PLAN_NAME = "plan.json"
REPLICA_NAME = "replica.safetensors"
OPTIMIZER_NAME = "optimizer.pt"
RESIDUALS_NAME = "residuals.safetensors"
LOCAL_NAME = "local.safetensors"
PROGRESS_INTERVAL_S = 0.5
"""Least time between two notes of progress."""
_RUN_CHARACTERS = 16
_ROUND = re.compile(r"round-(\d{3,9})")
_UPDATE = "update-{}.parcel"
_MEASURED = "measured-{}.parcel"


class RunNote(Config):
    """Which run a folder belongs to."""

    run: str
    """The run's id."""
    plan_sha256: str
    """Hash of the plan that it began with."""


class SiteJournal:
    """What a site keeps of all runs: its log, and a folder for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_path = folder / "log.jsonl"
        self.progress_path = folder / "progress.json"

    def run(self, run_id: str) -> RunJournal:
        """Return one run's folder.

        Raises:
            UpdateError: it is not the id of a run.
        """
        if not RUN_ID.fullmatch(run_id):
            raise UpdateError("a request names no run (expected 64 hexadecimal digits)")
        return RunJournal(self.folder / RUNS / run_id[:_RUN_CHARACTERS], run_id)

    def runs(self) -> list[RunJournal]:
        """Return all runs, the one that began last first."""
        notes = sorted((self.folder / RUNS).glob("*/run.json"), key=_changed, reverse=True)
        return [RunJournal(path.parent, note.run) for path in notes if (note := _note(path))]

    def runs_of(self, plan: Plan) -> list[RunJournal]:
        """Return the runs that began with a plan, the latest first."""
        return [each for each in self.runs() if each.plan_sha256() == plan.sha256]

    def log(self, **event: Any) -> None:
        """Append one line to the site's log: what came, what left, when."""
        with explain_disk_errors(self.log_path):
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **event}
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def write_progress(self, round_number: int, num_tokens: int) -> None:
        """Say how far the round has come, for whoever watches on this machine."""
        write_atomic(
            self.progress_path, json.dumps({"round": round_number, "num_tokens": num_tokens})
        )


class Progress:
    """Notes how far a round has come, not too often: each note is a file flushed to disk."""

    def __init__(self, journal: SiteJournal, round_number: int) -> None:
        self._journal, self._round = journal, round_number
        self._last_s = 0.0

    def __call__(self, num_tokens: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_INTERVAL_S:
            self._last_s = now_s
            self._journal.write_progress(self._round, num_tokens)


class RunJournal:
    """One run's folder at a site."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id

    def begin(self, plan: Plan) -> None:
        """Note run and plan on first use.

        Raises:
            FederationError: the folder belongs to another run, or the run to another plan.
            ArtifactError: the note is damaged.
        """
        path = self.folder / "run.json"
        note = RunNote(run=self.run_id, plan_sha256=plan.sha256)
        if not path.exists():
            write_atomic(self.folder / PLAN_NAME, plan.model_dump_json(indent=1))
            write_atomic(path, canonical_json(note.model_dump(mode="json")))
        elif (kept := _note(path)) is None:
            raise ArtifactError(
                f"the journal {path} is damaged; remove {self.folder} to train anew in another run"
            )
        elif kept != note:
            raise FederationError(
                f"run {self.run_id[:_RUN_CHARACTERS]} began with another plan at this site; begin "
                "a new run with the new plan"
            )

    def plan_sha256(self) -> str | None:
        """Return the hash of the plan that the run began with, or None before it began."""
        note = _note(self.folder / "run.json")
        return note.plan_sha256 if note else None

    def read_plan(self) -> Plan:
        """Return the plan that the run began with.

        Raises:
            RecipeError: it is missing or damaged.
        """
        return load_json(Plan, self.folder / PLAN_NAME)

    def read_replica(self) -> tuple[str, dict[str, NDArray[np.float32]]] | None:
        """Return the state held and its hash, computed from what is there; None without one."""
        try:
            tensors = read_arrays(self.folder / REPLICA_NAME)
        except ArtifactError:
            return None  # the coordinator is asked for the whole state
        return hash_tensors(tensors), tensors

    def state_names(self) -> tuple[str, ...]:
        """Return the names of the tensors of the state held, in order; none without one."""
        try:
            with safe_open(self.folder / REPLICA_NAME, framework="numpy") as file:
                return tuple(sorted(file.keys()))
        except (OSError, SafetensorError):
            return ()

    def write_replica(self, tensors: Tensors) -> None:
        """Keep the state that a request led to."""
        write_arrays(self.folder / REPLICA_NAME, tensors)

    def round_folder(self, round_number: int) -> Path:
        """Return the folder of one round, which may not be there yet."""
        return self.folder / f"round-{round_number:03d}"

    def last_round(self, before: int | None = None) -> int:
        """Return the last round that has an answer to a training request; 0 for none.

        Args:
            before: only rounds before this one count.
        """
        answered = [
            int(match[1])
            for path in self.folder.glob("round-*")
            if (match := _ROUND.fullmatch(path.name)) and any(path.glob(_UPDATE.format("*")))
        ]
        return max((n for n in answered if before is None or n < before), default=0)

    def read_answer(self, round_number: int, request_sha256: str) -> Parcel | None:
        """Return the journaled answer to this very request, or None."""
        for name in (_UPDATE, _MEASURED):
            try:
                path = self.round_folder(round_number) / name.format(request_sha256)
                return Parcel.from_bytes(path.read_bytes())
            except (OSError, UpdateError):
                continue  # not there, or damaged: the work is done again
        return None

    def write_update(
        self, round_number: int, request_sha256: str, answer: Parcel, *, base: int = 0
    ) -> None:
        """Keep the answer to a training request before it is sent; after this the round counts.

        Folders of rounds that nothing can follow any more are removed.

        Args:
            round_number: from 1.
            request_sha256: the request's.
            answer: to it.
            base: the round that this one goes on from, which stays, for the next one may go on
                from there again; 0 for none.
        """
        path = self.round_folder(round_number) / _UPDATE.format(request_sha256)
        write_atomic(path, answer.to_bytes())
        self._prune(round_number, base)

    def write_measured(self, round_number: int, request_sha256: str, answer: Parcel) -> None:
        """Keep the answer to a request that changes nothing here."""
        path = self.round_folder(round_number) / _MEASURED.format(request_sha256)
        write_atomic(path, answer.to_bytes())

    def _prune(self, round_number: int, base: int) -> None:
        """Remove rounds before the last two; of round 1 what ``train_alone`` begins with stays."""
        for path in self.folder.glob("round-*"):
            match = _ROUND.fullmatch(path.name)
            if match is None or int(match[1]) >= round_number - 1 or int(match[1]) == base:
                continue
            if not (path / LOCAL_NAME).exists():
                shutil.rmtree(path, ignore_errors=True)
                continue
            for file in path.iterdir():
                if file.name not in (LOCAL_NAME, OPTIMIZER_NAME):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()

    def read_residuals(self, round_number: int) -> dict[str, NDArray[np.float32]] | None:
        """Return what rounding left behind in a round; None where nothing was kept.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = self.round_folder(round_number) / RESIDUALS_NAME
        return read_arrays(path) if path.exists() else None

    def write_residuals(self, round_number: int, residuals: Mapping[str, NDArray[Any]]) -> None:
        """Keep what rounding left behind."""
        write_arrays(self.round_folder(round_number) / RESIDUALS_NAME, residuals)

    @property
    def privacy_path(self) -> Path:
        """The run's privacy ledger."""
        return self.folder / "privacy.json"


def _note(path: Path) -> RunNote | None:
    try:
        return RunNote.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
