"""The machine under the benchmark: made cold and quiet before each run, and described.

The disk of a virtual machine is cached by its host, so that a first reading may be several
times slower than later ones; each run's file is read once past this machine's own cache
beforehand, which leaves the host's cache alike for everybody.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
CHUNK_BYTES = 1 << 22
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def make_cold(files: Iterable[Path]) -> bool:
    """Warm the host's cache with files, then empty this machine's own.

    Returns:
        Whether the page cache could be emptied (root only).
    """
    for file in files:
        _read_direct(file)
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def _read_direct(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without direct reading
        return
    try:
        with mmap.mmap(-1, CHUNK_BYTES) as buffer:
            while os.readv(descriptor, [buffer]) == CHUNK_BYTES:
                pass
    except OSError:
        return
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class CPUTimes:
    """Time of all cores since the machine began, in seconds."""

    busy_s: float
    """Working for anyone on this machine."""
    stolen_s: float
    """Ready to work, but the host gave the core to another machine."""
    waiting_s: float
    """Idle while a read was under way."""

    @classmethod
    def now(cls) -> CPUTimes:
        """Read the clocks."""
        line = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, _idle, waiting, irq, softirq, stolen = map(int, line[1:9])
        busy = user + nice + system + irq + softirq
        return cls(busy / TICKS_PER_S, stolen / TICKS_PER_S, waiting / TICKS_PER_S)


def wait_for_quiet(limit_s: float, most_busy: float = 0.1) -> float:
    """Wait until the cores are idle for two seconds, or the time is over.

    Returns:
        The share of the cores' time that others took in the last second.
    """
    deadline = time.monotonic() + limit_s
    cores = os.cpu_count() or 1
    num_quiet = 0
    while True:
        before = CPUTimes.now().busy_s
        time.sleep(1.0)
        share = (CPUTimes.now().busy_s - before) / cores
        num_quiet = num_quiet + 1 if share <= most_busy else 0
        if num_quiet >= 2 or time.monotonic() > deadline:
            return round(share, 3)


def describe_machine() -> dict[str, object]:
    """Return what a reader must know of the hardware and the system."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    flags = set(fields.get("flags", "").split())
    notable = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(notable)})"
