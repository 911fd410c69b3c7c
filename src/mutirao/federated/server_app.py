"""The coordinator's Flower ServerApp: asks every site, aggregates, journals.

Replies are pulled by our own loop, because Flower's strategies wait for ever for a lost
node and cannot go on from a round. Finished rounds are never done again. All updates of a
round are held until its end, which adapters allow; constant memory for full weights is not
here yet.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from mutirao.config import load_json
from mutirao.environment import silence
from mutirao.errors import FederationError, MutiraoError, UpdateError
from mutirao.federated.codec import decode_update
from mutirao.federated.journal import CoordinatorJournal, RoundRecord, SiteRound
from mutirao.federated.messages import count_bytes, pack_request, unpack_reply
from mutirao.federated.plan import Coordinator
from mutirao.federated.site import RoundAnswer
from mutirao.federated.strategy import WeightedUpdate, mean_update, outer_step

POLL_S = 0.5

silence()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that the journal does not hold yet, and say in it how that ended."""
    coordinator = load_json(Coordinator, Path(str(context.run_config["coordinator-file"])))
    journal = CoordinatorJournal(coordinator.work)
    journal.write_status("running")
    try:
        node_ids = _wait_for_sites(grid, coordinator)
        for number in range(len(journal.records()) + 1, coordinator.plan.federated.num_rounds + 1):
            _run_round(grid, coordinator, journal, number, node_ids)
    except MutiraoError as error:
        journal.write_status("failed", str(error))
        raise
    except Exception as error:
        journal.write_status("failed", f"the coordinator stopped: {type(error).__name__}: {error}")
        raise
    journal.write_status("finished")


def _wait_for_sites(grid: Grid, coordinator: Coordinator) -> list[int]:
    timeout_s = coordinator.plan.federated.connect_timeout_s
    deadline = time.monotonic() + timeout_s
    while True:
        node_ids = sorted(grid.get_node_ids())
        if len(node_ids) > len(coordinator.sites):
            raise FederationError(
                f"{len(node_ids)} nodes connected (expected {len(coordinator.sites)}); somebody "
                "who was not invited is among them"
            )
        if len(node_ids) == len(coordinator.sites):
            return node_ids
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(node_ids)} of {len(coordinator.sites)} sites connected within "
                f"{timeout_s:.0f} s; look at the logs in {coordinator.work / 'logs'}, then run "
                "the same command again"
            )
        time.sleep(POLL_S)


def _run_round(
    grid: Grid,
    coordinator: Coordinator,
    journal: CoordinatorJournal,
    number: int,
    node_ids: list[int],
) -> None:
    started = time.monotonic()
    plan = coordinator.plan
    state = journal.load_state(number - 1)
    request = pack_request(plan, number, state["global"])
    bytes_received = count_bytes(request)
    updates: dict[str, WeightedUpdate] = {}
    sites: dict[str, SiteRound] = {}
    for message in _ask_all(grid, node_ids, request, number, plan.federated.round_timeout_s):
        reply = unpack_reply(message.content)
        answer = reply.answer
        _check_answer(answer, number, coordinator, updates)
        values = decode_update(reply.update, state["global"].size)
        updates[answer.site] = WeightedUpdate(values, float(answer.num_tokens))
        sites[answer.site] = SiteRound(
            **answer.model_dump(exclude={"site", "round"}),
            bytes_sent=count_bytes(message.content),
            bytes_received=bytes_received,
            update_sha256=reply.update.sha256,
        )
    new_state, momentum = outer_step(
        state["global"],
        state["momentum"],
        mean_update(updates),
        learning_rate=plan.federated.outer_learning_rate,
        momentum_decay=plan.federated.outer_momentum,
    )
    record = RoundRecord(
        round=number, seconds=time.monotonic() - started, sites=dict(sorted(sites.items()))
    )
    journal.append(record, {"global": np.asarray(new_state), "momentum": momentum})


def _check_answer(
    answer: RoundAnswer, number: int, coordinator: Coordinator, updates: Container[str]
) -> None:
    """Refuse an answer of a stranger, of another round, or with a weight beyond the plan.

    Raises:
        UpdateError: what is wrong with it, by name.
    """
    plan = coordinator.plan
    most = plan.federated.tokens_per_round + 2 * plan.train.max_tokens_per_example
    if answer.site not in coordinator.sites or answer.site in updates:
        raise UpdateError(
            f"an answer came in the name of {answer.site[:64]!r} (expected one of each of "
            f"{', '.join(coordinator.sites)})"
        )
    if answer.round != number:
        raise UpdateError(
            f"site {answer.site} answered for round {answer.round} (expected {number})"
        )
    if answer.num_tokens > most:
        raise UpdateError(
            f"site {answer.site} claims {answer.num_tokens} tokens (the plan has at most {most})"
        )


def _ask_all(
    grid: Grid, node_ids: list[int], content: RecordDict, number: int, timeout_s: float
) -> Iterator[Message]:
    """Ask all sites at once, and yield each reply as it comes, within the plan's time."""
    requests = [
        Message(content, node_id, MessageType.TRAIN, group_id=str(number), ttl=timeout_s)
        for node_id in node_ids
    ]
    waiting = set(grid.push_messages(requests))
    deadline = time.monotonic() + timeout_s
    while waiting:
        for message in grid.pull_messages(waiting):
            if message.has_error():
                raise FederationError(
                    f"a site (node {message.metadata.src_node_id}) failed in round {number}: "
                    f"{message.error.reason.rstrip('.')}; finished rounds are kept: look at the "
                    "sites' logs, then run the same command again"
                )
            waiting.discard(message.metadata.reply_to_message_id)
            yield message
        if waiting and time.monotonic() > deadline:
            raise FederationError(
                f"{len(waiting)} of {len(node_ids)} sites did not answer within {timeout_s:.0f} s "
                f"in round {number}; finished rounds are kept: run the same command again"
            )
        time.sleep(POLL_S)
