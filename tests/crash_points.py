"""A small federation in processes that are killed at their writes, for tests.

``python crash_points.py WORLD OUT [SAMPLE]`` loads the tiny model once and then plays the
federation: twice undisturbed, once for each point, and now and then with three points. It forks
a coordinator and one worker for each site, carries parcels between them, and starts again whoever
died. A point is a process, the number of one of its writes to disk, and whether it dies just
before or just after it, by SIGKILL. Points are all of the coordinator and of one site, or a
sample of so many.

A write is a call that changes what a later process finds: a rename, an fsync, a removal, a
cut. What a kill leaves is what the kernel was told before; a loss of power is not played.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from mutirao.federated.coordinator import collect
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.rounds import run_rounds
from mutirao.federated.identity import PUBLIC_NAME, parse_public_key
from mutirao.federated.network import Lost
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator, FederatedConfig, SecureConfig, Site
from mutirao.federated.simulation import introduce, open_coordinator

COORDINATOR = "coordinator"
VICTIM = "north"
"""The site that dies."""
WRITES = ("replace", "rename", "fsync", "unlink", "ftruncate")
RETRY_S = 0.02
LONGEST_S = 90.0
"""One play; a hundred times what it takes."""
MAX_LIVES = 4
RANDOM = re.compile(r"\.[0-9a-f]{8}$")


@dataclass(frozen=True)
class Point:
    """Where one process dies, once."""

    role: str
    """``COORDINATOR``, or a site's name."""
    number: int
    """Which of its writes, from 1."""
    is_after: bool
    """Whether the write is still done."""


@dataclass
class Outcome:
    """What a play came to."""

    points: tuple[Point, ...]
    """Where processes were to die."""
    num_killed: int = 0
    rounds: list = field(default_factory=list)
    """For each round what must not depend on crashes."""
    faults: list[str] = field(default_factory=list)
    """What is wrong whatever the rounds are."""
    writes: dict[str, list[str]] = field(default_factory=dict)
    """What each process wrote, in order; of the processes that lived to the end."""


# --- the world --------------------------------------------------------------------------------


def make_world(folder: Path, tiny_model_directory: Path, *, is_secure: bool) -> Path:
    """Write model, silos, keys and start of a federation of two rounds."""
    from tiny_sites import TRAIN, make_model, make_silo, make_site

    from mutirao.federated.aggregation.outer import Nesterov
    from mutirao.tune.config import LoRAConfig

    names = ("east", "north", "south") if is_secure else ("north", "south")
    model = make_model(tiny_model_directory, folder / "model")
    sites = [
        make_site(
            folder / "sites", model, make_silo(folder / "data" / name, seed=seed, num=6), name
        )
        for seed, name in enumerate(names)
    ]
    settings = {"num_rounds": 2, "tokens_per_round": 120, "monitor_tokens": 20}
    settings |= {"outer": Nesterov(), "round_timeout_s": 60.0, "connect_timeout_s": 30.0}
    if is_secure:
        settings |= {"secure": SecureConfig(), "weighting": "equal"}
    else:
        settings |= {"error_feedback": True}
    lora = LoRAConfig(rank=8, alpha=16, target_modules=("q_proj", "down_proj"))
    start = folder / "start"
    plan = write_start(model, start, FederatedConfig(**settings), lora, TRAIN, 0)
    coordinator = open_coordinator(plan, sites, start)
    for site in sites:
        (folder / f"{site.name}.site.json").write_text(
            introduce(site, coordinator).model_dump_json()
        )
    return folder


