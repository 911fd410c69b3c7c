"""A memory limit of the kernel's around one process: a control group made for one run.

Version 1 (what the figures in docs/benchmarks were taken with) and version 2; needs root.
The page cache that a process fills counts in its limit, as it must: that is how a machine
with so much memory behaves. Swap is not given.

References:
    Linux kernel, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NAME = "mutirao-bench"


class MemoryLimit:
    """A control group; ``close`` removes it."""

    def __init__(self, limit_bytes: int | None, root: Path = ROOT) -> None:
        """Make the group.

        Args:
            limit_bytes: of memory, page cache included; None: counted, not limited.
            root: where control groups are mounted.

        Raises:
            OSError: not allowed, or no memory control here.
        """
        self.is_v1 = (root / "memory" / "memory.limit_in_bytes").exists()
        self.path = root / ("memory" if self.is_v1 else "") / f"{NAME}-{os.getpid()}"
        if not self.is_v1:
            with suppress(OSError):  # it may be on already
                (root / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        try:
            self._limit(limit_bytes)
        except OSError:
            self.close()
            raise

    def _limit(self, limit_bytes: int | None) -> None:
        if self.is_v1:
            value = "-1" if limit_bytes is None else str(limit_bytes)
            self._write("memory.limit_in_bytes", value)
            self._write("memory.swappiness", "0")
            if (self.path / "memory.memsw.limit_in_bytes").exists():
                with suppress(OSError):  # the kernel may not count swap
                    self._write("memory.memsw.limit_in_bytes", value)
        else:
            self._write("memory.max", "max" if limit_bytes is None else str(limit_bytes))
            with suppress(OSError):
                self._write("memory.swap.max", "0")

    @property
    def procs(self) -> Path:
        """The file that takes the id of a process to be put under the limit."""
        return self.path / "cgroup.procs"

    def peak_bytes(self) -> int | None:
        """Most memory used so far, page cache included; None where the kernel does not say."""
        with suppress(OSError):
            return int(self._read("memory.max_usage_in_bytes" if self.is_v1 else "memory.peak"))
        return None

    def num_oom_kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        text = self._read("memory.oom_control" if self.is_v1 else "memory.events")
        fields = dict(line.split() for line in text.splitlines())
        return int(fields.get("oom_kill", 0))

    def close(self) -> None:
        """Drop the group's page cache and remove it."""
        with suppress(OSError):
            self._write("memory.force_empty", "0")
        for _ in range(50):  # a process that has just ended is still counted for a moment
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)
            else:
                return

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: str) -> None:
        (self.path / name).write_text(value)


def can_limit() -> str | None:
    """Return why no memory limit can be made here, None where one can."""
    try:
        limit = MemoryLimit(1 << 30)
        limit.close()
    except OSError as error:
        return f"no control group for memory can be made here ({error})"
    return None
