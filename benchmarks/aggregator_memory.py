"""Peak memory of several processes together, sampled while they work.

The sum of proportional set sizes (PSS) of the server's processes: what they share is counted
once, with what they share with others in part. Where the kernel has no smaps_rollup, resident
sets are summed instead, which counts shared pages several times; the record says which.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

EVERY_S = 0.2
LEAST_REST = 9
"""Times what a sample took: the kernel walks all pages of a process, which halts meanwhile."""


class MemorySampler:
    """Samples in a thread, from ``with`` on; sites' processes are left out by the caller."""

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        """Prepare it.

        Args:
            processes: gives the processes that count, anew for each sample.
        """
        self.peak_bytes = 0
        """Largest sum."""
        self.peak_anonymous_bytes = 0
        """Largest sum of what is no file's: without mapped files, which the kernel may drop."""
        self.peak_parts: dict[str, int] = {}
        """What each process had at the peak, by a short name."""
        self.num_samples = 0
        self.measure = "PSS" if Path("/proc/self/smaps_rollup").exists() else "RSS"
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            begin_s = time.monotonic()
            self._sample()
            took_s = time.monotonic() - begin_s
            self._stop.wait(max(EVERY_S - took_s, LEAST_REST * took_s))

    def _sample(self) -> None:
        parts: dict[str, int] = {}
        anonymous = 0
        for process in self._processes():
            try:
                whole, own = self._measure(process)
                label = f"{_label(process.cmdline())} {process.pid}"
            except (psutil.Error, OSError):  # it has just ended
                continue
            parts[label] = whole
            anonymous += own
        self.num_samples += 1
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
        if (total := sum(parts.values())) > self.peak_bytes:
            self.peak_bytes, self.peak_parts = total, parts

    def _measure(self, process: psutil.Process) -> tuple[int, int]:
        """Return the bytes of a process, and those of them that are no file's."""
        if self.measure == "RSS":
            info = process.memory_info()
            return int(info.rss), int(info.rss - getattr(info, "shared", 0))
        fields = {}
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            fields[name] = 1024 * int(value.split()[0])
        return fields["Pss"], fields["Pss_Anon"]


def tree_of(pids: list[int], leave_out: str | None = None) -> list[psutil.Process]:
    """Return processes with all their descendants.

    Args:
        pids: of the first.
        leave_out: processes whose command line has this text are left out, with all below.
    """
    found: dict[int, psutil.Process] = {}
    queue = []
    for pid in pids:
        try:
            queue.append(psutil.Process(pid))
        except psutil.Error:
            continue
    while queue:
        process = queue.pop()
        try:
            if leave_out is not None and leave_out in " ".join(process.cmdline()):
                continue
            queue += process.children()
        except psutil.Error:
            continue
        found[process.pid] = process
    return list(found.values())


def _label(command: list[str]) -> str:
    """Return a short name of a process: its program without path, or its module."""
    words = [word.rpartition("/")[2] for word in command if not word.startswith("-")]
    names = [word for word in words[:3] if not word.startswith("python")]
    return names[0] if names else "python"
