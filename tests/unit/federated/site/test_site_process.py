"""A worker's process: it answers, is started again when it dies, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_sites import RUN

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Site
from mutirao.federated.site.process import MAX_DEATHS, WorkerProcess

HELLO = Parcel("hello", RUN, 0, COORDINATOR)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = WorkerProcess(Site(name="north", model=tmp_path, data=tmp_path, work=tmp_path / "work"))
    yield made
    made.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_answers_and_is_started_again_after_a_death(worker):
    first = Parcel.from_bytes(worker.answer(HELLO.to_bytes()))
    assert (first.kind, first.sender) == ("hello", "north")
    pid = worker._process.pid
    os.kill(pid, signal.SIGKILL)
    again = Parcel.from_bytes(worker.answer(HELLO.to_bytes()))
    assert again.sha256 == first.sha256
    assert worker._process.pid != pid
    with pytest.raises(UpdateError, match="no parcel"):
        worker.answer(b"nonsense")
    assert worker.answer(HELLO.to_bytes()) == again.to_bytes()
    worker.close()
    assert not is_alive(pid)


def test_it_gives_up_after_three_deaths(worker, monkeypatch, tmp_path):
    dying = tmp_path / "dying"
    dying.write_text("#!/bin/sh\necho x >> started\nexit 7\n")
    dying.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(FederationError, match=r"died 3 times over one request .*exit code 7"):
        worker.answer(HELLO.to_bytes())
    assert (tmp_path / "started").read_text().count("x") == MAX_DEATHS


def test_progress_is_read_from_the_site_s_folder(worker):
    assert worker.progress() == {}
    worker.site.work.mkdir()
    (worker.site.work / "progress.json").write_text('{"round": 2, "num_tokens": 5}')
    assert worker.progress() == {"round": 2, "num_tokens": 5}


PARENT = """
import sys, time
from pathlib import Path
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Site
from mutirao.federated.site.process import WorkerProcess
folder = Path(sys.argv[1])
assert "torch" not in sys.modules
worker = WorkerProcess(Site(name="north", model=folder, data=folder, work=folder / "work"))
worker.answer(Parcel("hello", "ab" * 32, 0, COORDINATOR).to_bytes())
assert "torch" not in sys.modules
print(worker._process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_when_its_parent_is_killed(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    for _ in range(100):
        if not is_alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")
