"""A site's line to the coordinator: Flower's Fleet API, spoken by our own process.

What Flower's SuperNode does to fetch messages and send answers, in our words, because
SuperNode ends its process on most failures (``flwr_exit``, or SIGINT to itself), which would
take the site's training with it, and does not say why in one sentence. Here a failure is
either ``Unreachable``, after which one tries again, or a FederationError, after which it
makes no sense to.

Connecting is: register the node's key (refused, and not needed, where the coordinator has
registered it), end what an earlier process of ours left active, activate. Each activation
tells the coordinator that a message may have been lost on the way, so that it asks again;
the site's journal has the answer. The bundle of a run is never fetched: only its hash.
"""

from __future__ import annotations

import json
import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from mutirao.artifact import write_atomic
from mutirao.errors import FederationError, RecipeError, UpdateError
from mutirao.federated.flower.certificates import open_node_key
from mutirao.federated.flower.connection import Connection
from mutirao.federated.flower.records import MAX_PAYLOADS, put_together

HEARTBEAT_S = 10.0
"""What we promise, the least that Flower takes; it calls a node lost after twice that."""
_BEAT_EVERY_S = 4.0
_NUM_TRANSFERS = 2
"""Chunks of 5 MB on their way at the same time."""
_MAX_OBJECTS = 3 * MAX_PAYLOADS
_PULL_TRIES = 600
_PULL_WAIT_S = 0.5
"""Waits for a chunk that the coordinator has announced and not yet stored; 5 minutes in all."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Unreachable(Exception):
    """The coordinator cannot be reached just now, or its answer was lost; try again."""


class NotAccepted(Unreachable):
    """The coordinator is there, and does not take this site's node key."""


class RunOver(Exception):
    """The run of a message has ended; nothing is to be answered."""


