"""Downloads over HTTP that go on where they stopped, and the errors for when they cannot.

A file is received into ``NAME.part`` and checked against its published size and sha256
before it gets its name. Without a published sha256 nothing is continued, only begun again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from mutirao.artifact import sha256_of_file
from mutirao.console import download_progress
from mutirao.environment import cache_directory
from mutirao.errors import ChecksumError, NetworkError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BYTES = 1 << 18
RETRY_PAUSES_S = (0.5, 2.0, 5.0)
"""Pauses before the second, third and fourth try of a request; an assumption."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its index describes it."""

    name: str
    url: str
    sha256: str | None
    size_bytes: int | None


def download(client: httpx.Client, wheel: RemoteFile, part: Path, what: str) -> None:
    """Fill ``part`` with the wheel, going on where an earlier try stopped, and check it."""
    is_resumed = part.exists()
    with download_progress() as progress:
        task = progress.add_task(f"downloading {what}", total=wheel.size_bytes)

        def receive() -> None:
            _receive(client, wheel, part, lambda num: progress.update(task, completed=num))

        retried(what, receive)
        if is_resumed and not _is_wheel(part, wheel):
            logger.warning("the interrupted download of %s does not continue: begun again", what)
            part.unlink()
            retried(what, receive)
    if not _is_wheel(part, wheel):
        sha256 = sha256_of_file(part)
        part.unlink()
        raise ChecksumError(
            f"{wheel.name} came with sha256 {sha256} (its index says {wheel.sha256}); it was "
            "removed: run the same command again, and if it persists do not trust this index"
        )


def _is_wheel(part: Path, wheel: RemoteFile) -> bool:
    return wheel.sha256 is None or sha256_of_file(part) == wheel.sha256


def _receive(
    client: httpx.Client, wheel: RemoteFile, part: Path, report: Callable[[int], object]
) -> None:
    """Receive what is missing of a file.

    Raises:
        httpx.TransportError: the connection broke, or ended before the published size.
    """
    have = part.stat().st_size if part.exists() else 0
    if wheel.size_bytes is not None and have == wheel.size_bytes:
        return
    if wheel.sha256 is None or have > (wheel.size_bytes or have):
        have = 0  # without a hash, or with too much, nothing can be trusted to continue
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", wheel.url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            raise httpx.RemoteProtocolError("the server cannot continue the download")
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            have = 0
        _require_room(part, (wheel.size_bytes or have) - have)
        with part.open("ab" if have else "wb") as file:
            # As it comes: pieces of a fixed size would be lost with the connection.
            for chunk in response.iter_raw():
                file.write(chunk)
                have += len(chunk)
                report(have)
            file.flush()
            os.fsync(file.fileno())
    if wheel.size_bytes is not None and have != wheel.size_bytes:
        if have > wheel.size_bytes:
            part.unlink()
        raise httpx.RemoteProtocolError(f"{have} bytes came, {wheel.size_bytes} were announced")


def _require_room(path: Path, num_bytes: int) -> None:
    if shutil.disk_usage(path.parent).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def retried(what: str, action: Callable[[], T]) -> T:
    """Try an HTTP action, and again after a pause where trying again can help."""
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            return action()
        except httpx.UnsupportedProtocol:
            raise
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            reason = f"{error.request.url.host} answered {status}"
            is_passing = status >= 500 or status in (408, 429)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            is_passing = True
        if pause_s is None or not is_passing:
            raise unreachable(what, reason)
        logger.info("%s: %s; trying again in %s s", what, reason, pause_s)
        time.sleep(pause_s)
    raise AssertionError("unreachable")


def unreachable(what: str, reason: str) -> NetworkError:
    """Return the error for what is neither here nor to be had, with the ways to go on."""
    return NetworkError(
        f"{what} is not in the cache and could not be downloaded ({reason}); connect and run "
        f"the same command again, or copy {cache_directory()} from a machine where it ran, or "
        "name a file or folder of your own"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache; another process that wants it waits its turn."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is fetching into %s: waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
