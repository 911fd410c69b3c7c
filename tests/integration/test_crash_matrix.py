"""kill -9 of any process at any point of a run: the same states in the end.

First without Flower, at every write to disk of coordinator and sites, so that hundreds of
deaths take minutes; ``crash_points`` plays them. Then each process of a federation over Flower,
in each phase of a run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import crash_points
import psutil
import pytest
from crash_points import COORDINATOR, VICTIM, all_points, make_world
from tiny_sites import FEDERATED, LORA, TRAIN, make_model, make_silo, make_site

from mutirao.federated.aggregation.outer import Nesterov
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord
from mutirao.federated.flower.deployment import run_federation
from mutirao.federated.plan import Site
from mutirao.federated.simulation import simulate

MODES = ("plain", "secure")
NUM_SAMPLED = 12
"""Deaths of each mode in the ordinary run; ``-m slow`` has all of them."""
HARDLY_ALL = 0.95
"""Of the points at least so many are reached: how often a status is written depends on timing."""


class Played:
    """A world, and what became of it undisturbed and at each point."""

    def __init__(self, folder: Path, model: Path, mode: str, sample: int | None = None) -> None:
        world, out = make_world(folder, model, is_secure=mode == "secure"), folder / "outcomes.json"
        command = [sys.executable, crash_points.__file__, str(world), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command + ([] if sample is None else [str(sample)]),
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        self.calm, self.again, *self.disturbed = json.loads(out.read_text())
        assert self.calm["faults"] == []
        self.writes = self.calm["writes"]

    def check(self) -> None:
        """Each death must end as if nothing had been."""
        wrong = []
        for outcome in self.disturbed:
            if outcome["faults"] or outcome["rounds"] != self.calm["rounds"]:
                where = ", ".join(self.tell(**point) for point in outcome["points"])
                wrong.append(f"{where}: {outcome['faults'] or 'hashes'}")
        assert not wrong, "\n".join(wrong)
        killed = [each["num_killed"] for each in self.disturbed if len(each["points"]) == 1]
        assert sum(killed) >= HARDLY_ALL * len(killed)

    def tell(self, role: str, number: int, is_after: bool) -> str:
        """Return in words where a process died."""
        return f"{role} {'after' if is_after else 'before'} {self.writes[role][number - 1]}"


@pytest.fixture(scope="module", params=MODES)
def played(request, tmp_path_factory, tiny_model_directory):
    folder = tmp_path_factory.mktemp(request.param)
    return Played(folder, tiny_model_directory, request.param, NUM_SAMPLED)


def test_two_undisturbed_runs_are_alike(played):
    assert played.again["faults"] == []
    assert played.again["rounds"] == played.calm["rounds"]
    assert played.again["writes"][VICTIM] == played.writes[VICTIM]
    assert len(played.calm["rounds"]) == 2
    assert played.calm["rounds"][0]["global"] != played.calm["rounds"][1]["global"]


def test_all_that_is_kept_is_among_what_is_written(played):
    coordinator, site = (
        {Path(name.partition(" ")[2]).name for name in played.writes[role]}
        for role in (COORDINATOR, VICTIM)
    )
    assert coordinator >= {"rounds.json", "status.json", "global.safetensors", "whole.safetensors"}
    assert coordinator >= {"outer.safetensors", "replica.safetensors", "change.safetensors"}
    assert site >= {"replica.safetensors", "optimizer.pt", "update.parcel", "audit.jsonl"}
    kept = "session.bin" if "members.json" in coordinator else "residuals.safetensors"
    assert kept in site


def test_a_sample_of_deaths_changes_nothing(played):
    assert len(played.disturbed) == NUM_SAMPLED + NUM_SAMPLED // 4
    played.check()


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("mode", MODES)
def test_a_death_at_any_write_changes_nothing(tmp_path, tiny_model_directory, mode):
    played = Played(tmp_path, tiny_model_directory, mode)
    num = len(all_points(played.writes))
    assert len(played.disturbed) == num + num // 4
    played.check()


# --- Flower's processes -------------------------------------------------------------------------

SITES = ("north", "south")
VICTIMS = {
    "SuperLink": "flower.superlink",
    "SuperExec": "flower-superexec",
    "ServerApp": "flwr-serverapp",
    "site agent": "flower.site_agent",
    "site worker": "site.process",
}
"""Words in a process's command line."""
SLOW_DISK = """\
import os, time
fsync = os.fsync
def slow_fsync(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow_fsync
"""
"""Each flush takes 50 ms, so that a phase of a tiny model lasts long enough to be met."""


