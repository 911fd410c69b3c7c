"""All sites of one run over Flower, in one light process: a thread each, made-up answers.

    python benchmarks/aggregator_sites.py TASK_FILE

Both peers that use Flower get the same sites, which speak Flower's Fleet API as our site agent
does; a site of ours answers with a signed parcel, a site of plain Flower with an ArrayRecord of
float32. So only the server's side differs. A site that loses its server connects again.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from aggregator_task import Task, make_update, note_answer
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from mutirao.federated.codec import CodecConfig, encode_tensors
from mutirao.federated.flower import site_agent
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.fleet import Fleet, RunOver, Unreachable
from mutirao.federated.flower.site_agent import SiteAgent
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import (
    DoneAnswer,
    TrainRequest,
    UpdateAnswer,
    read_fields,
    tensor_payloads,
)
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Site

POLL_S = 0.1
"""For each site; with 32 of them on two cores the questions alone would fill a core."""
ONE_AT_A_TIME = threading.Lock()
"""Making an update is the sites' work: two cores do it no faster at the same time."""


def site_of(task: Task, name: str) -> Site:
    """Return a site's file; model and data are never looked at."""
    nothing = Path(task.folder) / "nothing"
    return Site(name=name, model=nothing, data=nothing, work=Path(task.folder) / "sites" / name)


def answer_ours(task: Task, site: Site, request_bytes: bytes) -> bytes:
    """Return what a site of ours sends for a request, at once."""
    request = Parcel.from_bytes(request_bytes)
    payloads = {}
    if request.kind == "train":
        fields = read_fields(TrainRequest, request)
        with ONE_AT_A_TIME:
            update = make_update(task, site.name, request.round)
            encoded = encode_tensors(update, CodecConfig(format=task.upload))
        payloads = tensor_payloads(encoded)
        kind, told = (
            "update",
            UpdateAnswer(
                request_sha256=request.sha256,
                state_sha256=fields.state.state_sha256,
                num_tokens=1,
                num_steps=1,
                seconds=0,
            ),
        )
        down = sum(each.size for each in request.payloads.values())
        up = sum(each.size for each in payloads.values())
        note_answer(task.folder, site.name, request.round, down=down, up=up)
    else:
        kind, told = "done", DoneAnswer(request_sha256=request.sha256)
    answer = Parcel(kind, request.run, request.round, site.name, told.model_dump(), payloads)
    return answer.signed(open_identity(site.work / "identity")).to_bytes()


def serve_ours(task: Task, name: str) -> None:
    """Be one site of ours, by its own agent."""
    site = site_of(task, name)
    site_agent.POLL_S = POLL_S * task.num_sites
    connection = Connection(address=f"127.0.0.1:{task.port}")
    SiteAgent(site, connection, lambda request: answer_ours(task, site, request)).run()


def serve_flower(task: Task, name: str) -> None:
    """Be one node of plain Flower."""
    connection = Connection(address=f"127.0.0.1:{task.port}")
    fleet = Fleet(connection, Path(task.folder) / "sites" / name)
    while True:
        try:
            fleet.connect()
            while not fleet.is_disowned:
                answer_flower(task, name, fleet)
        except (Unreachable, RunOver):
            time.sleep(1.0)


def answer_flower(task: Task, name: str, fleet: Fleet) -> None:
    """Answer one message of plain Flower, if there is one."""
    received = fleet.receive()
    if received is None:
        time.sleep(POLL_S * task.num_sites)
        return
    message, tree = received
    content = fleet.fetch(message, tree)
    arrays, config = content["arrays"], content["config"]
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(config, ConfigRecord)
    down = sum(len(each.data) for each in arrays.values())
    round_number = int(str(config["server-round"]))
    del content, arrays
    with ONE_AT_A_TIME:
        update = make_update(task, name, round_number)
        record = ArrayRecord({key: Array(values) for key, values in update.items()})
    up = sum(len(each.data) for each in record.values())
    metrics = MetricRecord({"num-examples": 1})
    reply = Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)
    note_answer(task.folder, name, round_number, down=down, up=up)
    fleet.send(reply)


def main(path: str) -> None:
    task = Task.read(path)
    serve = serve_ours if task.peer == "mutirao" else serve_flower
    threads = [threading.Thread(target=serve, args=(task, name)) for name in task.sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