class World:
    """A world as it is played: folders of its own, models that are loaded already."""

    def __init__(self, folder: Path) -> None:
        from mutirao.federated.site.models import ModelCache

        self.folder = folder
        self.coordinator = load(Coordinator, folder / "start" / "coordinator.json")
        self.sites = [load(Site, path) for path in sorted(folder.glob("*.site.json"))]
        self.cache = ModelCache()
        plan = self.coordinator.plan
        for site in self.sites:
            silo = self.cache.silo(site, plan, self.cache.model(site, plan))
            assert silo.text  # encoded before the first fork
            assert silo.heldout
            assert silo.outcomes == []

    def open(self, folder: Path) -> tuple[Coordinator, list[Site]]:
        """Make the folders of one play."""
        shutil.copytree(self.folder / "start", folder / COORDINATOR)
        for site in self.sites:
            shutil.copytree(site.work / "identity", folder / site.name / "identity")
        coordinator = self.coordinator.model_copy(update={"work": folder / COORDINATOR})
        sites = [site.model_copy(update={"work": folder / site.name}) for site in self.sites]
        return coordinator, sites


def load(kind, path: Path):
    return kind.model_validate_json(path.read_bytes())


# --- what dies --------------------------------------------------------------------------------


class Writes:
    """Counts this process's writes, and ends it at one of them."""

    def __init__(self, point: Point | None, folder: Path) -> None:
        self.point, self.folder = point, folder
        self.names: list[str] = []
        for name in WRITES:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call):
        def counted(what, *more, **options):
            path = more[0] if name in ("replace", "rename") else what
            self.names.append(f"{name} {describe(path, self.folder)}")
            is_here = self.point is not None and len(self.names) == self.point.number
            if is_here and not self.point.is_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if name != "fsync":  # a kill loses nothing that the kernel has
                call(what, *more, **options)
            if is_here:
                os.kill(os.getpid(), signal.SIGKILL)

        return counted


def describe(path, folder: Path) -> str:
    """Return where a file lies in its process's folder, without what is random in its name."""
    place = Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
    place = place.relative_to(folder) if place.is_relative_to(folder) else Path(place.name)
    if not (name := place.name):
        return "the folder"
    if name.startswith(".") and name.endswith(".partial"):
        name = name[1:].removesuffix(".partial")
        name = name.rpartition(".")[0] if RANDOM.search(name) else name
    return str(place.with_name("update.parcel" if name.startswith("update-") else name))


def be_site(site: Site, world: World, pipe: Connection, point: Point | None) -> None:
    from mutirao.federated.site import journal
    from mutirao.federated.site.worker import SiteWorker

    journal.PROGRESS_INTERVAL_S = 0.0  # so that the same writes come in every play
    writes = Writes(point, site.work)
    worker = SiteWorker(site, public_models=world.cache)
    while request := pipe.recv_bytes():
        pipe.send_bytes(worker.answer(Parcel.from_bytes(request)).to_bytes())
    pipe.send_bytes(json.dumps(writes.names).encode())


class HubNetwork:
    """The coordinator's side of the pipes."""

    def __init__(self, pipe: Connection, sites: set[str]) -> None:
        self._pipe, self._sites = pipe, sites

    def reachable(self) -> set[str]:
        return set(self._sites)

    def send(self, site: str, request: Parcel) -> None:
        self._pipe.send((site, request.to_bytes()))

    def receive(self, timeout_s: float) -> Parcel | Lost | None:
        if not self._pipe.poll(max(0.0, timeout_s)):
            return None
        site, answer = self._pipe.recv()
        return Lost(site, "it died") if answer is None else Parcel.from_bytes(answer)


def be_coordinator(coordinator: Coordinator, pipe: Connection, point: Point | None) -> None:
    collect.RETRY_S = RETRY_S
    collect.POLL_S = RETRY_S
    writes = Writes(point, coordinator.work)
    run_rounds(coordinator, HubNetwork(pipe, set(coordinator.sites)))
    pipe.send((None, json.dumps(writes.names).encode()))


# --- the hub ----------------------------------------------------------------------------------


@dataclass
class Process:
    """One process and the hub's end of its pipe."""

    pid: int
    pipe: Connection
    asked: deque = field(default_factory=deque)
    """(life of the coordinator, hash of the request) of what it has not answered."""


