"""A federation over Flower: the coordinator's processes, and for trials the sites' as well.

The coordinator has a SuperLink, which keeps messages in a database file and not in its memory,
and a SuperExec, which starts our ServerApp; ``superlink`` shuts what is not for sites. Of each
process a kill is survived: it is started again, and where Flower cannot go on (its runs do not
outlive SuperLink or ServerApp) a new run is submitted, which goes on from the coordinator's
journal. That is given up after several restarts without progress.

The database holds what is on its way and nothing else; each SuperLink begins with an empty one.
None of the processes outlives the call that started them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mutirao.artifact import write_atomic
from mutirao.environment import child_environment
from mutirao.errors import FederationError, PortInUseError
from mutirao.federated.coordinator.journal import (
    COORDINATOR_NAME,
    CoordinatorJournal,
    RoundRecord,
    keep_coordinator,
)
from mutirao.federated.flower.certificates import Certificates
from mutirao.federated.flower.connection import (
    COORDINATOR_VARIABLE,
    SECRET_VARIABLE,
    Connection,
)
from mutirao.federated.flower.processes import (
    Child,
    describe_exit,
    end_with_parent,
    is_alive,
    stop,
)
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.plan import Coordinator, Plan, Site
from mutirao.federated.simulation import introduce
from mutirao.federated.site.journal import SiteJournal

if TYPE_CHECKING:
    from mutirao.federated.flower.control import Control

__all__ = ["Federation", "end_with_parent", "run_federation", "serve_coordinator"]

LOOPBACK = "127.0.0.1"
ANYWHERE = "0.0.0.0"
WATCH_S = 0.3
MAX_RESTARTS = 6
"""Restarts without anything new in the journal before a federation gives up; an assumption:
who kills more processes than that between two answers wants it to end."""
START_S = 120.0
KILLED_S = 1.0
"""So long after its connections broke a killed process may still seem to run."""
APP_START_S = 180.0
"""Longest time from a submitted run to its ServerApp's first word; it imports Flower and us."""


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
        FederationError: a site failed, or a process again and again; finished rounds are kept.
    """
    journal = CoordinatorJournal(work)
    if len(journal.records()) >= plan.federated.num_rounds:
        return journal.records()
    keys = {site.name: public_hex(open_identity(site.work / "identity")) for site in sites}
    coordinator = keep_coordinator(plan, keys, work)
    port = claim_port(plan.federated.port, LOOPBACK)
    federation = Federation(coordinator, LOOPBACK, port)
    for site in sites:
        connection = Connection(address=f"{LOOPBACK}:{port}")
        federation.add_site(introduce(site, coordinator), connection)

    def watch() -> None:
        if on_progress is not None:
            on_progress(*_count_tokens(journal, plan, sites))

    return federation.run(watch)


def serve_coordinator(
    coordinator: Coordinator,
    *,
    port: int,
    host: str = ANYWHERE,
    certificates: Certificates | None = None,
    node_keys: Sequence[bytes] = (),
    on_watch: Callable[[], None] | None = None,
) -> list[RoundRecord]:
    """Serve sites that connect from elsewhere until all rounds are done.

    Args:
        coordinator: plan, sites, folder.
        port: of the SuperLink; 0 takes a free one.
        host: address to listen on.
        certificates: for TLS; None only on loopback.
        node_keys: public keys of the nodes that may connect, in PEM; with TLS only. Without
            any, whoever reaches the port may connect, and is asked for a site's signature.
        on_watch: called now and then, to show progress.

    Returns:
        The records of all rounds.

    Raises:
        PortInUseError: the port is taken.
        FederationError: a deadline passed, or a process ended again and again.
    """
    if certificates is None and host != LOOPBACK:
        raise FederationError(
            f"a coordinator on {host} needs certificates; `mutirao federate keys --coordinator` "
            "makes them"
        )
    journal = CoordinatorJournal(coordinator.work)
    if len(journal.records()) >= coordinator.plan.federated.num_rounds:
        return journal.records()
    federation = Federation(
        coordinator, host, claim_port(port, host), certificates, tuple(node_keys)
    )
    return federation.run(on_watch)


def claim_port(port: int, host: str) -> int:
    """Return the port if it is free, or a free one for 0.

    Raises:
        PortInUseError: it is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise PortInUseError(
                f"port {port} is taken by another process; set federated.port to a free "
                "one, or to 0 for any"
            ) from None
        return int(probe.getsockname()[1])


class GivenUpError(FederationError):
    """Processes ended again and again."""