class Killer(threading.Thread):
    """Kills one process in each phase of a run, and measures how soon anything new is there."""

    def __init__(self, victim: str, work: Path, sites: Path, num_rounds: int) -> None:
        super().__init__(daemon=True)
        self.victim, self.num_rounds, self.sites = victim, num_rounds, sites
        self.journal = CoordinatorJournal(work)
        self.rows: list[dict] = []
        self.is_over = threading.Event()
        self.phases = {
            "before round 1": lambda now: now.round == 1 and not now.updates and now.status,
            "a site trains": lambda now: not now.updates and self._is_training(now.round),
            "answers arrive": lambda now: len(now.updates) == 1 and not now.is_settled,
            "the coordinator folds": lambda now: now.is_settled,
            "between rounds": lambda now: not now.updates and now.round > 1,
            "the end": lambda now: now.status.get("phase") == "finish",
        }

    def run(self) -> None:
        for phase, is_there in self.phases.items():
            while not is_there(now := Now.of(self.journal)) or not self._kill():
                if self.is_over.wait(0.005):
                    return
            killed_s = time.monotonic()
            while Now.of(self.journal).progress == now.progress:
                if self.is_over.wait(0.005):
                    break
            row = {"process": self.victim, "phase": phase, "round": min(now.round, self.num_rounds)}
            row |= {"recovery_s": round(time.monotonic() - killed_s, 1)}
            self.rows.append(row)

    def _is_training(self, number: int) -> bool:
        try:
            progress = json.loads((self.sites / "north" / "progress.json").read_bytes())
        except (OSError, ValueError):
            return False
        return progress["round"] == number

    def _kill(self) -> bool:
        for process in find(VICTIMS[self.victim])[:1]:
            os.kill(process.pid, signal.SIGKILL)
            return True
        return False


@dataclass(frozen=True)
class Now:
    """How far a coordinator has come."""

    round: int
    """The round that runs."""
    updates: tuple[str, ...]
    """Updates of it that are there."""
    is_settled: bool
    """Whether it is settled whose updates make it."""
    status: dict

    @classmethod
    def of(cls, journal: CoordinatorJournal) -> Now:
        number = len(journal.records()) + 1
        folder = journal.round_folder(number)
        updates = tuple(sorted(path.name for path in folder.glob("updates/*.parcel")))
        try:
            status = journal.read_status()
        except ValueError:
            status = {}
        return cls(number, updates, (folder / "cohort.json").exists(), status)

    @property
    def progress(self) -> tuple:
        return self.round, self.updates, self.status.get("state") == "finished"


def find(words: str) -> list[psutil.Process]:
    """Processes below this one that have a word in their command line, by age."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


class FlowerWorld:
    """Two tiny sites, what they come to undisturbed, and the table of what was killed."""

    num_rounds = 4

    def __init__(self, folder: Path, tiny_model_directory: Path) -> None:
        self.folder = folder
        self.model = make_model(tiny_model_directory, folder / "model")
        self.data = {name: make_silo(folder / name, seed=len(name)) for name in SITES}
        settings = {"num_rounds": self.num_rounds, "error_feedback": True, "outer": Nesterov()}
        federated = FEDERATED.model_copy(update=settings)
        self.plan = write_start(self.model, folder / "start", federated, LORA, TRAIN, 0)
        self.expected = hashes(simulate(self.plan, self.sites("calm"), self.work("calm")))
        self.rows: list[dict] = []
        self.runs: dict[str, float] = {}

    def sites(self, go: str) -> list[Site]:
        folder = self.folder / go / "sites"
        return [make_site(folder, self.model, self.data[name], name) for name in SITES]

    def work(self, go: str) -> Path:
        shutil.copytree(self.folder / "start", self.folder / go / "work")
        return self.folder / go / "work"

    def play(self, victim: str | None) -> list[RoundRecord]:
        go = (victim or "undisturbed").replace(" ", "-")
        work, sites = self.work(go), self.sites(go)
        killer = Killer(victim, work, self.folder / go / "sites", self.num_rounds)
        started_s = time.monotonic()
        if victim:
            killer.start()
        try:
            records = run_federation(self.plan, sites, work)
        finally:
            killer.is_over.set()
            if victim:
                killer.join(10)
        self.runs[victim or "none"] = round(time.monotonic() - started_s, 1)
        is_same = hashes(records) == self.expected
        self.rows += [{**row, "same_hash": is_same} for row in killer.rows]
        assert is_same
        assert [process for words in VICTIMS.values() for process in find(words)] == []
        return records


def hashes(records: list[RoundRecord]) -> list[tuple[str, str]]:
    return [(record.global_sha256, record.replica_sha256) for record in records]


@pytest.fixture(scope="module")
def flower_world(tmp_path_factory, tiny_model_directory):
    """Where MUTIRAO_CRASH_MATRIX names a file, the table is written to it."""
    folder = tmp_path_factory.mktemp("flower")
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder / "slow"), prepend=os.pathsep)
        world = FlowerWorld(folder, tiny_model_directory)
        yield world
    if out := os.environ.get("MUTIRAO_CRASH_MATRIX"):
        table = {"num_sites": len(SITES), "num_rounds": world.num_rounds}
        table |= {"num_cpus": os.cpu_count(), "load": os.getloadavg(), "flush_s": 0.05}
        table |= {"run_s": world.runs, "kills": world.rows}
        Path(out).write_text(json.dumps(table, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [None, *VICTIMS])
def test_a_process_of_flower_killed_in_each_phase_changes_nothing(flower_world, victim):
    before = len(flower_world.rows)
    flower_world.play(victim)
    if victim is not None:
        told = [row["phase"] for row in flower_world.rows[before:]]
        assert told == list(Killer(victim, Path(), Path(), 0).phases)
