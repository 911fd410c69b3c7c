"""The coordinator's network over Flower's Grid: parcels to nodes, and back one at a time.

Nodes have numbers, sites have names and keys: each new node is greeted, and is the site whose
key signed its answer. Others are told of and ignored. A node that was started anew, or whose
line broke, is greeted again; if it then does not know of the request that it was sent, the
request is lost, and the coordinator may ask again.

Only one reply lies in memory: they are pulled by single ids, by our own loop, because Flower's
own holds all of them and waits for ever for a node that is gone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from mutirao.errors import UpdateError
from mutirao.federated.flower.connection import MAX_PARCEL_BYTES
from mutirao.federated.flower.records import MALFORMED, from_record, to_record
from mutirao.federated.identity import open_identity
from mutirao.federated.messages import HelloAnswer, HelloRequest, printable, read_fields
from mutirao.federated.network import Lost
from mutirao.federated.parcel import COORDINATOR, Parcel
from mutirao.federated.plan import Coordinator

HELLO = "hello"
LOOK_S = 1.0
"""How often nodes are counted and greetings fetched."""
POLL_S = 0.2
_SPARE_TTL_S = 600.0
logger = logging.getLogger(__name__)


@dataclass
class _Node:
    """One connected node."""

    activated_at: str
    site: str | None = None
    greeting: str | None = None
    """Message id of a hello that is not answered yet."""
    greeting_sha256: str = ""
    greeted_at: int = 0
    """Count of messages sent when it was greeted."""


@dataclass
class _Asked:
    """One request that is not answered yet."""

    message_id: str
    node_id: int
    sha256: str
    sent_at: int


@dataclass
class FlowerNetwork:
    """The sites that Flower's nodes are; implements ``network.Network``."""

    grid: Grid
    coordinator: Coordinator
    on_note: Callable[[str], None] = logger.warning
    """Told what a person should know: strangers, nodes that were lost."""
    max_bytes: int = MAX_PARCEL_BYTES
    _nodes: dict[int, _Node] = field(default_factory=dict)
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _lost: deque[Lost] = field(default_factory=deque)
    _answers: deque[Parcel] = field(default_factory=deque)
    _record: tuple[str, RecordDict] | None = None
    """The last request in Flower's form: often the same goes to all sites."""
    _num_sent: int = 0
    _looked_s: float = float("-inf")

    def __post_init__(self) -> None:
        self._key = open_identity(self.coordinator.work / "identity")
        self._ttl_s = self.coordinator.plan.federated.round_timeout_s + _SPARE_TTL_S

    def reachable(self) -> set[str]:
        """Return the names of the sites that can be asked now."""
        self._look()
        return {node.site for node in self._nodes.values() if node.site is not None}

    def send(self, site: str, request: Parcel) -> None:
        """Ask a site; what it was asked before is withdrawn."""
        self._asked.pop(site, None)
        node_id = next((each for each, node in self._nodes.items() if node.site == site), None)
        if node_id is None:
            self._lost.append(Lost(site, f"site {site} is not connected"))
            return
        if self._record is None or self._record[0] != request.sha256:
            self._record = (request.sha256, to_record(request))
        message_id = self._push(node_id, self._record[1], MessageType.TRAIN, request.round)
        if message_id is None:
            self._lost.append(Lost(site, f"Flower did not take the request to site {site}"))
            return
        self._asked[site] = _Asked(message_id, node_id, request.sha256, self._num_sent)

    def receive(self, timeout_s: float) -> Parcel | Lost | None:
        """Return one answer, word that one will not come, or None after the time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._look()
            if self._lost:
                return self._lost.popleft()
            if self._answers:
                return self._answers.popleft()
            for site in list(self._asked):
                if (found := self._pull(site)) is not None:
                    return found
            if (left_s := deadline - time.monotonic()) <= 0:
                return None
            time.sleep(min(POLL_S, left_s))

    # --- messages ---------------------------------------------------------------------------

    def _push(self, node_id: int, record: RecordDict, kind: str, round_number: int) -> str | None:
        message = Message(record, node_id, kind, ttl=self._ttl_s, group_id=str(round_number))
        self._num_sent += 1
        try:
            ids = list(self.grid.push_messages([message]))
        except httpx.HTTPStatusError as error:
            _raise_unless_passing(error)
            return None
        return ids[0] if ids and ids[0] else None

    def _fetch(self, message_id: str) -> Message | UpdateError | None:
        """Return a reply if it is there; UpdateError where it came and cannot be had.

        Flower hands out a reply once: what fails after that is not there any more.
        """
        try:
            messages = list(self.grid.pull_messages([message_id]))
        except MALFORMED as error:
            return UpdateError(f"its message is malformed ({type(error).__name__})")
        except httpx.HTTPStatusError as error:
            _raise_unless_passing(error)
            return UpdateError("its message was lost in the SuperLink")
        return messages[0] if messages else None

    def _pull(self, site: str) -> Parcel | Lost | None:
        """Fetch a site's answer, if it is there; what comes of it is final."""
        reply = self._fetch(self._asked[site].message_id)
        if reply is None:
            return None
        del self._asked[site]
        if isinstance(reply, UpdateError):
            return Lost(site, f"site {site}: {reply}")
        if reply.has_error():
            return Lost(site, f"site {site}: {_reason(reply)}")
        try:
            parcel = from_record(reply.content, max_bytes=self.max_bytes)
        except UpdateError as error:
            return Lost(site, f"site {site}: {error}")
        if parcel.sender != site:
            return Lost(site, f"site {site} answered as {printable(parcel.sender)[:64]!r}")
        return parcel

    # --- nodes ------------------------------------------------------------------------------

    def _look(self) -> None:
        """Notice nodes that came and went, greet, and read answers to greetings."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        try:
            present = {info.node_id: info.last_activated_at for info in self.grid.get_nodes()}
        except httpx.HTTPStatusError as error:
            _raise_unless_passing(error)
            return
        for node_id in set(self._nodes) - set(present):
            self._forget(node_id)
        for node_id, activated_at in present.items():
            node = self._nodes.get(node_id)
            if node is None or node.activated_at != activated_at:
                self._greet(node_id, activated_at)
            elif node.greeting is not None:
                self._read_greeting(node_id, node)
        self._looked_s = time.monotonic()

    def _forget(self, node_id: int) -> None:
        """A node is gone: its site has to be found again, and its request is lost."""
        site = self._nodes.pop(node_id).site
        if site is None:
            return
        self.on_note(f"site {site} is no longer connected")
        asked = self._asked.get(site)
        if asked is not None and asked.node_id == node_id:
            self._settle(site, f"site {site} is no longer connected")

    def _settle(self, site: str, sentence: str) -> None:
        """Fetch an answer that came before its node went, or give the request up."""
        found = self._pull(site)
        if isinstance(found, Parcel):
            self._answers.append(found)
        else:
            self._asked.pop(site, None)
            self._lost.append(found or Lost(site, sentence))

    def _greet(self, node_id: int, activated_at: str) -> None:
        known = self._nodes.get(node_id)
        fields = HelloRequest(nonce=secrets.token_hex(16)).model_dump()
        hello = Parcel(HELLO, self.coordinator.run_id, 0, COORDINATOR, fields).signed(self._key)
        message_id = self._push(node_id, to_record(hello), MessageType.QUERY, 0)
        self._nodes[node_id] = _Node(
            activated_at=activated_at if message_id else "",
            site=known.site if known else None,
            greeting=message_id,
            greeting_sha256=hello.sha256,
            greeted_at=self._num_sent,
        )

    def _read_greeting(self, node_id: int, node: _Node) -> None:
        assert node.greeting is not None
        reply = self._fetch(node.greeting)
        if reply is None:
            return
        node.greeting = None
        if isinstance(reply, Message) and reply.has_error():
            if reply.error.code in (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE):
                node.activated_at = ""  # it did not get there; greeted again at the next look
                return
            self.on_note(f"a node that did not say who it is is ignored: {_reason(reply)}")
            return
        try:
            if isinstance(reply, UpdateError):
                node.activated_at = ""  # greeted again at the next look
                raise reply
            site, working_on = self._recognise(from_record(reply.content, max_bytes=0), node)
        except UpdateError as error:
            self.on_note(f"a node that is none of the sites is ignored: {error}")
            return
        self._place(node_id, node, site, working_on)

    def _recognise(self, answer: Parcel, node: _Node) -> tuple[str, str]:
        """Return whose answer it is and what that site is working on.

        Raises:
            UpdateError: it is no site's, or not the answer to this greeting.
        """
        key = self.coordinator.sites.get(answer.sender)
        if key is None or not answer.is_signed_by(key):
            raise UpdateError(
                f"its answer, in the name of {printable(answer.sender)[:64]!r}, is not signed with "
                "the key of a site of this federation"
            )
        fields = read_fields(HelloAnswer, answer)
        if answer.kind != HELLO or fields.request_sha256 != node.greeting_sha256:
            raise UpdateError(f"it sent an old answer of site {answer.sender}")
        return answer.sender, fields.working_on

    def _place(self, node_id: int, node: _Node, site: str, working_on: str) -> None:
        for other in self._nodes.values():
            if other is not node and other.site == site:
                other.site = None  # the site's earlier process
        node.site = site
        asked = self._asked.get(site)
        if asked is None or (asked.node_id == node_id and asked.sent_at > node.greeted_at):
            return
        if asked.node_id != node_id or working_on != asked.sha256:
            self._settle(site, f"site {site} was started anew and does not know of the request")


def _raise_unless_passing(error: httpx.HTTPStatusError) -> None:
    """Raise what does not pass: the SuperLink no longer knows this run."""
    if error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
        raise error
    logger.warning("the SuperLink failed: %s", error)


def _reason(reply: Message) -> str:
    return printable(reply.error.reason or f"error {reply.error.code}").strip().rstrip(".")
