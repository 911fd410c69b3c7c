"""What is kept on disk between rounds, on both sides, so that any process may die.

The coordinator writes each finished round's global state and its record; a site writes,
for each round, its optimizer state, its local result and the very bytes it sent. A round
that was not finished is simply done again: a site that is asked twice for the same work
answers with the journaled bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mutirao.artifact import canonical_json, write_atomic
from mutirao.config import Config
from mutirao.errors import ArtifactError, explain_disk_errors


class SiteRound(Config):
    """What one site did in one round."""

    train_loss: float
    """Mean training loss, nats per token."""
    heldout_loss: float | None
    """Loss of the global model as received, on the site's held-out text, nats per token."""
    num_tokens: int
    """Training tokens."""
    bytes_sent: int
    """Bytes that left the site: the content of its reply."""
    bytes_received: int
    """Bytes of the message's content that came to the site."""
    seconds: float
    """Time of the site's work, in seconds."""
    update_sha256: str
    """Hash of the update that was sent."""


class RoundRecord(Config):
    """One finished round."""

    round: int
    """Number, from 1."""
    seconds: float
    """Wall time, in seconds."""
    sites: dict[str, SiteRound] = Field(default_factory=dict)
    """What each site did, by name."""


class CoordinatorJournal:
    """The coordinator's side: records of finished rounds, and the state after the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds_path = folder / "rounds.json"
        self.status_path = folder / "status.json"

    def records(self) -> list[RoundRecord]:
        """Return the finished rounds, in order.

        Raises:
            ArtifactError: the journal is damaged.
        """
        if not self.rounds_path.exists():
            return []
        try:
            rows = json.loads(self.rounds_path.read_bytes())
            records = [RoundRecord.model_validate(row) for row in rows]
            if [record.round for record in records] != list(range(1, len(records) + 1)):
                raise ValueError("its rounds are not numbered from 1 on")
            return records
        except (ValueError, TypeError) as error:
            what = str(error).partition("\n")[0]
            raise ArtifactError(
                f"the journal {self.rounds_path} is damaged ({what}); remove "
                f"{self.folder} to train anew"
            ) from None

    def has_start(self) -> bool:
        """Whether the agreed start was written."""
        return self._state_path(0).exists()

    def load_state(self, round_number: int) -> dict[str, NDArray[np.float32]]:
        """Return the outer state after a round: 'global' and 'momentum' vectors."""
        return read_arrays(self._state_path(round_number))

    def write_start(self, vector: NDArray[np.float32]) -> None:
        """Keep the agreed start as the state of round 0, without momentum."""
        state = {"global": vector, "momentum": np.zeros_like(vector)}
        write_arrays(self._state_path(0), state)

    def append(self, record: RoundRecord, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep a finished round: first its state, then its record, which makes it count."""
        write_arrays(self._state_path(record.round), state)
        rows = [row.model_dump(mode="json") for row in (*self.records(), record)]
        write_atomic(self.rounds_path, json.dumps(rows, indent=1))

    def write_status(self, state: str, message: str = "") -> None:
        """Say how the run stands: 'running', 'finished' or 'failed' with a sentence."""
        status = {"state": state, "message": message, "pid": os.getpid()}
        write_atomic(self.status_path, json.dumps(status))

    def read_status(self) -> dict[str, Any]:
        """Return the last status, or an empty mapping before the first."""
        if not self.status_path.exists():
            return {}
        status: dict[str, Any] = json.loads(self.status_path.read_bytes())
        return status

    def _state_path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:03d}.safetensors"


class SiteJournal:
    """A site's side: what it sent in each round, and what it needs to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_path = folder / "log.jsonl"
        self.progress_path = folder / "progress.json"

    def round_folder(self, round_number: int) -> Path:
        """Return the folder of one round, made if need be."""
        path = self.folder / f"round-{round_number:03d}"
        with explain_disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def read_reply(self, round_number: int, request_sha256: str) -> dict[str, Any] | None:
        """Return the journaled answer to this very request, or None."""
        folder = self.round_folder(round_number)
        try:
            answer: dict[str, Any] = json.loads((folder / "reply.json").read_bytes())
            if answer.pop("request_sha256") != request_sha256:
                return None
            return {**answer, **read_arrays(folder / "reply.safetensors")}
        except (OSError, ValueError, KeyError, ArtifactError):
            return None  # not there or half-written: the round is simply done again

    def write_reply(
        self,
        round_number: int,
        request_sha256: str,
        arrays: Mapping[str, NDArray[Any]],
        answer: Mapping[str, Any],
    ) -> None:
        """Keep the answer before it is sent; ``reply.json``, written last, makes it count."""
        folder = self.round_folder(round_number)
        write_arrays(folder / "reply.safetensors", arrays)
        write_atomic(
            folder / "reply.json", canonical_json({**answer, "request_sha256": request_sha256})
        )

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


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to one safetensors file, atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, save(contiguous))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        arrays: dict[str, NDArray[Any]] = load(path.read_bytes())
        return arrays
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"the journal {path} is damaged ({error}); remove {path.parent} to train anew"
        ) from None
