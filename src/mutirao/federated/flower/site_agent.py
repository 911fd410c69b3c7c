"""A site's one process on the network: fetches requests, has them answered, sends the answers.

It stands where Flower has a SuperNode, a SuperExec and a new ClientApp process for every
message. Requests go to the site's worker, one at a time, as bytes; what comes back is sent.
Nothing is executed that came from the coordinator: the bundle of a run is not fetched, and a
run whose bundle this site's wheel would not build, and its policy does not list, is answered
with an error.

While the worker trains, the agent goes on: heartbeats, and answers to ``hello``, which says
who the site is and what it is working on. It signs those itself, with the site's key; they
hold nothing of the site's. If the line breaks, or the agent is killed, an answer may be lost:
the coordinator learns so from the next hello and asks again, and the worker answers the same
request from its journal with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree

from mutirao.errors import FederationError, InputError, MutiraoError, UpdateError
from mutirao.federated.flower.bundle import bundle_sha256
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.fleet import Fleet, NotAccepted, RunOver, Unreachable
from mutirao.federated.flower.records import from_record, to_record
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import HelloAnswer, HelloRequest, read_fields
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Site
from mutirao.federated.site.policy import ANY, load_policy

Worker = Callable[[bytes], bytes]
"""Answers one request; may take hours, must not fail for a bad request."""

HELLO = "hello"
POLL_S = 0.3
BUSY_POLL_S = 1.0
"""While the worker works there is little to hear, and each question costs processor time."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
NOT_ACCEPTED_S = 60.0
"""A key that is not registered after so long is not going to be: a coordinator registers them
as it starts, and forgets an earlier process of ours after 20 s."""
_WORKER_TRIES = 3
_SEND_TRIES = 3

logger = logging.getLogger(__name__)


@dataclass
class _Job:
    """A request on its way through the worker."""

    message: Message
    request: bytes
    sha256: str
    answer: bytes | None = None
    """None while it is worked on, and where the worker failed for good."""
    num_sent: int = 0
    """How often sending the answer was tried."""


