"""Our coordinator for the aggregator benchmark: the processes that a real one has.

python benchmarks/aggregator_ours.py prepare TASK_FILE     write start, keys and plan
python benchmarks/aggregator_ours.py serve TASK_FILE       SuperLink, SuperExec, ServerApp
"""

from __future__ import annotations

import sys
from pathlib import Path

from aggregator_task import Task, make_tensor, shapes_of

from mutirao.federated.codec import CodecConfig
from mutirao.federated.coordinator.journal import CoordinatorJournal, keep_coordinator
from mutirao.federated.flower.deployment import LOOPBACK, serve_coordinator
from mutirao.federated.identity import open_identity, public_hex
from mutirao.federated.plan import FederatedConfig, Plan

CODECS = ("bf16", "int8", "int4", "int2")


def plan_of(task: Task) -> Plan:
    """Return what is agreed: plain means of all sites, changes of the state in bfloat16."""
    federated = FederatedConfig(
        num_rounds=task.num_rounds,
        weighting="equal",
        upload=CodecConfig.model_validate({"format": task.upload}),
        download=CodecConfig(format="bf16"),
    )
    return Plan(federated=federated, lora=None, model_sha256="0" * 64)


def prepare(task: Task) -> None:
    """Write what is there before a coordinator starts; not measured."""
    plan, shapes = plan_of(task), shapes_of(task.size)
    journal = CoordinatorJournal(Path(task.folder) / "coordinator")
    journal.write_start(
        shapes, lambda name: make_tensor(name, shapes[name], 0), plan.federated.outer
    )
    for site in task.sites:
        open_identity(Path(task.folder) / "sites" / site / "identity")


def serve(task: Task) -> None:
    """Be the coordinator until all rounds are done."""
    sites = Path(task.folder) / "sites"
    keys = {name: public_hex(open_identity(sites / name / "identity")) for name in task.sites}
    coordinator = keep_coordinator(plan_of(task), keys, Path(task.folder) / "coordinator")
    serve_coordinator(coordinator, port=task.port, host=LOOPBACK)


def main(what: str, path: str) -> None:
    {"prepare": prepare, "serve": serve}[what](Task.read(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
