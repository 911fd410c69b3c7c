"""A site's worker in a process of its own: parcels go in and out through pipes.

The process that carries parcels stays small, for it never imports PyTorch, and lives on when the
worker dies, of too little memory for instance: the worker is then started anew and asked again,
and its journal keeps it from doing anything twice. A worker ends when its parent does.

On the pipes a parcel is its length, 8 bytes little-endian, and its bytes. The worker's own
standard output is not the pipe: whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from mutirao.config import load_json
from mutirao.errors import FederationError, UpdateError
from mutirao.federated.plan import Site

MAX_DEATHS = 3
"""Deaths over one request after which it is given up."""
MAX_PARCEL_BYTES = 2**40
"""A length beyond it is no length: something else wrote to the pipe."""
CACHE_VARIABLES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Kernels that PyTorch's oneDNN keeps, each of a length of text; the user's own values win. With
its default of 1,024 a worker of 135 million parameters held 300 MB more, and was no faster."""
_LENGTH = struct.Struct("<Q")
_WATCH_INTERVAL_S = 1.0
_PIECE_BYTES = 2**20


class WorkerProcess:
    """One site's worker, started when first asked.

    Args:
        site: who and where; written to a file in its work folder for the worker to read.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def answer(self, parcel: bytes) -> bytes:
        """Have the worker answer a request; both are ``Parcel.to_bytes``.

        Raises:
            UpdateError: the request is no parcel.
            FederationError: the worker died ``MAX_DEATHS`` times over it.
        """
        with self._lock:
            code: int | None = None
            for _ in range(MAX_DEATHS):
                process = self._process or self._start()
                try:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    _write(process.stdin, parcel)
                    answer = _read(process.stdout)
                except (OSError, EOFError):
                    code = self._end()
                    continue
                if not answer:
                    raise UpdateError("a request came that is no parcel")
                return answer
            raise FederationError(
                f"the worker of site {self.site.name} died {MAX_DEATHS} times over one request "
                f"(the last time with {describe_exit(code)}); see its standard error, and whether "
                "memory is enough"
            )

    def progress(self) -> dict[str, Any]:
        """Return how far the round has come: 'round' and 'num_tokens'; empty before the first."""
        try:
            progress = json.loads((self.site.work / "progress.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return progress if isinstance(progress, dict) else {}

    def close(self) -> None:
        """End the worker at once; nothing that it has answered is lost."""
        process = self._process  # not under the lock: it may be at work on a request
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        self.site.work.mkdir(parents=True, exist_ok=True)
        path = self.site.work / "site.json"
        path.write_text(self.site.model_dump_json())
        # The parent's id, so that a worker whose parent died before it asked the kernel ends, too.
        command = [sys.executable, "-m", __name__, str(path), str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        return self._process

    def _end(self) -> int | None:
        """End the process if there is one, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was still to be written has no reader
        return code


def describe_exit(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is not None and code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _write(pipe: IO[bytes], parcel: bytes) -> None:
    pipe.write(_LENGTH.pack(len(parcel)))
    pipe.write(parcel)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """Return the next parcel.

    Raises:
        EOFError: the other side is gone, or wrote something else.
    """
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    if length > MAX_PARCEL_BYTES:
        raise EOFError
    return _read_exactly(pipe, length)


def _read_exactly(pipe: IO[bytes], num_bytes: int) -> bytes:
    parts, left = [], num_bytes
    while left:
        part = pipe.read(min(left, _PIECE_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent has ended, whatever it is doing then.

    Not left to the kernel (PR_SET_PDEATHSIG): that takes the end of the thread that started
    this process for the end of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGKILL)  # no hook may hold it up; the journal is sound

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Return standard input and output; for all others they become nothing, and standard error."""
    taken = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return taken


def main(site_path: Path, parent: int) -> None:
    """Answer parcels from standard input on standard output until it ends."""
    end_with_parent(parent)
    requests, answers = take_pipes()
    from mutirao.environment import release_memory, silence

    silence()
    for name, value in CACHE_VARIABLES.items():
        os.environ.setdefault(name, value)
    from mutirao.federated.parcel import Parcel
    from mutirao.federated.site.worker import SiteWorker

    worker = SiteWorker(load_json(Site, site_path))
    while True:
        try:
            request = _read(requests)
        except EOFError:
            return
        try:
            answer = worker.answer(Parcel.from_bytes(request)).to_bytes()
        except UpdateError:  # whoever sent it knows nothing of this site's key or run
            answer = b""
        _write(answers, answer)
        del request, answer
        release_memory()  # it waits now, while others of this machine may train


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