class SiteAgent:
    """One site's agent; ``run`` returns when ``stop`` is set."""

    def __init__(self, site: Site, connection: Connection, worker: Worker) -> None:
        self.site = site
        self.connection = connection
        self.stop = threading.Event()
        self._worker = worker
        self._folder = site.work / "flower"
        self._key = open_identity(site.work / "identity")
        self._bundles: dict[int, bool] = {}
        self._lock = threading.Condition()
        self._waiting: _Job | None = None
        self._doing: _Job | None = None
        self._done: list[_Job] = []

    def run(self) -> None:
        """Serve the coordinator until told to stop.

        Raises:
            FederationError: connecting makes no sense: an expired certificate, a key that the
                coordinator does not know, another version of Flower.
            InputError: another process already serves this site.
        """
        threading.Thread(target=self._work, daemon=True, name="worker").start()
        with _alone(self._folder):
            fleet = Fleet(self.connection, self._folder)
            try:
                self._run(fleet)
            finally:
                fleet.close()
                with self._lock:
                    self._lock.notify_all()

    def _run(self, fleet: Fleet) -> None:
        """Connect and serve, again and again; each connection is waited for a little longer."""
        wait_s, told, refused_since = FIRST_WAIT_S, "", None
        while not self.stop.is_set():
            try:
                node_id = fleet.connect()
                logger.info("connected to %s as node %d", self.connection.address, node_id)
                wait_s, told, refused_since = FIRST_WAIT_S, "", None
                self._serve(fleet)
            except Unreachable as error:
                if str(error) != told:
                    logger.warning("%s; trying again", error)
                told = str(error)
                if not isinstance(error, NotAccepted):
                    refused_since = None
                elif time.monotonic() - (refused_since or time.monotonic()) > NOT_ACCEPTED_S:
                    raise FederationError(
                        f"{error}; ask the coordinator for a new invite, or end the other process"
                    ) from None
                else:
                    refused_since = refused_since or time.monotonic()
                self.stop.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _serve(self, fleet: Fleet) -> None:
        while not self.stop.is_set() and not fleet.is_disowned:
            self._send_done(fleet)
            received = fleet.receive()
            if received is None:
                with self._lock:  # woken by an answer, so that it leaves at once
                    wait_s = BUSY_POLL_S if self._doing or self._waiting else POLL_S
                    self._lock.wait_for(lambda: self._done or self.stop.is_set(), wait_s)
                continue
            with suppress(RunOver):
                self._take(fleet, *received)

    # --- one message ------------------------------------------------------------------------

    def _take(self, fleet: Fleet, message: Message, tree: ObjectTree) -> None:
        run_id = message.metadata.run_id
        if not self._knows_bundle(fleet, run_id):
            reason = (
                f"site {self.site.name} does not know the app bundle of this run; it answers runs "
                f"of bundle {bundle_sha256()} and of those that its policy lists"
            )
            fleet.send(Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message))
            return
        try:
            parcel = from_record(
                fleet.fetch(message, tree), max_bytes=self.connection.max_parcel_bytes
            )
            if parcel.kind == HELLO:
                fleet.send(Message(to_record(self._greet(parcel)), reply_to=message))
                return
        except UpdateError as error:
            self._note("a message was not read", sentence=str(error))
            error_reply = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"not accepted: {error}")
            fleet.send(Message(error_reply, reply_to=message))
            return
        logger.info("round %d: asked for %r", parcel.round, parcel.kind)
        with self._lock:  # a newer request withdraws one that waits
            self._waiting = _Job(message, parcel.to_bytes(), parcel.sha256)
            self._lock.notify_all()

    def _knows_bundle(self, fleet: Fleet, run_id: int) -> bool:
        if run_id not in self._bundles:
            sha256 = fleet.bundle_of(run_id)
            known = self._is_known(sha256)
            if not known:
                self._note("a run was refused", bundle_sha256=sha256[:64], run=run_id)
                logger.warning("a run with the unknown app bundle %s was refused", sha256[:64])
            self._bundles = {run_id: known}
        return self._bundles[run_id]

    def _is_known(self, sha256: str) -> bool:
        if sha256 == bundle_sha256():
            return True
        if self.site.policy is None:
            return False
        allowed = load_policy(self.site.policy).rules.app_bundles
        return allowed == (ANY,) or sha256 in allowed

    def _greet(self, request: Parcel) -> Parcel:
        """Return who we are, signed.

        Raises:
            UpdateError: the request is not from the coordinator that this site knows.
        """
        read_fields(HelloRequest, request)
        key = self.site.coordinator_key
        if request.sender != COORDINATOR or (key is not None and not request.is_signed_by(key)):
            raise UpdateError("it is not signed by the coordinator that this site knows")
        with self._lock:
            jobs = [self._waiting, self._doing, *self._done]
            working_on = next((job.sha256 for job in jobs if job is not None), "")
        fields = HelloAnswer(request_sha256=request.sha256, working_on=working_on)
        answer = Parcel(HELLO, request.run, request.round, self.site.name, fields.model_dump())
        return answer.signed(self._key)

    # --- the worker -------------------------------------------------------------------------

    def _work(self) -> None:
        """Answer requests one after another, in a thread of its own."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self.stop.is_set())
                if self.stop.is_set():
                    return
                self._doing, self._waiting = self._waiting, None
                job = self._doing
            assert job is not None
            job.answer = self._answer(job.request)
            with self._lock:
                self._doing = None
                self._done.append(job)
                self._lock.notify_all()

    def _answer(self, request: bytes) -> bytes | None:
        for number in range(1, _WORKER_TRIES + 1):
            try:
                return self._worker(request)
            except Exception as error:  # of a process that was killed, or of any other fault
                self._note("the worker failed", attempt=number, error=repr(error)[:2_000])
                logger.exception("the worker failed")
                if self.stop.wait(FIRST_WAIT_S):
                    break
        return None

    def _send_done(self, fleet: Fleet) -> None:
        while self._done:
            job = self._done[0]
            job.num_sent += 1
            # A SuperLink that was started anew knows nothing of the request: its coordinator asks
            # again. To send the answer all the same would fail for ever, and hold up all others.
            is_known = job.message.metadata.dst_node_id == fleet.node_id
            if is_known and job.num_sent <= _SEND_TRIES:
                with suppress(RunOver):
                    fleet.send(self._reply(job))
            with self._lock:
                self._done.pop(0)

    def _reply(self, job: _Job) -> Message:
        if job.answer is None:
            reason = f"site {self.site.name} failed; its own log says why"
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=job.message)
        return Message(to_record(Parcel.from_bytes(job.answer)), reply_to=job.message)

    def _note(self, event: str, **what: object) -> None:
        """Keep what happened in the site's own log, which never leaves it."""
        line = json.dumps({"time": time.time(), "event": event, **what}, default=str)
        with suppress(OSError), (self.site.work / "agent.jsonl").open("a") as file:
            file.write(line + "\n")


def run_site(site: Site, connection: Connection, *, worker: Worker) -> None:
    """Serve the coordinator until SIGTERM or SIGINT.

    Args:
        site: whose data, whose key.
        connection: where the coordinator is.
        worker: answers requests; closed by the caller.

    Raises:
        FederationError: it makes no sense to try again; one sentence says why.
        InputError: another process already serves this site.
    """
    agent = SiteAgent(site, connection, worker)
    with _ended_by_signals(agent.stop):
        agent.run()


@contextmanager
def _ended_by_signals(stop: threading.Event) -> Iterator[None]:
    """Set an event instead of ending the process; only the main thread can have that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a site's lock: two agents of one site would take each other's requests."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process already serves the site whose work folder is {folder.parent}; "
                "end it, or name another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def main(site_path: str, connection_path: str) -> int:
    """Run one site of a federation on one machine; ``deployment`` starts this as a process."""
    from mutirao.config import load_json
    from mutirao.console import configure_logging
    from mutirao.environment import silence

    silence()
    configure_logging()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    site = load_json(Site, Path(site_path))
    connection = load_json(Connection, Path(connection_path))
    try:
        with open_worker(site) as worker:
            run_site(site, connection, worker=worker)
    except MutiraoError as error:
        print(error, flush=True)
        return error.exit_code
    return 0


@contextmanager
def open_worker(site: Site) -> Iterator[Worker]:
    """Start the site's worker process, and end it afterwards."""
    from mutirao.federated.site.process import WorkerProcess

    with closing(WorkerProcess(site)) as worker:
        yield worker.answer


if __name__ == "__main__":
    import sys

    raise SystemExit(main(*sys.argv[1:]))
