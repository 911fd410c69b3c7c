"""What the coordinator keeps on disk, so that its process may die at any moment.

    work/status.json          how the run stands, for people and for who started it
    work/rounds.json          the records of finished rounds; a round counts by its record
    work/refused.jsonl        what was refused, from whom and why
    work/state/NNN/           the state after round NNN; 000 is the start
        global.safetensors    the float32 master
        replica.safetensors   what the sites of the next round hold alike
        outer.safetensors     what the outer optimizer remembers
        change.safetensors    what leads to this replica from the one that they held
    work/rounds/NNN/updates/  each site's accepted update, as it came
    work/rounds/NNN/cohort.json  whose updates make the round, once that is settled
    work/rounds/NNN/secure/   the messages of secure aggregation instead

Every file is written beside its place, flushed and renamed; first a round's state, then its
record. A round without a record is done again from the updates that are there: the same
updates give the same bytes. Updates are kept, for ``unlearning`` and ``measures``. The record
of a round holds the hashes of its states, by which they are checked when they are read on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mutirao.artifact import write_atomic
from mutirao.config import Config, load_json
from mutirao.errors import ArtifactError, InputError, explain_disk_errors
from mutirao.federated.aggregation.outer import OuterOptimizer
from mutirao.federated.coordinator.state_files import StateFile, writing
from mutirao.federated.messages import printable
from mutirao.federated.plan import Coordinator, Plan
from mutirao.federated.secure.terms import RUN_ID_BYTES
from mutirao.federated.site.replica import update_hash

COORDINATOR_NAME = "coordinator.json"
"""The coordinator's own file, where it is kept beside its journal."""
SMALL_STATE_BYTES = 64 * 1024 * 1024
"""States of fewer bytes are all kept, larger ones but for the start and the last two, or as many
as turns need. A hundred rounds of an adapter of a few million values then take a few GB, and a
run can be cut before any round (``unlearning``); full weights would fill the disk. The limit is
a choice."""


class SiteRound(Config):
    """What one site did in one round."""

    num_tokens: int
    """Training tokens."""
    num_steps: int
    """Optimizer steps."""
    train_loss: float | None = None
    """Mean training loss, nats per token; null under differential privacy."""
    heldout_loss: float | None = None
    """Loss of the state as received on the site's held-out text, nats per token; null where it
    was not measured."""
    epsilon: float | None = None
    """Privacy spent by the site so far; null without differential privacy."""
    num_clipped: int = 0
    """Values that secure aggregation's clip cut off."""
    seconds: float
    """Time of the site's work, in seconds."""
    bytes_sent: int
    """Bytes of the site's answers: header, signature and payloads."""
    bytes_received: int
    """Bytes of the requests that they answer."""
    update_sha256: str
    """Hash of the answer with the update; under secure aggregation, of the masked one."""
    update_norm: float | None = None
    """L2 norm of the decoded update; null under secure aggregation."""
    cosine_to_mean: float | None = None
    """Cosine of the update to the round's mean, itself included; null under secure aggregation
    or where one of them is zero."""


class RoundRecord(Config):
    """One finished round."""

    round: int = Field(ge=1)
    """Number, from 1."""
    seconds: float
    """Wall time of the process that finished it, in seconds."""
    sites: dict[str, SiteRound] = Field(default_factory=dict)
    """What each site did whose update is in, by name."""
    missing: tuple[str, ...] = ()
    """Sites whose update did not come in time."""
    refused: tuple[str, ...] = ()
    """Sites of which something was refused in this round."""
    global_sha256: str = ""
    """Hash of the coordinator's state after the round."""
    replica_sha256: str = ""
    """Hash of what the sites hold after it."""
    is_secure: bool = False
    """Whether the coordinator saw the sum alone."""


