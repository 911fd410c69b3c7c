"""What the coordinator asks of its own SuperLink: register nodes, start a run, stop it.

The same calls as Flower's ``flwr run`` and ``flwr supernode register``, without their process
and their configuration files, and with the secret that ``superlink`` wants.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from mutirao.errors import FederationError
from mutirao.federated.flower.bundle import build_bundle, bundle_sha256
from mutirao.federated.flower.connection import SECRET_HEADER


class Control:
    """A line to the SuperLink's Control interface; to be used with ``with``."""

    def __init__(self, address: str, secret: str, ca: Path | None = None) -> None:
        certificate = ca.read_bytes() if ca else None
        self._client = ControlHttpClient.from_server_address(
            address, ca is None, certificate, interceptors=[_Headers(secret)]
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def register_nodes(self, public_keys: Iterable[bytes]) -> None:
        """Register the keys of nodes; those that are registered already are left as they are."""
        for key in public_keys:
            try:
                self._client.RegisterNode(RegisterNodeRequest(public_key=key))
            except (httpx.HTTPError, ValueError) as error:
                if _code(error) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise _explain("register a node", error) from None

    def start_run(self) -> int:
        """Start a run of our bundle, and return its number."""
        fab = Fab(hash_str=bundle_sha256(), content=build_bundle())
        try:
            response = self._client.StartRun(StartRunRequest(fab=fab))
        except (httpx.HTTPError, ValueError) as error:
            raise _explain("start a run", error) from None
        if not response.HasField("run_id"):
            raise FederationError("Flower did not accept the run, and did not say why")
        return int(response.run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a run and drop its messages; one that has ended already is left as it is."""
        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except (httpx.HTTPError, ValueError) as error:
            if _code(error) not in (
                ApiErrorCode.RUN_ALREADY_FINISHED,
                ApiErrorCode.RUN_ID_NOT_FOUND,
            ):
                raise _explain("stop a run", error) from None


class _Headers:
    def __init__(self, secret: str) -> None:
        version = RuntimeVersionMetadata.from_local_component("coordinator")
        self._headers = {**dict(version.as_metadata()), SECRET_HEADER: secret}

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        add_headers(context.request, self._headers)
        response: httpx.Response = call_next(context)
        return response


def _code(error: Exception) -> int | None:
    if not isinstance(error, httpx.HTTPStatusError):
        return None
    found = FlowerError.from_json(error.response.text)
    return found.code if found else None


def _explain(what: str, error: Exception) -> FederationError:
    said = str(error)
    if isinstance(error, httpx.HTTPStatusError):
        found = FlowerError.from_json(error.response.text)
        said = found.message if found else f"status {error.response.status_code}"
    return FederationError(f"the SuperLink did not {what}: {said}")
