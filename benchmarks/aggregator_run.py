"""One run of one peer, in a network namespace of its own, with everything that is measured.

    unshare --net python benchmarks/aggregator_run.py TASK_FILE PYTHON_OF_NVFLARE

Prints one JSON object. The namespace's loopback carries this run's bytes and nobody else's:
those between the server's own processes too, which is why the tensors' bytes at the sites are
told beside them. Without rights to a namespace it runs as well, and that count is left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aggregator_flower
import psutil
from aggregator_memory import MemorySampler, tree_of
from aggregator_nvflare import SITE_WORKER
from aggregator_task import Task, count_parameters, read_answers
from inference.machine import CPUTimes

from mutirao.environment import child_environment
from mutirao.federated.flower.processes import end_with_parent

HERE = Path(__file__).parent
LIMIT_S = 540.0
RESTART_LIMIT_S = 90.0
"""How long a peer is given to go on after its server was killed, where it says nothing."""
NETWORK = Path("/proc/self/net/dev")


class Run:
    """The processes of one run."""

    def __init__(self, task: Task, nvflare: str) -> None:
        self.task = task
        self.folder = Path(task.folder)
        self.nvflare = nvflare
        self.server: subprocess.Popen[bytes] | None = None
        self.sites: subprocess.Popen[bytes] | None = None
        self.is_ours = task.peer == "mutirao"
        self.is_flower = task.peer == "flower"

    def measure(self) -> dict[str, Any]:
        """Run it, and return the record."""
        if self.is_ours:
            subprocess.run(self._python("aggregator_ours.py", "prepare"), check=True)
        busy, sent, begin_s = CPUTimes.now(), _loopback(), time.monotonic()
        own = _Own()
        record: dict[str, Any] = {}
        with MemorySampler(self.server_processes) as sampler:
            try:
                self.start_server()
                if self.is_ours or self.is_flower:
                    self.sites = self._start(self._python("aggregator_sites.py"), "sites.log")
                if self.task.disturbed:
                    record["recovery"] = self.disturb()
                else:
                    self.wait(self.has_finished, LIMIT_S)
                record["outcome"] = "finished" if self.has_finished() else "not finished"
                wall_s = time.monotonic() - begin_s
                record["sha256"] = self.result_hash()
            finally:
                own.look([os.getpid()])
                self.end()
        answers = read_answers(self.folder)
        after = CPUTimes.now()
        return record | {
            "wall_s": round(wall_s, 2),
            "training_s": _span(answers),
            "peak_bytes": sampler.peak_bytes,
            "peak_anonymous_bytes": sampler.peak_anonymous_bytes,
            "peak_parts": sampler.peak_parts,
            "memory_measure": sampler.measure,
            "num_samples": sampler.num_samples,
            "down_bytes": sum(int(each["down"]) for each in answers),
            "up_bytes": sum(int(each["up"]) for each in answers),
            "num_answers": len(answers),
            "loopback_bytes": None if sent is None else (_loopback() or 0) - sent,
            "busy_cores": round((after.busy_s - busy.busy_s) / wall_s, 2),
            "own_cores": round(own.seconds / wall_s, 2),
        }

    # --- the server -------------------------------------------------------------------------

    def start_server(self) -> None:
        """Start it, or start it again."""
        task = self.task
        if self.is_ours:
            self.server = self._start(self._python("aggregator_ours.py", "serve"), "server.log")
        elif self.is_flower:
            command = aggregator_flower.link_command(task, Path(sys.executable).parent)
            self.server = self._start(command, "server.log")
        else:
            command = [self.nvflare, str(HERE / "aggregator_nvflare.py"), self._task_path]
            self.server = self._start(command, "server.log")
        if self.is_flower and not (self.folder / "submitted").exists():
            aggregator_flower.submit(task)
            (self.folder / "submitted").touch()

    def server_processes(self) -> list[psutil.Process]:
        """Return the processes whose memory counts."""
        if self.server is None:
            return []
        found = tree_of([self.server.pid], leave_out=SITE_WORKER)
        if self.is_ours or self.is_flower:
            return found
        return [each for each in found if each.pid != self.server.pid]  # it submits the job

    def has_finished(self) -> bool:
        """Whether all rounds are done."""
        if self.is_flower:
            return (self.folder / "result.json").exists()
        assert self.server is not None
        return self.server.poll() == 0

    def result_hash(self) -> str | None:
        """Return the hash of the last state, where the peer says one."""
        with suppress(OSError, ValueError, KeyError, IndexError):
            if self.is_flower:
                return str(json.loads((self.folder / "result.json").read_bytes())["sha256"])
            rows = json.loads((self.folder / "coordinator" / "rounds.json").read_bytes())
            if len(rows) == self.task.num_rounds:
                return str(rows[-1]["global_sha256"])
        return None

    def disturb(self) -> dict[str, Any]:
        """Kill all server processes in the middle of round 2, start them again, and watch."""
        self.wait(lambda: self._answers_of(2) >= max(2, self.task.num_sites // 2), LIMIT_S)
        answers, killed_s = self._answers_of(2), time.monotonic()
        assert self.server is not None
        for process in tree_of([self.server.pid]):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        self.server.wait()
        before = len(read_answers(self.folder))
        self.start_server()
        self.wait(self.has_finished, LIMIT_S if self.is_ours else RESTART_LIMIT_S)
        told = {
            "answers_of_round_2_before": answers,
            "has_finished": self.has_finished(),
            "seconds_to_end": round(time.monotonic() - killed_s, 2),
            "answers_after_restart": [
                int(each["round"]) for each in read_answers(self.folder)[before:]
            ],
        }
        if self.is_flower:
            told["flower_says"] = aggregator_flower.status(self.task)
        return told

    def _answers_of(self, number: int) -> int:
        return sum(each["round"] == number for each in read_answers(self.folder))

    # --- processes --------------------------------------------------------------------------

    def wait(self, is_done: Callable[[], bool], limit_s: float) -> None:
        """Wait, at most so long, for something or for the server's end."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not is_done():
            if self.server is not None and self.server.poll() not in (None, 0):
                return
            time.sleep(0.1)

    def end(self) -> None:
        """End all processes of this run."""
        for process in (self.server, self.sites):
            if process is not None:
                for each in tree_of([process.pid]):
                    with suppress(psutil.Error):
                        each.kill()
                process.wait()

    @property
    def _task_path(self) -> str:
        return str(self.folder / "task.json")

    def _python(self, script: str, *more: str) -> list[str]:
        return [sys.executable, str(HERE / script), *more, self._task_path]

    def _start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        environment = child_environment(
            FLWR_HOME=str(self.folder / "flower"),
            MUTIRAO_BENCH_TASK=self._task_path,
            PYTHONPATH=str(HERE),
            PATH=f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            NO_PROXY="127.0.0.1,localhost",
            no_proxy="127.0.0.1,localhost",
        )
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                command,
                env=environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                preexec_fn=end_with_parent,
            )


class _Own:
    """Processor time of all processes of a run, as far as they still live when looked at."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def look(self, pids: list[int]) -> None:
        for process in tree_of(pids):
            with suppress(psutil.Error):
                times = process.cpu_times()
                self.seconds += times.user + times.system
                self.seconds += times.children_user + times.children_system


def _span(answers: list[dict[str, float]]) -> float | None:
    """Return the time from the first answer to the last, in seconds."""
    times = [each["time"] for each in answers]
    return round(max(times) - min(times), 2) if times else None


def _loopback() -> int | None:
    """Return the bytes that went over this namespace's loopback; None where it is shared."""
    if os.environ.get("MUTIRAO_BENCH_NAMESPACE") != "1":
        return None
    lines = [line.split() for line in NETWORK.read_text().splitlines()]
    return next(int(words[1]) for words in lines if words[0] == "lo:")


def main(path: str, nvflare: str) -> int:
    if os.environ.get("MUTIRAO_BENCH_NAMESPACE") == "1":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it has started
    task = Task.read(path)
    record = Run(task, nvflare).measure()
    print(json.dumps(record | {"num_parameters": count_parameters(task.size)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
