"""What every runner writes down: each token, when it came, and the bytes read by then.

A runner is started as ``python run_X.py TASK`` with the task as JSON. It prints ``ready`` when
the model is loaded, and one line of JSON when all is done. Only the standard library is
imported here: it counts in the memory being measured.

Bytes are those that reached the device: ``read_bytes`` of /proc/PID/io for the process that
holds the model, and all reads of the block device, other processes' included, beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SECTOR_BYTES = 512
"""The unit of /sys/block/*/stat, whatever the device's own sector is."""
MIN_TOKENS = 3
"""Fewest tokens of a prompt, however long they take: two intervals."""


def read_task() -> dict[str, Any]:
    """Return what is to be measured: the one argument, JSON.

    Its fields: ``model`` (path), ``prompts`` (token ids of each), ``stop_ids``,
    ``max_tokens``, ``seconds_per_prompt``, ``threads``, ``memory_bytes`` (or null),
    ``started`` (time.monotonic() before the process), and ``options`` of the engine.
    """
    task: dict[str, Any] = json.loads(sys.argv[1])
    return task


class Recorder:
    """Collects the tokens of all prompts of one run."""

    def __init__(self, task: dict[str, Any], pid: int | None = None) -> None:
        """Watch the process ``pid``, this one where it is None."""
        self._task = task
        self._io = Path(f"/proc/{pid or 'self'}/io")
        self._device = _device_stat(Path(task["model"]))
        self._ready_s = time.monotonic() - task["started"]
        self._ready_bytes = self._read_bytes()
        print("ready", flush=True)
        self._prompts: list[dict[str, Any]] = []

    def record(self, tokens: Iterable[int], close: Callable[[], None] = lambda: None) -> None:
        """Take one prompt's tokens as they come, until one stops it or its time is over."""
        limit = self._task["max_tokens"]
        stop_ids = set(self._task["stop_ids"])
        request = time.monotonic()
        row: dict[str, Any] = {"ids": [], "seconds": [], "read_bytes": [], "device_bytes": []}
        row["before"] = {"read_bytes": self._read_bytes(), "device_bytes": self._device_bytes()}
        row["stopped_by"] = "end of stream"
        for token in tokens:
            row["ids"].append(int(token))
            row["seconds"].append(round(time.monotonic() - request, 5))
            row["read_bytes"].append(self._read_bytes())
            row["device_bytes"].append(self._device_bytes())
            num_tokens = len(row["ids"])
            is_late = row["seconds"][-1] > self._task["seconds_per_prompt"]
            if token in stop_ids:
                row["stopped_by"] = "stop token"
            elif num_tokens >= limit:
                row["stopped_by"] = "length"
            elif is_late and num_tokens >= MIN_TOKENS:
                row["stopped_by"] = "time"
            else:
                continue
            break
        close()
        row["started_s"] = round(request - self._task["started"], 4)
        self._prompts.append(row)

    def print(self, versions: dict[str, str], **statistics: Any) -> None:
        """Print the run as one line of JSON on standard output."""
        result = {
            "ready_s": round(self._ready_s, 4),
            "ready_read_bytes": self._ready_bytes,
            "prompts": self._prompts,
            "versions": versions,
            "statistics": statistics,
        }
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()

    def _read_bytes(self) -> int:
        try:
            fields = dict(line.split(": ") for line in self._io.read_text().splitlines())
        except OSError:  # no such accounting here, or the process is gone
            return 0
        return int(fields["read_bytes"])

    def _device_bytes(self) -> int:
        if self._device is None:
            return 0
        return int(self._device.read_text().split()[2]) * SECTOR_BYTES


def _device_stat(path: Path) -> Path | None:
    """Return the statistics file of the block device that holds a path, if it has one."""
    number = os.stat(path).st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return stat if stat.is_file() else None
