"""A real SuperLink on loopback for tests, and a Grid without SuperExec and ServerApp process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from mutirao.federated.flower.certificates import Certificates
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.deployment import LOOPBACK, Federation, claim_port
from mutirao.federated.flower.site_agent import SiteAgent, Worker
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Coordinator, FederatedConfig, Plan, Site


class Link(Federation):
    """A federation of which only the SuperLink runs."""

    def __enter__(self) -> Link:
        self.grids: list[HttpGrid] = []
        self.senders: list[HeartbeatSender] = []
        self._executor.command = ["sleep", "600"]
        self._start_link()
        return self

    def __exit__(self, *_: object) -> None:
        from mutirao.federated.flower.processes import stop

        self.drop_grids()
        stop(self.children)

    def drop_grids(self) -> None:
        """End the stand-ins; Flower ends the process of one whose SuperLink forgot it."""
        for sender in self.senders:
            sender.stop()
        for grid in self.grids:
            grid.close()
        self.senders.clear()
        self.grids.clear()

    def open_grid(self) -> HttpGrid:
        """Start a run and stand in for its ServerApp."""
        with self._control() as control:
            run_id = control.start_run()
        ca = self.certificates.ca.read_bytes() if self.certificates else None
        client = RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=ca is None,
            root_certificates=ca,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=self._secret_path.read_bytes(),
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
        )
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        token = client.AcquireTask(request).token
        client.close()
        grid = HttpGrid(self._address, insecure=ca is None, root_certificates=ca, token=token)
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        run = run_from_proto(given.run)
        assert run.run_id == run_id
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run)
        sender = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        sender.start()
        self.senders.append(sender)
        self.grids.append(grid)
        return grid


def make_site(folder: Path, name: str) -> Site:
    missing = folder / "missing"
    return Site(name=name, model=missing, data=missing, work=folder / name)


def make_link(
    folder: Path,
    sites: list[Site],
    certificates: Certificates | None = None,
    node_keys: tuple[bytes, ...] = (),
) -> Link:
    keys = {site.name: public_hex(open_identity(site.work / "identity")) for site in sites}
    plan = Plan(federated=FederatedConfig(round_timeout_s=60), model_sha256="0" * 64)
    work = folder / "coordinator"
    coordinator = Coordinator(plan=plan, sites=keys, work=work, run_id=secrets.token_hex(32))
    return Link(coordinator, LOOPBACK, claim_port(0, LOOPBACK), certificates, node_keys)


def answering(site: Site, make: Callable[[Parcel], Parcel]) -> Worker:
    """Return a worker that answers each request with what ``make`` returns, signed."""
    key = open_identity(site.work / "identity")
    return lambda request: make(Parcel.from_bytes(request)).signed(key).to_bytes()


@contextmanager
def agent_thread(site: Site, connection: Connection, worker: Worker) -> Iterator[SiteAgent]:
    """Run a site's agent in a thread of this process."""
    agent = SiteAgent(site, connection, worker)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop.set()
        thread.join(30)
        assert not thread.is_alive()
