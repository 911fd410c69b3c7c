"""Plain Flower for the aggregator benchmark: its SuperLink, its FedAvg, nothing of ours.

The ServerApp travels as Flower wants it, in a bundle that is made here. The database is used
where a run is to be disturbed, because Flower keeps its state in memory without one.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from aggregator_task import Task

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "plain-fedavg"
version = "1.0.0"
description = "Flower's FedAvg with made-up arrays."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "plain_fedavg.server_app:app"
clientapp = "plain_fedavg.server_app:app"

[tool.flwr.app.config]
""",
    "plain_fedavg/__init__.py": "",
    "plain_fedavg/server_app.py": """\
import hashlib
import json
import os
from pathlib import Path

from aggregator_task import Task, make_tensor, shapes_of
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    task = Task.read(os.environ["MUTIRAO_BENCH_TASK"])
    start = ArrayRecord(
        {name: Array(make_tensor(name, shape, 0)) for name, shape in shapes_of(task.size).items()}
    )
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=task.num_sites, min_available_nodes=task.num_sites
    )
    result = strategy.start(grid, start, num_rounds=task.num_rounds)
    digest = hashlib.sha256()
    for name, array in sorted(result.arrays.items()):
        digest.update(name.encode() + array.numpy().tobytes())
    path = Path(task.folder) / "result.json"
    path.write_text(json.dumps({"sha256": digest.hexdigest()}))
""",
}


def link_command(task: Task, programs: Path) -> list[str]:
    """Return the command of Flower's SuperLink, which starts the ServerApp itself."""
    command = [str(programs / "flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(task.port), "--disable-runtime-dependency-installation"]
    return command + (["--database", f"{task.folder}/superlink.db"] if task.disturbed else [])


def submit(task: Task) -> int:
    """Start the run, and return its number."""
    from flwr.cli.build import build_fab_from_files
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab

    content, _ = build_fab_from_files({name: text.encode() for name, text in FILES.items()})
    fab = Fab(hash_str=_sha256(content), content=content)
    client = _open(task)
    deadline = time.monotonic() + 60
    while True:
        try:
            return int(client.StartRun(StartRunRequest(fab=fab)).run_id)
        except httpx.HTTPStatusError as error:
            raise RuntimeError(error.response.text) from error
        except (httpx.HTTPError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def status(task: Task) -> str:
    """Return how Flower says that its runs stand; empty while it does not answer."""
    from flwr.proto.control_pb2 import ListRunsRequest

    with suppress(httpx.HTTPError, ValueError):
        runs = _open(task).ListRuns(ListRunsRequest()).run_dict.values()
        return ", ".join(f"{run.status.status}:{run.status.sub_status}" for run in runs)
    return ""


def _open(task: Task) -> Any:
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    return ControlHttpClient.from_server_address(
        f"127.0.0.1:{task.port}",
        True,
        None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
