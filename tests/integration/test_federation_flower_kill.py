"""kill -9 of any process of a federation over Flower: training goes on to the same state."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from tiny_sites import FEDERATED, LORA, TRAIN, make_model, make_silo, make_site

from mutirao.errors import FederationError
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.flower import deployment
from mutirao.federated.flower.deployment import run_federation
from mutirao.federated.simulation import simulate

NAMES = ("north", "south")


class Federation:
    """Two tiny sites, what they come to without any fault, and a folder for another go."""

    def __init__(self, folder: Path, tiny_model_directory: Path) -> None:
        self.folder = folder
        self.model = make_model(tiny_model_directory, folder / "model")
        self.data = {name: make_silo(folder / name, seed=len(name)) for name in NAMES}
        federated = FEDERATED.model_copy(update={"tokens_per_round": 400})
        self.plan = write_start(self.model, folder / "start", federated, LORA, TRAIN, 0)
        records = simulate(self.plan, self.sites("calm"), self.work("calm"))
        self.expected = [record.global_sha256 for record in records]

    def sites(self, go: str):
        folder = self.folder / go / "sites"
        return [make_site(folder, self.model, self.data[name], name) for name in NAMES]

    def work(self, go: str) -> Path:
        work = self.folder / go / "work"
        shutil.copytree(self.folder / "start", work)
        return work


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_model_directory):
    return Federation(tmp_path_factory.mktemp("kill"), tiny_model_directory)


def find(words: str, work: Path) -> list[psutil.Process]:
    """Processes below this one that have a word in their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


VICTIMS = {
    "SuperLink": "flower.superlink",
    "SuperExec": "flower-superexec",
    "ServerApp": "flwr-serverapp",
    "agent": "flower.site_agent",
    "worker": "site.process",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", sorted(VICTIMS))
def test_a_killed_process_changes_nothing(federation, victim):
    work, killed = federation.work(victim), []

    def kill(done: int, total: int) -> None:
        journal = CoordinatorJournal(work)
        if not killed and len(journal.records()) >= 1:
            found = find(VICTIMS[victim], work)
            for process in found[:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    records = run_federation(federation.plan, federation.sites(victim), work, on_progress=kill)
    assert killed, "nothing was killed"
    assert [record.global_sha256 for record in records] == federation.expected
    assert [process for words in VICTIMS.values() for process in find(words, work)] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_killed_again_and_again_is_given_up(federation, monkeypatch):
    monkeypatch.setattr(deployment, "MAX_RESTARTS", 2)
    work = federation.work("again")

    def kill(done: int, total: int) -> None:
        for process in find(VICTIMS["agent"], work):
            if time.time() - process.create_time() > 0.5:
                os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(FederationError, match="after 2 restarts without progress"):
        run_federation(federation.plan, federation.sites("again"), work, on_progress=kill)
    assert [process for words in VICTIMS.values() for process in find(words, work)] == []
