"""How long a stage took, and how much memory all its processes used together.

Memory is the sum, over this process and all its descendants, of the proportional set size
(pages shared by several processes are counted once among them), sampled; where the system
does not tell it, the resident set size, which counts shared pages again and again.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

SAMPLE_S = 0.5


class Meter:
    """Measures the block it surrounds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._started = 0.0

    def __enter__(self) -> Meter:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._started

    def _sample(self) -> None:
        highest_resident = 0
        while True:
            # The proportional size costs 10 ms a process; it is asked for only when the
            # resident size, which is cheap, says that memory has grown.
            resident = tree_memory_bytes(proportional=False)
            if resident > 1.01 * highest_resident:
                highest_resident = resident
                self.peak_memory_bytes = max(self.peak_memory_bytes, tree_memory_bytes())
            if self._stopped.wait(SAMPLE_S):
                return


def tree_memory_bytes(*, proportional: bool = True) -> int:
    """Return the memory of this process and its descendants now, in bytes."""
    root = psutil.Process()
    processes = [root, *root.children(recursive=True)]
    return sum(_process_memory_bytes(each, proportional) for each in processes)


def _process_memory_bytes(process: psutil.Process, proportional: bool) -> int:
    try:
        if proportional and (pss := getattr(process.memory_full_info(), "pss", 0)):
            return int(pss)
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:  # it ended, or is a zombie without memory
        return 0
