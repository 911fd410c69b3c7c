"""Flower's SuperLink with its doors shut: sites reach what is for sites, and nothing else.

A SuperLink serves three interfaces on one port. Through one of them anybody who reaches the
port can start a run, whose app the coordinator's machine then executes; through another,
take over a run's task. Flower protects them by accounts, which need a service of Flower's. So
one filter goes before all of it: what is not the Fleet interface (or the health check) is
answered only to this machine, and starting runs or registering nodes besides only to who
knows the secret of this run. Large bodies are refused before they are read, and few objects pass at
the same time, so that memory does not grow with the sites.

Runs as ``python -m mutirao.federated.flower.superlink``, with Flower's own arguments; the
secret comes in the environment, never on the command line.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mutirao.federated.flower.connection import SECRET_HEADER, SECRET_VARIABLE

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Chunks are 5 MB; the largest other object is a parcel's header, 4 MiB at most."""
PRAGMAS = (
    ("busy_timeout", "120000"),  # milliseconds; Flower's 5 s end in 'database is locked' under load
    ("journal_mode", "WAL"),
    ("synchronous", "OFF"),  # the database is thrown away when the SuperLink starts
    ("foreign_keys", "ON"),
    ("cache_size", "-2000"),  # kB, for each of up to 15 connections; Flower's 64 MB are 1 GB
    ("temp_store", "MEMORY"),
    ("mmap_size", "0"),
)
"""SQLite's settings in place of Flower's."""
MAX_TRANSFERS = 8
"""Objects that pass at the same time, whoever sends or fetches them: each lies in memory several
times over while it is taken apart, so that memory would else grow with the sites. The others wait
with their bodies unread. Four sites use as many (``fleet``)."""
_FOR_SITES = "/v1/fleet/"
_OBJECTS = ("/push-object", "/pull-object")
_CONTROL = "/v1/control/"


class Doors:
    """The filter, as an ASGI middleware."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()
        self._transfers = asyncio.Semaphore(MAX_TRANSFERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope)
        if refusal is None and scope["path"].endswith(_OBJECTS):
            async with self._transfers:
                await self._app(scope, receive, send)
        elif refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("", status_code=refusal)(scope, receive, send)

    def _refuse(self, scope: Scope) -> int | None:
        """Return the status of a refusal; None lets the request pass."""
        headers = dict(scope["headers"])
        path = scope["path"]
        if path.startswith(_FOR_SITES):
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411
            return 413 if int(length) > MAX_BODY_BYTES else None
        if not _is_local(scope):
            return 404
        if path.startswith(_CONTROL):
            given = headers.get(SECRET_HEADER.encode(), b"")
            return None if hmac.compare_digest(given, self._secret) else 404
        return None


def _is_local(scope: Scope) -> bool:
    client = scope.get("client")
    with suppress(ValueError):
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    return False


def main() -> None:
    """Start the SuperLink; returns when it ends."""
    from flwr.supercore import sql_mixin
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink

    secret = os.environ.pop(SECRET_VARIABLE)
    extensions.get_middleware = lambda: (Middleware(Doors, secret=secret),)
    sql_mixin.SQLITE_PRAGMAS = PRAGMAS
    flower_superlink()


if __name__ == "__main__":
    main()
