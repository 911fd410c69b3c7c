"""Time reading a disk: by the size of a read, and by how many are under way at a time.

An existing large file is read where there is one, else a temporary one; past the page cache
where the file system allows it. Part of the probe.
"""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mutirao.errors import DiskFullError, InferenceError, InputError
from mutirao.inference.machine import DiskSpeed
from mutirao.inference.timing import MAX_SECONDS, ROUNDS, median_and_spread, room_bytes

CHUNK_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
NUM_READERS = (1, 4, 8)
READ_SLICE_S = 0.04
"""Of reading in one way, in one round: some tens of MB of a fast disk."""
FILE_BYTES = 1 << 28
"""A file to read: larger than what disks keep in their own memory (assumption)."""


@contextmanager
def file_to_read(directory: Path) -> Iterator[Path]:
    """Give the largest file there, or a temporary one where none is large enough."""
    candidates = [path for pattern in ("*", "*/*") for path in directory.glob(pattern)]
    sizes = {path: _readable_bytes(path, directory) for path in candidates}
    if sizes and max(sizes.values()) >= FILE_BYTES:
        yield max(sizes, key=lambda path: sizes[path])
        return
    free = shutil.disk_usage(directory).free
    if free < 2 * FILE_BYTES:
        raise DiskFullError(
            f"the disk of {directory} has {free / 1e6:.0f} MB free, and to probe it a file of "
            f"{FILE_BYTES / 1e6:.0f} MB is written there for some seconds (expected twice as "
            "much free); free some space, or name another disk with MUTIRAO_HOME"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".mutirao-probe-") as file:
            block = os.urandom(1 << 20)
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except PermissionError:
        raise InputError(
            f"{directory} cannot be written, and holds no file large enough to probe its disk "
            "with; name another folder with MUTIRAO_HOME"
        ) from None


def _readable_bytes(path: Path, directory: Path) -> int:
    try:
        status = path.lstat()
        same_disk = status.st_dev == directory.stat().st_dev
        is_file = path.is_file() and not path.is_symlink()
        return status.st_size if is_file and same_disk and os.access(path, os.R_OK) else 0
    except OSError:
        return 0


def has_direct(path: Path) -> bool:
    """Whether the file can be read past the page cache."""
    try:
        with _opened(path, direct=True) as file, mmap.mmap(-1, CHUNK_BYTES[0]) as buffer:
            return os.preadv(file, [buffer], 0) > 0
    except OSError:
        return False


@contextmanager
def _opened(path: Path, *, direct: bool) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        yield file
    finally:
        os.close(file)


def measure_disk(path: Path, direct: bool) -> tuple[tuple[DiskSpeed, ...], float]:
    """Read in all ways, round by round; also the processor time per byte, of large chunks."""
    most_bytes = max(room_bytes() // NUM_READERS[-1], CHUNK_BYTES[0])
    ways = list(itertools.product((c for c in CHUNK_BYTES if c <= most_bytes), NUM_READERS))
    speeds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    costs, buffers = [], _buffers(ways[-1][0])
    with _opened(path, direct=direct) as file:
        size, offset = os.fstat(file).st_size, 0
        started_s = time.perf_counter()
        for _ in range(ROUNDS):
            for chunk_bytes, num_readers in ways:
                if not direct:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                views = [buffer[:chunk_bytes] for buffer in buffers[:num_readers]]
                busy_s = time.process_time()
                num_bytes, seconds = _read_for(file, size, offset, views)
                speeds[chunk_bytes, num_readers].append(num_bytes / seconds)
                offset += num_bytes
                if chunk_bytes == ways[-1][0]:
                    costs.append((time.process_time() - busy_s) / num_bytes)
            if time.perf_counter() - started_s > MAX_SECONDS:
                break
    reads = tuple(DiskSpeed(*way, *median_and_spread(speeds[way])) for way in ways)
    return reads, statistics.median(costs)


def _buffers(num_bytes: int) -> list[memoryview]:
    """Return aligned memory for each reader, touched: the first touch of a page costs time."""
    buffers = [memoryview(mmap.mmap(-1, num_bytes)) for _ in range(NUM_READERS[-1])]
    for buffer in buffers:
        np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 1
    return buffers


def _read_for(
    file: int, size: int, offset: int, buffers: Sequence[memoryview]
) -> tuple[int, float]:
    """Read one chunk after the other, over and over, for a slice of time; bytes and seconds."""
    chunk_bytes = len(buffers[0])
    num_chunks = size // chunk_bytes
    counter = itertools.count(offset // chunk_bytes)
    done: list[int] = []

    def read(buffer: memoryview) -> None:
        num_bytes = 0
        while num_bytes == 0 or time.perf_counter() < end_s:
            num_bytes += os.preadv(file, [buffer], next(counter) % num_chunks * chunk_bytes)
        done.append(num_bytes)

    threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    begin_s = time.perf_counter()
    end_s = begin_s + READ_SLICE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) < len(buffers) or not all(done):
        raise InferenceError(
            "the disk could not be read while it was probed; look at the system's log"
        )
    return sum(done), time.perf_counter() - begin_s