class CoordinatorJournal:
    """The coordinator's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rounds_path = folder / "rounds.json"
        self.status_path = folder / "status.json"
        self.refused_path = folder / "refused.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running rounds in the same folder; a dead one keeps nobody.

        Raises:
            InputError: one does.
        """
        with explain_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise InputError(
                f"another process runs the rounds of {self.folder} (see {self.status_path}); wait "
                "for it, or stop it"
            ) from None
        finally:
            os.close(descriptor)

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
        except (ValueError, TypeError, RecursionError) as error:
            what = str(error).partition("\n")[0]
            raise ArtifactError(
                f"the journal {self.rounds_path} is damaged ({what}); remove "
                f"{self.folder} to train anew"
            ) from None

    def append(self, record: RoundRecord, *, num_kept: int = 2) -> None:
        """Make a finished round count; its state must be there.

        Of states that are large, the last ``num_kept`` stay.
        """
        self.write_records([*self.records(), record])
        self._prune(record.round, num_kept)

    def write_records(self, records: list[RoundRecord]) -> None:
        """Set the finished rounds."""
        rows = [row.model_dump(mode="json") for row in records]
        write_atomic(self.rounds_path, json.dumps(rows, indent=1))

    def state_path(self, round_number: int, part: str) -> Path:
        """Return the path of one part of a state: global, replica, outer, change or whole."""
        return self.folder / "state" / f"{round_number:03d}" / f"{part}.safetensors"

    def open_state(self, round_number: int, part: str) -> StateFile:
        """Return one part of the state after a round.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        return StateFile(self.state_path(round_number, part))

    def has_state(self, round_number: int) -> bool:
        """Whether the state after a round is kept."""
        parts = ("global", "replica", "outer")
        return all(self.state_path(round_number, part).exists() for part in parts)

    def has_start(self) -> bool:
        """Whether the agreed start was written."""
        return self.has_state(0)

    def write_start(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], NDArray[np.float32]],
        outer: OuterOptimizer,
    ) -> None:
        """Keep the agreed start as the state of round 0.

        Args:
            shapes: of the trained tensors, by name.
            read: gives one of them, float32.
            outer: the outer optimizer, of which the file that is written last has the start.
        """
        for part in ("global", "replica"):
            with writing(self.state_path(0, part), shapes, "F32") as file:
                for name in sorted(shapes):
                    file.write(name, read(name))
        kinds = outer_kinds(outer)
        kept = {f"{kind}/{name}": shapes[name] for name in shapes for kind in kinds}
        with writing(self.state_path(0, "outer"), kept, "F32") as file:
            for key in sorted(kept):
                name = key.partition("/")[2]
                file.write(key, outer.start({name: read(name)}).arrays[key])

    def replica_sha256(self, round_number: int) -> str:
        """Return the hash of what the sites hold after a round; of the start it is computed.

        Raises:
            ArtifactError: the start is missing or damaged, or the round has no record.
        """
        if round_number == 0:
            return hash_state(self.open_state(0, "replica"))
        records = self.records()
        if len(records) < round_number:
            raise ArtifactError(f"the journal {self.rounds_path} has no round {round_number}")
        return records[round_number - 1].replica_sha256

    def round_folder(self, round_number: int) -> Path:
        """Return the folder of what came in a round, which may not be there yet."""
        return self.folder / "rounds" / f"{round_number:03d}"

    def update_path(self, round_number: int, site: str) -> Path:
        """Return where a site's update of a round is kept."""
        return self.round_folder(round_number) / "updates" / f"{site}.parcel"

    def secure_folder(self, round_number: int) -> Path:
        """Return where the messages of secure aggregation are kept."""
        return self.round_folder(round_number) / "secure"

    def write_status(
        self,
        state: str,
        message: str = "",
        *,
        round_number: int = 0,
        phase: str = "",
        waiting: tuple[str, ...] = (),
    ) -> None:
        """Say how the run stands: 'running', 'finished' or 'failed' with a sentence."""
        status = {
            "state": state,
            "message": message,
            "pid": os.getpid(),
            "round": round_number,
            "phase": phase,
            "waiting": list(waiting),
        }
        write_atomic(self.status_path, json.dumps(status))

    def read_status(self) -> dict[str, Any]:
        """Return the last status; empty before the first, or where it is damaged."""
        try:
            status = json.loads(self.status_path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    def log_refusal(self, round_number: int, site: str, sentence: str) -> None:
        """Append what was refused to the log of refusals."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "round": round_number,
            "site": printable(site)[:64],
            "sentence": printable(sentence),
        }
        with explain_disk_errors(self.refused_path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.refused_path.open("a+b") as file:
                is_torn = file.tell() > 0 and _last_byte(file) != b"\n"
                text = ("\n" if is_torn else "") + json.dumps(line, ensure_ascii=False) + "\n"
                file.write(text.encode())

    def refusals(self) -> list[dict[str, Any]]:
        """Return what was refused, in order; a line that was cut by a crash is left out."""
        if not self.refused_path.exists():
            return []
        rows = []
        for line in self.refused_path.read_bytes().splitlines():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                continue
        return rows

    def refused_sites(self, round_number: int) -> set[str]:
        """Return the names under which something was refused in a round."""
        return {str(row.get("site")) for row in self.refusals() if row.get("round") == round_number}

    def read_cohort(self, round_number: int) -> list[str] | None:
        """Return whose updates make a round, if that was settled before a restart."""
        try:
            names = json.loads((self.round_folder(round_number) / "cohort.json").read_bytes())
        except (OSError, ValueError):
            return None
        return [str(name) for name in names] if isinstance(names, list) else None

    def write_cohort(self, round_number: int, sites: Iterable[str]) -> None:
        """Settle whose updates make a round, so that a restart changes nothing about it."""
        path = self.round_folder(round_number) / "cohort.json"
        write_atomic(path, json.dumps(sorted(sites)))

    def _prune(self, round_number: int, num_kept: int) -> None:
        """Remove what no later round needs, where states are large."""
        for path in self.folder.glob("state/*/whole.safetensors"):
            if int(path.parent.name) < round_number:
                path.unlink()
        if self._state_bytes(round_number) < SMALL_STATE_BYTES:
            return
        for folder in self.folder.glob("state/*"):
            if 0 < int(folder.name) <= round_number - num_kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _state_bytes(self, round_number: int) -> int:
        folder = self.state_path(round_number, "global").parent
        return sum(path.stat().st_size for path in folder.iterdir())


def keep_coordinator(plan: Plan, sites: Mapping[str, str], work: Path) -> Coordinator:
    """Return a run's coordinator, made and kept on first use.

    Args:
        plan: what is agreed. Where only port and waiting time are others than those of the
            kept plan, that one goes on: they change nothing, and sites know a run by its plan.
        sites: public key of each site, by name.
        work: the coordinator's folder.

    Raises:
        InputError: the folder belongs to another plan or other sites.
    """
    work = work.resolve()
    path = work / COORDINATOR_NAME
    if not path.exists():
        run_id = secrets.token_hex(RUN_ID_BYTES)
        made = Coordinator(plan=plan, sites=dict(sites), work=work, run_id=run_id)
        write_atomic(path, made.model_dump_json(indent=1))
        return made
    kept = load_json(Coordinator, path)
    local = {"port": plan.federated.port, "connect_timeout_s": plan.federated.connect_timeout_s}
    federated = kept.plan.federated.model_copy(update=local)
    same = kept.plan.model_copy(update={"federated": federated}) == plan
    if not same or kept.sites != sites:
        raise InputError(
            f"{path} belongs to another plan or other sites; name another folder, or remove "
            f"{work} to train anew"
        )
    return kept.model_copy(update={"work": work})


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def outer_kinds(outer: OuterOptimizer) -> list[str]:
    """Return the kinds of arrays that an outer optimizer keeps for each tensor, sorted."""
    arrays = outer.start({"any": np.zeros(1, np.float32)}).arrays
    return sorted(key.partition("/")[0] for key in arrays)


def hash_state(file: StateFile) -> str:
    """Return the hash of a float32 state, one tensor in memory at a time."""
    digest = hashlib.sha256()
    for name in file.names:
        update_hash(digest, name, file.read(name))
    return digest.hexdigest()