@dataclass
class Federation:
    """The processes of one call, and what keeps them running."""

    coordinator: Coordinator
    host: str
    port: int
    certificates: Certificates | None = None
    node_keys: tuple[bytes, ...] = ()
    _sites: list[Child] = field(default_factory=list)
    _run: int | None = None
    _submitted_s: float = 0.0
    _restarts: int = 0
    _progress: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.work = self.coordinator.work
        self._journal = CoordinatorJournal(self.work)
        self._home = self.work / "flower"
        self._home.mkdir(parents=True, exist_ok=True)
        self._secret = secrets.token_hex(32)
        self._secret_path = self._home / "superexec.secret"
        self._environment = child_environment(
            FLWR_HOME=str(self._home),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            # Seconds; each question costs processor time that training on this machine needs.
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.5",
            # Loopback must not go through a proxy that is meant for the network.
            NO_PROXY=f"{LOOPBACK},localhost",
            no_proxy=f"{LOOPBACK},localhost",
        )
        self._link = self._make_link()
        self._executor = self._make_executor()

    @property
    def children(self) -> list[Child]:
        """All processes, in the order in which they are started."""
        return [self._link, self._executor, *self._sites]

    def add_site(self, site: Site, connection: Connection) -> None:
        """Have a site's agent on this machine, too."""
        folder = self.work / "sites"
        site_path, connection_path = folder / f"{site.name}.json", folder / f"{site.name}.link.json"
        write_atomic(site_path, site.model_dump_json(indent=1))
        write_atomic(connection_path, connection.model_dump_json(indent=1))
        module = "mutirao.federated.flower.site_agent"
        command = [sys.executable, "-m", module, str(site_path), str(connection_path)]
        log = self.work / "logs" / f"site-{site.name}.log"
        self._sites.append(Child(f"agent of site {site.name}", command, self._environment, log))

    def run(self, on_watch: Callable[[], None] | None = None) -> list[RoundRecord]:
        """Start everything, keep it running until the rounds are done, and end it."""
        self._progress = self._measure()
        try:
            with self._unless_killed():
                self._start_link()
            for each in self._sites:
                each.start()
            with self._unless_killed():
                self._submit()
            while not self._is_finished():
                with self._unless_killed():
                    self._restart_what_ended()
                if on_watch is not None:
                    on_watch()
                time.sleep(WATCH_S)
        finally:
            self._end_app()
            stop(self.children)
            self._remove_database()
        return self._journal.records()

    # --- starting ---------------------------------------------------------------------------

    def _make_link(self) -> Child:
        command = [sys.executable, "-m", "mutirao.federated.flower.superlink"]
        command += ["--host", self.host, "--port", str(self.port), "--isolation", "process"]
        command += ["--database", str(self._home / "superlink.db")]
        command += ["--superexec-auth-secret-file", str(self._secret_path)]
        command += ["--disable-runtime-dependency-installation"]
        if (made := self.certificates) is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(made.ca), "--ssl-certfile", str(made.server)]
            command += ["--ssl-keyfile", str(made.server_key)]
            command += ["--enable-supernode-auth"] if self.node_keys else []
        environment = {
            **self._environment,
            SECRET_VARIABLE: self._secret,
            # Chunks of 5 MB pass through dozens of threads; glibc would keep them all.
            "MALLOC_ARENA_MAX": "2",
            "MALLOC_MMAP_THRESHOLD_": str(512 * 1024),
            "MALLOC_TRIM_THRESHOLD_": str(1024 * 1024),
        }
        return Child("SuperLink", command, environment, self.work / "logs" / "SuperLink.log")

    def _make_executor(self) -> Child:
        scripts = Path(sys.executable).parent
        command = [str(scripts / "flower-superexec"), "--runtime-api-address", self._address]
        command += ["--superexec-auth-secret-file", str(self._secret_path)]
        command += ["--parent-pid", str(os.getpid())]
        certificates = self.certificates
        command += ["--root-certificates", str(certificates.ca)] if certificates else ["--insecure"]
        path = str(self.work / COORDINATOR_NAME)
        environment = {**self._environment, COORDINATOR_VARIABLE: path}
        return Child("SuperExec", command, environment, self.work / "logs" / "SuperExec.log")

    @property
    def _address(self) -> str:
        """Where this machine reaches the SuperLink."""
        return f"{LOOPBACK if self.host in (ANYWHERE, LOOPBACK) else self.host}:{self.port}"

    def _start_link(self) -> None:
        """Start SuperLink and SuperExec, and let in the nodes that may connect."""
        self._remove_database()
        self._secret_path.unlink(missing_ok=True)
        descriptor = os.open(self._secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        self._link.start()
        self._wait_for_port()
        if self.node_keys:
            with self._control() as control:
                control.register_nodes(self.node_keys)
        self._executor.start()

    def _control(self) -> Control:
        from mutirao.federated.flower.control import Control

        certificates = self.certificates
        return Control(self._address, self._secret, certificates.ca if certificates else None)

    def _wait_for_port(self) -> None:
        host = self._address.rpartition(":")[0]
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._link.exit_code is None:
            with socket.socket() as probe:
                if probe.connect_ex((host, self.port)) == 0:
                    return
            time.sleep(0.1)
        raise FederationError(
            f"the SuperLink did not start on port {self.port}; see {self._link.log_path}"
        )

    def _submit(self) -> None:
        """Have Flower start our ServerApp; an earlier run is over."""
        self._end_app()
        self._journal.status_path.unlink(missing_ok=True)
        with self._control() as control:
            if self._run is not None:
                control.stop_run(self._run)
            self._run = control.start_run()
        self._submitted_s = time.monotonic()

    def _remove_database(self) -> None:
        for path in self._home.glob("superlink.db*"):
            path.unlink(missing_ok=True)

    # --- watching ---------------------------------------------------------------------------

    def _status(self) -> dict[str, object]:
        with suppress(ValueError):  # it is written anew just now
            return self._journal.read_status()
        return {}

    def _is_finished(self) -> bool:
        status = self._status()
        if status.get("state") == "failed":
            raise FederationError(str(status["message"]))
        return status.get("state") == "finished"

    def _restart_what_ended(self) -> None:
        for site in self._sites:
            if site.exit_code is not None:
                self._count_restart(site)
                site.start()
        if self._link.exit_code is not None:
            self._count_restart(self._link)
            self._end_app()
            self._executor.kill()
            self._run = None  # the new SuperLink knows nothing of it
            self._start_link()
            self._submit()
        elif self._executor.exit_code is not None:
            self._count_restart(self._executor)
            self._end_app()
            self._executor.start()
            self._submit()
        elif (reason := self._why_app_ended()) is not None:
            self._count_restart(self._executor, f"the coordinator's ServerApp {reason}")
            self._submit()

    @contextmanager
    def _unless_killed(self) -> Iterator[None]:
        """Bear what fails because the SuperLink was killed just then: the next look restarts it."""
        try:
            yield
        except GivenUpError:
            raise
        except FederationError:
            deadline = time.monotonic() + KILLED_S
            while (code := self._link.exit_code) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if code is None or code >= 0:
                raise

    def _why_app_ended(self) -> str | None:
        status = self._status()
        if status.get("state") == "crashed":
            return f"stopped: {status['message']}"
        pid = status.get("pid")
        if isinstance(pid, int):
            # It writes 'finished' as its last word: look again after it was seen to be gone.
            return None if is_alive(pid) or self._is_finished() else "ended unexpectedly"
        waited_s = time.monotonic() - self._submitted_s
        return "did not start" if waited_s > APP_START_S else None

    def _count_restart(self, child: Child, what: str | None = None) -> None:
        """Allow a restart, unless there were many since anything was achieved.

        Raises:
            FederationError: there were.
        """
        if (progress := self._measure()) != self._progress:
            self._progress, self._restarts = progress, 0
        self._restarts += 1
        if what is None:
            code = child.exit_code
            what = f"the {child.label} ended unexpectedly ({describe_exit(code or 0)})"
        if self._restarts > MAX_RESTARTS:
            words = child.last_words()
            raise GivenUpError(
                f"{what}, after {MAX_RESTARTS} restarts without progress; finished rounds are "
                f"kept: run the same command again, or see {child.log_path}"
                + (f", which ends: {words}" if words else "")
            )

    def _measure(self) -> tuple[int, int]:
        """Return what has been achieved: finished rounds, and answers to the one that runs."""
        files = sum(1 for path in (self.work / "rounds").rglob("*") if path.is_file())
        return len(self._journal.records()), files

    def _end_app(self) -> None:
        """End a ServerApp that outlived its run: two of them would write one journal."""
        import psutil

        pid = self._status().get("pid")
        with suppress(psutil.Error):
            process = psutil.Process(pid) if isinstance(pid, int) else None
            if process is not None and "flwr-serverapp" in " ".join(process.cmdline()):
                process.kill()
                process.wait(5)


def _count_tokens(
    journal: CoordinatorJournal, plan: Plan, sites: Sequence[Site]
) -> tuple[int, int]:
    federated = plan.federated
    names, finished = [site.name for site in sites], len(journal.records())
    groups = [len(federated.group(names, each + 1)) for each in range(federated.num_rounds)]
    total = federated.tokens_per_round * sum(groups)
    done = federated.tokens_per_round * sum(groups[:finished])
    for site in sites:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
            progress = json.loads(SiteJournal(site.work).progress_path.read_bytes())
            if progress["round"] == finished + 1:
                done += min(progress["num_tokens"], federated.tokens_per_round)
    return done, total