class Fleet:
    """One node's connection; every call may raise Unreachable or FederationError."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            connection: where to, and as whom.
            folder: keeps the node's key, where it has none, and its number.
        """
        if connection.ca_certificate is None and not connection.is_local:
            raise RecipeError(
                f"the coordinator at {connection.address} is on another machine, and there is "
                "no CA certificate to know it by; ask for an invite made with certificates"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.connection = connection
        self._node_path = folder / "node.json"
        self._key = _node_key(connection, folder)
        self._client: FleetHttpClient | None = None
        self._node = Node(node_id=0)
        self._beats: threading.Thread | None = None
        self._stop_beats = threading.Event()
        self.is_disowned = False
        """Whether the coordinator no longer knows this node; connect again."""

    # --- connecting -------------------------------------------------------------------------

    def connect(self) -> int:
        """Register and activate the node; the number that the coordinator gave it is returned."""
        self.close()
        self._client = self._open_client()
        public_key = public_key_to_bytes(self._key.public_key())
        self._register(public_key)
        self._end_earlier()
        request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_S)
        node_id = int(self._call(self._client.ActivateNode, request).node_id)
        self._node = Node(node_id=node_id)
        write_atomic(self._node_path, json.dumps({"node_id": node_id}))
        self.is_disowned = False
        self._stop_beats = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(self._stop_beats,), daemon=True)
        self._beats.start()
        return node_id

    @property
    def node_id(self) -> int:
        """Our number at this SuperLink; 0 while not connected."""
        return self._node.node_id

    def close(self) -> None:
        """Tell the coordinator that the node is leaving, if it can be told."""
        self._stop_beats.set()
        if self._client is None:
            return
        if self._node.node_id:
            with suppress(httpx.HTTPError, ValueError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()
        self._client, self._node = None, Node(node_id=0)

    def _open_client(self) -> FleetHttpClient:
        certificate = self.connection.ca_certificate
        try:
            return FleetHttpClient.from_server_address(
                self.connection.address,
                certificate is None,
                certificate.encode() if certificate else None,
                interceptors=[
                    _VersionInterceptor(),
                    NodeAuthHttpInterceptor(self._key, self._key.public_key()),
                ],
            )
        except (ssl.SSLError, UnicodeError):
            raise RecipeError(
                "the coordinator's CA certificate is not a certificate in PEM; ask for the "
                "invite again"
            ) from None

    def _register(self, public_key: bytes) -> None:
        client = self._opened()
        try:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key))
        except httpx.HTTPStatusError as error:
            known = (
                ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE,
                ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
            )
            if _code(error) not in known:
                raise self._explain(error) from None
        except (httpx.HTTPError, ValueError) as error:
            raise self._explain(error) from None

    def _end_earlier(self) -> None:
        """Deactivate the node for a process of ours that was killed, or lost its line."""
        with suppress(OSError, ValueError, KeyError, TypeError, httpx.HTTPError):
            node_id = int(json.loads(self._node_path.read_bytes())["node_id"])
            self._opened().DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def _beat(self, stop: threading.Event) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        client = self._opened()
        while not stop.wait(_BEAT_EVERY_S):
            try:
                if not client.SendNodeHeartbeat(request).success:
                    self.is_disowned = True
            except httpx.HTTPStatusError as error:
                self.is_disowned |= error.response.status_code == httpx.codes.UNAUTHORIZED
            except (httpx.HTTPError, ValueError, RuntimeError):
                continue  # the calls of the main loop notice and explain it

    # --- messages ---------------------------------------------------------------------------

    def receive(self) -> tuple[Message, ObjectTree] | None:
        """Return the next message without its content, and what its content consists of."""
        request = PullMessagesRequest(node=self._node)
        response = self._call(self._opened().PullMessages, request)
        if not response.messages_list:
            return None
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]

    def bundle_of(self, run_id: int) -> str:
        """Return the hash of a run's app bundle, which is all that is asked of it."""
        request = GetRunRequest(node=self._node, run_id=run_id)
        return str(self._call(self._opened().GetRun, request).run.fab_hash)

    def fetch(self, message: Message, tree: ObjectTree) -> RecordDict:
        """Fetch a message's content.

        Raises:
            UpdateError: it is malformed or too large.
        """
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        ids = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
        if len(ids) > _MAX_OBJECTS:
            raise UpdateError(f"a message consists of {len(ids)} objects, too many to accept")
        contents = self._pull_all(run_id, ids)
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message_id
        )
        self._call(self._opened().ConfirmMessageReceived, request)
        return put_together(message_id, contents, max_bytes=self.connection.max_parcel_bytes)

    def send(self, reply: Message) -> None:
        """Send a reply, its objects after it."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(bare)],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._call(self._opened().PushMessages, request)
        run_id, session, push = (
            reply.metadata.run_id,
            response.session_id,
            self._opened().PushObject,
        )

        def push_one(object_id: str) -> None:
            # Deflated here, a few at a time, so that the whole is not in memory twice.
            content = objects[object_id].deflate()
            stored = self._call(
                push,
                PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=session,
                ),
            ).stored
            if not stored:
                raise Unreachable("the coordinator did not store a part of an answer")

        _in_parallel(push_one, list(response.objects_to_push))

    def _pull_all(self, run_id: int, ids: list[str]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}

        def pull_one(object_id: str) -> None:
            request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            for _ in range(_PULL_TRIES):
                response = self._call(self._opened().PullObject, request)
                if not response.object_found:
                    break
                if response.object_available:
                    contents[object_id] = response.object_content
                    too_large = sum(map(len, contents.values()))
                    if too_large > 2 * self.connection.max_parcel_bytes:
                        raise UpdateError("a message is larger than this site accepts")
                    return
                if self._stop_beats.wait(_PULL_WAIT_S):
                    break
            raise Unreachable("a part of a message is not there")

        _in_parallel(pull_one, ids)
        return contents

    # --- failures ---------------------------------------------------------------------------

    def _opened(self) -> FleetHttpClient:
        if self._client is None:
            raise Unreachable("not connected")
        return self._client

    def _call(self, method: Callable[[Any], T], request: Any) -> T:
        try:
            return method(request)
        except (httpx.HTTPError, ValueError, RuntimeError) as error:
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> Exception:
        """Return what to raise: who it is that fails, and whether to try again."""
        address = self.connection.address
        if isinstance(error, httpx.HTTPStatusError):
            return self._explain_status(error)
        if (reason := _certificate_error(error)) is not None:
            return FederationError(
                f"the certificate of the coordinator at {address} is not accepted: {reason}; "
                "ask the coordinator for a new certificate or a new invite"
            )
        if isinstance(error, httpx.TransportError):
            return Unreachable(f"the coordinator at {address} does not answer ({error})")
        return Unreachable(f"what answers at {address} is not a coordinator ({error})")

    def _explain_status(self, error: httpx.HTTPStatusError) -> Exception:
        address, status = self.connection.address, error.response.status_code
        code = _code(error)
        if code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
            return FederationError(
                f"the coordinator at {address} runs another version of Flower: "
                f"{_detail(error)}; install the version that it names"
            )
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return NotAccepted(
                f"the coordinator at {address} does not accept this site's node key; it may not "
                "be registered there, or another process is connected with it"
            )
        if code in (ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, ApiErrorCode.FLEET_GET_RUN_FAILED):
            return RunOver()
        if status == httpx.codes.UNAUTHORIZED:
            self.is_disowned = True
            return NotAccepted(
                f"the coordinator at {address} does not know this site's node key, or the clocks "
                "differ by more than five minutes"
            )
        return Unreachable(f"the coordinator at {address} answered with status {status}")


class _VersionInterceptor:
    """Says which Flower we are, and logs, once, where the other side finds that unsuitable."""

    def __init__(self) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component("site").as_metadata())
        self._told = False

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        add_headers(context.request, self._headers)
        response: httpx.Response = call_next(context)
        said = response.headers.get(VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY)
        if said and not self._told:
            self._told = True
            logger.warning("the coordinator's Flower is another version: %s", said[:500])
        return response


def _in_parallel(function: Callable[[str], None], ids: list[str]) -> None:
    """Call a function for each id, a few at a time; the first error is raised."""
    with ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
        for batch in _batches(ids, 2 * _NUM_TRANSFERS):
            for done in [pool.submit(function, each) for each in batch]:
                done.result()


def _batches(ids: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _node_key(connection: Connection, folder: Path) -> ec.EllipticCurvePrivateKey:
    if connection.node_key is None:
        return open_node_key(folder / "node-key.pem")
    try:
        key = load_pem_private_key(connection.node_key.encode(), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RecipeError(
            "node_key is not accepted (expected an EC private key in PEM); ask for the invite again"
        )
    return key


def _code(error: httpx.HTTPStatusError) -> int | None:
    found = FlowerError.from_json(error.response.text)
    return found.code if found else None


def _detail(error: httpx.HTTPStatusError) -> str:
    found = FlowerError.from_json(error.response.text)
    said = f"{found.message} {found.public_details or ''}" if found else ""
    return "".join(each if each.isprintable() else " " for each in said[:300]).strip()


def _certificate_error(error: BaseException | None) -> str | None:
    """Return why a certificate was not accepted, where that is what went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return str(error.verify_message or error.reason)
        if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
            return str(error).partition("CERTIFICATE_VERIFY_FAILED] ")[2].split(" (_ssl")[0]
        error = error.__cause__ or error.__context__
    return None
