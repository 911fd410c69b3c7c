"""Long-lived processes that are started again when they end, and never outlive their owner.

Each has a log of its own. What a process started itself is ended with it: by its session
where it stayed there, by the tree of processes otherwise.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

GRACE_S = 10.0
_LINES = 3


@dataclass
class Child:
    """One process, and what to call it in messages."""

    label: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def last_words(self) -> str:
        """Return the last line of its log, for messages."""
        with suppress(OSError):
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").split("\n")
            told = [line.strip() for line in lines[-50:] if line.strip()]
            return told[-1][:500] if told else ""
        return ""

    def kill(self) -> None:
        """End it at once, with all that it started."""
        stop([self], grace_s=0.0)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when its parent is killed (Linux only).

    Args:
        parent: its id, for the kernel says nothing of one that was dead before it was asked: then
            the signal comes at once.
        number: which signal.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def stop(children: Sequence[Child], *, grace_s: float = GRACE_S) -> None:
    """End processes and all that they started, the last first."""
    running = [each for each in reversed(children) if each.process is not None]
    descendants = [tree for each in running for tree in _descendants(each)]
    for each in running:
        _signal_session(each, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for each in running:
        assert each.process is not None
        with suppress(subprocess.TimeoutExpired):
            each.process.wait(max(0.0, deadline - time.monotonic()))
        _signal_session(each, signal.SIGKILL)
        each.process.wait()
    for process in descendants:  # those that left the session
        with suppress(psutil.Error):
            process.kill()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for by its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def describe_exit(code: int) -> str:
    """Return in words how a process ended."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _descendants(child: Child) -> list[psutil.Process]:
    assert child.process is not None
    with suppress(psutil.Error):
        found: list[psutil.Process] = psutil.Process(child.process.pid).children(recursive=True)
        return found
    return []


def _signal_session(each: Child, number: signal.Signals) -> None:
    assert each.process is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(each.process.pid, number)