class Play:
    """One federation from its start to its end, with some deaths; a role's second in its
    second life."""

    def __init__(self, world: World, folder: Path, points: tuple[Point, ...]) -> None:
        self.world, self.folder = world, folder
        self.coordinator, self.sites = world.open(folder)
        self.outcome = Outcome(points)
        self.lives = dict.fromkeys([COORDINATOR, *(site.name for site in self.sites)], 0)
        self.processes: dict[str, Process] = {}
        self.said: dict[tuple, bytes] = {}

    def run(self) -> Outcome:
        deadline = time.monotonic() + LONGEST_S
        try:
            for role in self.lives:
                self.start(role)
            while COORDINATOR in self.processes:
                if time.monotonic() > deadline:
                    raise RuntimeError("it does not end")
                pipes = {process.pipe: role for role, process in self.processes.items()}
                for pipe in wait(list(pipes), 1.0):
                    if self.processes.get(pipes[pipe], None) is not None:
                        self.hear(pipes[pipe])
            self.end_sites()
            self.check()
        except Exception:
            self.outcome.faults.append(traceback.format_exc()[-2000:])
        finally:
            for process in self.processes.values():
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
                process.pipe.close()
        return self.outcome

    def start(self, role: str) -> None:
        self.lives[role] += 1
        if self.lives[role] > MAX_LIVES:
            raise RuntimeError(f"{role} died {MAX_LIVES} times")
        points = [point for point in self.outcome.points if point.role == role]
        its_point = points[self.lives[role] - 1] if self.lives[role] <= len(points) else None
        ours, theirs = Pipe()
        pid = os.fork()
        if pid:
            theirs.close()
            self.processes[role] = Process(pid, ours)
            return
        code = 1
        try:
            for pipe in (ours, *(other.pipe for other in self.processes.values())):
                pipe.close()
            if role == COORDINATOR:
                be_coordinator(self.coordinator, theirs, its_point)
            else:
                site = next(site for site in self.sites if site.name == role)
                be_site(site, self.world, theirs, its_point)
            code = 0
        except BaseException:
            (self.folder / f"{role}.died").write_text(traceback.format_exc())
        finally:
            os._exit(code)

    def hear(self, role: str) -> None:
        """Take one message of a process, or its death."""
        process = self.processes[role]
        try:
            if role == COORDINATOR:
                self.pass_on(*process.pipe.recv())
            else:
                self.answer(role, process, process.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            self.bury(role)

    def pass_on(self, site: str | None, request: bytes) -> None:
        if site is None:
            self.outcome.writes[COORDINATOR] = json.loads(request)
            process = self.processes.pop(COORDINATOR)
            os.waitpid(process.pid, 0)
            process.pipe.close()
            return
        asked = (self.lives[COORDINATOR], Parcel.from_bytes(request).sha256)
        try:
            self.processes[site].asked.append(asked)
            self.processes[site].pipe.send_bytes(request)
        except ConnectionError:
            pass  # its death is heard next

    def answer(self, site: str, process: Process, answer: bytes) -> None:
        life, request_sha256 = process.asked.popleft()
        parcel = Parcel.from_bytes(answer)
        self.compare(site, request_sha256, parcel, answer)
        if life == self.lives[COORDINATOR] and COORDINATOR in self.processes:
            self.tell(site, answer)

    def tell(self, site: str, answer: bytes | None) -> None:
        with suppress(ConnectionError):
            self.processes[COORDINATOR].pipe.send((site, answer))

    def compare(self, site: str, request_sha256: str, parcel: Parcel, answer: bytes) -> None:
        """What left once must leave alike again; under masks, whatever the question was."""
        if parcel.kind == "refusal":
            self.outcome.faults.append(f"{site} refused: {parcel.fields['sentence']}")
        keys = {(site, request_sha256): answer}
        for name, payload in parcel.payloads.items():
            if name == "advert" or name.startswith("chunk/"):
                keys[site, parcel.round, name] = payload.tobytes()
        for key, content in keys.items():
            if parcel.kind != "refusal" and self.said.setdefault(key, content) != content:
                self.outcome.faults.append(f"two different answers to {key}")

    def bury(self, role: str) -> None:
        process = self.processes.pop(role)
        _, status = os.waitpid(process.pid, 0)
        process.pipe.close()
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not is_killed:
            died = self.folder / f"{role}.died"
            raise RuntimeError(f"{role} ended with {status}: {died.read_text()[-1500:]}")
        self.outcome.num_killed += 1
        self.start(role)
        is_lost = any(life == self.lives[COORDINATOR] for life, _ in process.asked)
        if is_lost and COORDINATOR in self.processes:
            self.tell(role, None)

    def end_sites(self) -> None:
        for site in self.sites:
            process = self.processes[site.name]
            process.pipe.send_bytes(b"")
            while process.asked:  # what a coordinator that died had asked
                process.pipe.recv_bytes()
                process.asked.popleft()
            self.outcome.writes[site.name] = json.loads(process.pipe.recv_bytes())
            os.waitpid(process.pid, 0)
            process.pipe.close()
            del self.processes[site.name]

    def check(self) -> None:
        """Read what the play left on disk."""
        from mutirao.federated.audit.check import verify_log
        from mutirao.federated.site.journal import SiteJournal

        journal = CoordinatorJournal(self.coordinator.work)
        records = journal.records()
        self.outcome.rounds = [
            {
                "global": record.global_sha256,
                "replica": record.replica_sha256,
                "sites": {
                    name: [each.num_tokens, each.num_steps, each.train_loss, each.heldout_loss]
                    for name, each in sorted(record.sites.items())
                },
            }
            for record in records
        ]
        for row in journal.refusals():
            self.outcome.faults.append(f"the coordinator refused: {row}")
        for site in self.sites:
            held = SiteJournal(site.work).run(self.coordinator.run_id).read_replica()
            if held is None or held[0] != records[-1].replica_sha256:
                self.outcome.faults.append(f"{site.name} does not hold the final state")
            key = parse_public_key(str(site.work / "identity" / PUBLIC_NAME))
            fault = verify_log(site.work / "audit.jsonl", key).fault
            if fault is not None:
                self.outcome.faults.append(f"audit log of {site.name}: {fault}")
        left = [path for path in self.folder.rglob("*.partial*") if path.is_file()]
        if left and not self.outcome.points:
            self.outcome.faults.append(f"left behind: {left}")


def all_points(writes: dict[str, list[str]]) -> list[Point]:
    """All points of the coordinator and of one site; the other sites are like it.

    A flush changes nothing for who is only killed: before one that a rename follows is the same
    as before the rename, and after one the same as before whatever comes next.
    """
    points = []
    for role in (COORDINATOR, VICTIM):
        follows = [*writes[role][1:], ""]
        for number, (write, after) in enumerate(zip(writes[role], follows, strict=True), 1):
            kind, _, name = write.partition(" ")
            if kind != "fsync":
                points += [Point(role, number, False), Point(role, number, True)]
            elif after != f"replace {name}":
                points.append(Point(role, number, False))
    return points


def main(world_folder: str, out: str, sample: str | None = None) -> None:
    """Play undisturbed, then each point, and write what they came to."""
    import torch

    torch.set_num_threads(1)
    world = World(Path(world_folder))
    gc.collect()
    gc.freeze()  # what a child does not touch is not copied
    gc.disable()
    outcomes: list[Outcome] = []

    def play(*points: Point) -> None:
        folder = Path(world_folder) / "plays" / f"{len(outcomes):05d}"
        outcomes.append(Play(world, folder, points).run())
        if not outcomes[-1].faults:
            shutil.rmtree(folder)

    play()
    play()
    if not outcomes[0].faults:
        points, generator = all_points(outcomes[0].writes), random.Random(0)
        some = points if sample is None else generator.sample(points, int(sample))
        for point in some:
            play(point)
        for _ in range(len(some) // 4):
            play(*generator.sample(points, 3))
    Path(out).write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
