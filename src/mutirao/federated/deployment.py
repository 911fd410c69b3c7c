"""Flower's real deployment engine on one machine: a SuperLink and a SuperNode per site.

Each is a process of its own on loopback, with its own log; Flower starts the ServerApp
and ClientApp processes. Whatever happens here, none of them outlives this call. TLS and
node keys, which a federation over a network needs, are not here yet.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mutirao.artifact import write_atomic
from mutirao.config import toml_value
from mutirao.environment import child_environment
from mutirao.errors import FederationError, PortInUseError
from mutirao.federated.journal import CoordinatorJournal, RoundRecord, SiteJournal
from mutirao.federated.plan import Coordinator, Plan, Site

LOOPBACK = "127.0.0.1"
WATCH_S = 0.5
CONNECTION = "mutirao"
GRACE_S = 10.0

_APP_FILE = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mutirao-federation"
version = "1.0.0"
description = "Names the apps that are installed at every site; carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "mutirao"

[tool.flwr.app.components]
serverapp = "mutirao.federated.server_app:app"
clientapp = "mutirao.federated.client_app:app"

[tool.flwr.app.config]
coordinator-file = ""
"""


@dataclass
class FlowerProcess:
    """One long-lived process of Flower, and what to call it in messages."""

    label: str
    process: subprocess.Popen[bytes]
    log_path: Path


