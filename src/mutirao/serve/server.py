"""The socket, the key, and the end of the server."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from mutirao.errors import InputError, PortInUseError
from mutirao.serve.app import create_app
from mutirao.serve.engine import TextEngine
from mutirao.serve.worker import Worker

KEY_VARIABLE = "MUTIRAO_API_KEY"
MIN_KEY_LENGTH = 16
"""Characters of a key that is given: fewer can be guessed."""
DEFAULT_MAX_WAITING = 8
MAX_CONNECTIONS = 64
"""Connections besides those that wait in line; uvicorn refuses more."""
GRACE_S = 10
"""Longest that an answer may take to end once the server was asked to; in whole seconds."""


class Server:
    """A model that is served; one at a time in a process."""

    def __init__(
        self,
        engine: TextEngine,
        listener: socket.socket,
        *,
        model: str,
        api_key: str,
        max_waiting: int = DEFAULT_MAX_WAITING,
    ) -> None:
        """Prepare to serve.

        Args:
            engine: what generates; used by one thread from now until ``run`` returns.
            listener: from ``listen``; closed at the end.
            model: name by which clients ask for the model.
            api_key: from ``find_key``.
            max_waiting: requests that may wait while one is answered.
        """
        self._listener = listener
        self._worker = Worker(engine, max_waiting=max_waiting)
        config = uvicorn.Config(
            create_app(self._worker, model=model, api_key=api_key),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=max_waiting + MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
        )
        self._uvicorn = _Uvicorn(config, self._worker)

    def run(self, on_start: Callable[[], None] = lambda: None) -> None:
        """Answer requests until ``stop`` or an interrupt; then end what is being generated.

        Args:
            on_start: called once requests are accepted.

        Raises:
            KeyboardInterrupt: the process was interrupted.
        """
        self._uvicorn.on_start = on_start
        try:
            self._uvicorn.run(sockets=[self._listener])
        finally:
            self._worker.close()
            self._listener.close()

    def stop(self) -> None:
        """Ask the server to end, from any thread."""
        self._worker.cancel_all()
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Ends generations when it is interrupted, instead of waiting for their last token."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self.on_start: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # This runs in the middle of anything, perhaps with the worker's lock held.
        asyncio.get_running_loop().call_soon_threadsafe(self._worker.cancel_all)
        super().handle_exit(sig, frame)


def listen(host: str, port: int, *, allow_remote: bool = False) -> socket.socket:
    """Bind the server's socket; it accepts nothing before ``Server.run``.

    Args:
        host: an address, or 'localhost'.
        port: 0 takes a free one.
        allow_remote: whether an address that other machines reach is accepted.

    Raises:
        InputError: the host is no address of this machine, or others would reach it.
        PortInUseError: the port is taken.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InputError(
            f"host={host!r} is not accepted (expected an IP address, such as 127.0.0.1)"
        ) from None
    if not address.is_loopback and not allow_remote:
        raise InputError(
            f"host={host} would be reached by other machines, over connections that are not "
            "encrypted; put a server with TLS before 127.0.0.1, or add --allow-remote"
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
    except (OSError, OverflowError) as error:
        listener.close()
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} is taken by another process; name another with --port, or 0 for any"
            ) from None
        raise InputError(f"{host}:{port} cannot be listened on: {error}") from None
    return listener


def find_key(path: Path | None = None) -> tuple[str, bool]:
    """Return the API key and whether it was made up now.

    Args:
        path: a file that holds the key. Without one, the key is taken from MUTIRAO_API_KEY, or
            else made up, to be shown once.

    Raises:
        InputError: the file cannot be read, or the key is too short or not plain ASCII.
    """
    if path is not None:
        try:
            return _checked_key(path.read_text(encoding="utf-8").strip(), str(path)), False
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the API key cannot be read from {path}: {error}") from None
    if given := os.environ.get(KEY_VARIABLE):
        return _checked_key(given.strip(), KEY_VARIABLE), False
    return secrets.token_urlsafe(32), True


def _checked_key(key: str, where: str) -> str:
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the API key in {where} is not accepted (expected at least {MIN_KEY_LENGTH} ASCII "
            "characters without spaces); leave it out to have one made up"
        )
    return key