def run_federation(
    plan: Plan,
    sites: Sequence[Site],
    work: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[RoundRecord]:
    """Train together on loopback, from the last finished round on.

    Args:
        plan: what is agreed; ``adapter.write_start`` made it.
        sites: each site's own file; a site's process gets no other site's.
        work: the coordinator's folder, with the start and the journal.
        on_progress: called now and then with (tokens trained, tokens in all).

    Returns:
        The records of all rounds.

    Raises:
        PortInUseError: the port that was asked for is taken.
        FederationError: a process was lost or a site failed; finished rounds are kept.
    """
    journal = CoordinatorJournal(work)
    if len(journal.records()) >= plan.federated.num_rounds:
        return journal.records()
    port = _claim_port(plan.federated.port)
    journal.status_path.unlink(missing_ok=True)
    coordinator = Coordinator(
        plan=plan, sites=tuple(sorted(site.name for site in sites)), work=work
    )
    environment = _flower_environment(work)
    with _flower_processes(sites, work, port, environment) as processes:
        _submit(coordinator, work, port, environment)
        _watch(journal, processes, plan, sites, on_progress)
    return journal.records()


def _claim_port(port: int) -> int:
    """Return the port if it is free, or a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise PortInUseError(
                f"port {port} is taken by another process; set federated.port to a free "
                "one, or to 0 for any"
            ) from None
        return int(probe.getsockname()[1])


def _flower_environment(work: Path) -> dict[str, str]:
    home = work / "flower"
    home.mkdir(parents=True, exist_ok=True)
    scripts = str(Path(sys.executable).parent)
    return child_environment(
        FLWR_HOME=str(home),
        PATH=f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        # Seconds; each question costs processor time that training on the same machine needs.
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5",
        # Loopback must not go through a proxy that is meant for the network.
        NO_PROXY=f"{LOOPBACK},localhost",
        no_proxy=f"{LOOPBACK},localhost",
    )


@contextmanager
def _flower_processes(
    sites: Sequence[Site], work: Path, port: int, environment: dict[str, str]
) -> Iterator[list[FlowerProcess]]:
    processes: list[FlowerProcess] = []
    try:
        link = [
            "--host",
            LOOPBACK,
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
        processes.append(_start("SuperLink", "flower-superlink", link, work, environment))
        _wait_for_port(processes[0], port)
        for site in sites:
            site_path = work / "sites" / f"{site.name}.json"
            write_atomic(site_path, site.model_dump_json(indent=1))
            node_path = work / "sites" / f"{site.name}.toml"
            write_atomic(node_path, f"site-file = {toml_value(str(site_path))}\n")
            node = ["--superlink", f"{LOOPBACK}:{port}", "--port", str(_claim_port(0))]
            node += ["--node-config", str(node_path)]
            label = f"SuperNode of site {site.name}"
            processes.append(_start(label, "flower-supernode", node, work, environment))
        yield processes
    finally:
        _stop(processes)


def _start(
    label: str, command: str, arguments: list[str], work: Path, environment: dict[str, str]
) -> FlowerProcess:
    log_path = work / "logs" / f"{label.replace(' ', '-')}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    executable = Path(sys.executable).parent / command
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [str(executable), "--insecure", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return FlowerProcess(label, process, log_path)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when its parent is killed (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def _wait_for_port(link: FlowerProcess, port: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if link.process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise FederationError(f"the SuperLink did not start on port {port}; see {link.log_path}")


def _submit(coordinator: Coordinator, work: Path, port: int, environment: dict[str, str]) -> None:
    coordinator_path = work / "coordinator.json"
    write_atomic(coordinator_path, coordinator.model_dump_json(indent=1))
    run_path = work / "run.toml"
    write_atomic(run_path, f"coordinator-file = {toml_value(str(coordinator_path))}\n")
    app = work / "app"
    write_atomic(app / "pyproject.toml", _APP_FILE)
    write_atomic(
        Path(environment["FLWR_HOME"]) / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{LOOPBACK}:{port}"\ninsecure = true\n',
    )
    command = Path(sys.executable).parent / "flwr"
    result = subprocess.run(
        [str(command), "run", str(app), CONNECTION, "-c", str(run_path), "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if result.returncode != 0 or '"success": true' not in result.stdout:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise FederationError(f"Flower did not accept the run: {said[-1] if said else 'no word'}")


def _watch(
    journal: CoordinatorJournal,
    processes: Sequence[FlowerProcess],
    plan: Plan,
    sites: Sequence[Site],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Wait for the coordinator's word, while every process must stay alive."""
    deadline = time.monotonic() + plan.federated.connect_timeout_s
    while True:
        status = journal.read_status()
        if status.get("state") == "finished":
            return
        if status.get("state") == "failed":
            raise FederationError(str(status["message"]))
        for each in processes:
            if (code := each.process.poll()) is not None:
                raise FederationError(
                    f"the {each.label} ended unexpectedly ({_describe_exit(code)}); finished "
                    f"rounds are kept: run the same command again, or see {each.log_path}"
                )
        has_started = "pid" in status
        if not (_is_alive(status["pid"]) if has_started else time.monotonic() < deadline):
            how = "ended unexpectedly" if has_started else "did not start"
            raise FederationError(
                f"the coordinator's ServerApp {how}; finished rounds are kept: run the same "
                f"command again, or see {processes[0].log_path}"
            )
        if on_progress is not None:
            on_progress(*_count_tokens(journal, plan, sites))
        time.sleep(WATCH_S)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for by its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _describe_exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _count_tokens(
    journal: CoordinatorJournal, plan: Plan, sites: Sequence[Site]
) -> tuple[int, int]:
    federated = plan.federated
    total = federated.num_rounds * federated.tokens_per_round * len(sites)
    finished = len(journal.records())
    done = finished * federated.tokens_per_round * len(sites)
    for site in sites:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
            progress = json.loads(SiteJournal(site.work).progress_path.read_bytes())
            if progress["round"] == finished + 1:
                done += min(progress["num_tokens"], federated.tokens_per_round)
    return done, total


def _stop(processes: Sequence[FlowerProcess]) -> None:
    """End all processes, sites first; children of theirs go with their sessions."""
    for each in reversed(processes):
        _signal_session(each, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for each in reversed(processes):
        with suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, deadline - time.monotonic()))
        _signal_session(each, signal.SIGKILL)
        each.process.wait()


def _signal_session(each: FlowerProcess, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(each.process.pid, number)
