"""Measure in a few seconds what the cost model needs: the disk, the kernels, the barriers.

Everything is timed in rounds, one after the other through all cases, so that a disturbance
falls on all alike. Of the disk medians are kept; of the kernels, which others can only slow
down, the lower quartile; of both, how far the rounds lay apart. The result is kept in the
cache, for this machine, this disk and these kernels, until it is a month old or a new one is
asked for. Needs neither a framework nor root.

Left out: disks that remember what they read (a virtual machine's often does, and is slower the
first time), and what others do on the machine at the same time.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import itertools
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.console import console
from mutirao.environment import cache_directory
from mutirao.errors import DiskFullError, FormatError, InferenceError, InputError
from mutirao.inference.native.build import source_hash
from mutirao.inference.native.library import ProbeMatrix, load_library
from mutirao.inference.planning.machine import (
    PRODUCT_TOKENS,
    DiskSpeed,
    Machine,
    ProductSpeed,
    merged_widths,
)
from mutirao.inference.store.plane_formats import FORMATS, PANEL_ROWS, Format

MAX_AGE_DAYS = 30
DISTURBED_SPREAD = 0.3
DISTURBED_SHARE = 0.1
"""A probe whose rounds lie further apart, or that waited for the processor for a larger part of
its time, was disturbed, and is good for a day only."""
ROUNDS = 5
SHORT_REPETITIONS = 20
"""Of what takes less than a millisecond."""
MAX_SECONDS = 5.0
"""Of the kernels, and of the disk: after that no new round is begun."""

CHUNK_BYTES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
NUM_READERS = (1, 4, 8)
READ_SLICE_S = 0.04
"""Of reading in one way, in one round: some tens of MB of a fast disk."""
FILE_BYTES = 1 << 28
"""A file to read: larger than what disks keep in their own memory (assumption)."""

MATRIX_BYTES = 48 << 20
"""A matrix: larger than the caches of most machines; more where they say theirs is larger."""
MAX_MATRIX_BYTES = 192 << 20
KV_BYTES = 512 << 10
"""Keys and values that a core's cache holds (assumption)."""
MATRIX_COLUMNS = 4096
PRODUCT_S = 0.03
"""No product takes much longer: the matrix is smaller where there are many tokens."""
FILL = 0x2C
"""Bytes of the matrices: 0.066 as float16, so that no number is denormal or infinite."""

_SCALES_KINDS = {"": 0, "H": 1, "HM": 2, "K6": 3, "K8": 4, "E": 5}
_FLOAT_KINDS = {"F32": 1, "F16": 2, "BF16": 3}
_DRAFTED = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16_SPLIT")
"""Formats that are timed in all arrangements, one for each number of bits."""


def probe(directory: Path, num_threads: int | None = None, *, refresh: bool = False) -> Machine:
    """Return what this machine can do: from the cache, or measured now (some seconds).

    Args:
        directory: of the disk that weights are read from; need not exist yet.
        num_threads: to compute with; None: one for each core.
        refresh: measure, whatever the cache holds.

    Raises:
        MissingKernelError: there is no native library.
        DiskFullError: no room for the file to read.
        InputError: the directory cannot be written, and has no large file to read.
    """
    while not directory.exists():
        directory = directory.parent
    num_cores = len(os.sched_getaffinity(0))
    num_threads = num_threads or num_cores
    kernels = str(load_library().engine_best_kernels().decode())
    status = os.stat(directory)
    disk = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    identity = (platform.node(), _processor(), num_cores, num_threads, kernels, disk, source_hash())
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    path = cache_directory() / "probes" / f"{key}.json"
    if not refresh and (known := _read_cached(path)):
        return known
    console.print("probing the disk and the kernels (some seconds)", style="dim")
    machine = measure(directory, num_threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(machine.to_json())
    os.replace(file.name, path)
    return machine


def measure(directory: Path, num_threads: int) -> Machine:
    """Measure now; see ``probe`` for arguments and errors."""
    status = os.stat(directory)
    kernels = str(load_library().engine_best_kernels().decode())
    with _file_to_read(directory) as path:
        direct = _has_direct(path)
        reads, read_cpu_s_per_byte = _measure_disk(path, direct)
    waited_s, started_s = _waited_s(), time.perf_counter()
    products = _measure_products(kernels, num_threads)
    attention_s, cache_s = _measure_attention(kernels, num_threads)
    rows = [_measure_rows(kernels, row_op) for row_op in range(3)]
    return Machine(
        host=platform.node(),
        processor=_processor(),
        num_cores=len(os.sched_getaffinity(0)),
        num_threads=num_threads,
        kernels=kernels,
        disk=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        measured_on=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        waited_share=(_waited_s() - waited_s) / (time.perf_counter() - started_s),
        direct=direct,
        reads=reads,
        read_cpu_s_per_byte=read_cpu_s_per_byte,
        products=products,
        attention_s_per_value=attention_s,
        cache_s_per_value=cache_s,
        norm_s_per_value=rows[0],
        activation_s_per_value=rows[1],
        quantize_s_per_value=rows[2],
        loop_s=_measure_loop(num_threads),
        choice_s_per_logit=_measure_logits(lambda row: int(row.copy().argmax())),
        confidence_s_per_logit=_measure_logits(lambda row: float(np.exp(row - row[0]).sum())),
    )


def is_disturbed(machine: Machine) -> bool:
    """Whether a probe's figures may be far off, because others were at work."""
    return machine.spread > DISTURBED_SPREAD or machine.waited_share > DISTURBED_SHARE


def _read_cached(path: Path) -> Machine | None:
    if not path.is_file():
        return None
    try:
        machine = Machine.from_json(path.read_text(encoding="utf-8"))
        age = datetime.datetime.now(tz=datetime.UTC).date() - datetime.date.fromisoformat(
            machine.measured_on
        )
    except (FormatError, ValueError, OSError):
        return None  # of an older version, or damaged: measured again
    most = 0 if is_disturbed(machine) else MAX_AGE_DAYS
    return machine if 0 <= age.days <= most else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


# ---- The disk -----------------------------------------------------------------------------------


@contextmanager
def _file_to_read(directory: Path) -> Iterator[Path]:
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


def _has_direct(path: Path) -> bool:
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


def _measure_disk(path: Path, direct: bool) -> tuple[tuple[DiskSpeed, ...], float]:
    """Read in all ways, round by round; also the processor time per byte, of large chunks."""
    ways = list(itertools.product(CHUNK_BYTES, NUM_READERS))
    speeds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    costs, buffers = [], _buffers()
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
                if chunk_bytes >= 1 << 20:
                    costs.append((time.process_time() - busy_s) / num_bytes)
            if time.perf_counter() - started_s > MAX_SECONDS:
                break
    reads = tuple(DiskSpeed(*way, *_median_and_spread(speeds[way])) for way in ways)
    return reads, statistics.median(costs)


def _buffers() -> list[memoryview]:
    """Return aligned memory for each reader, touched: the first touch of a page costs time."""
    buffers = [memoryview(mmap.mmap(-1, CHUNK_BYTES[-1])) for _ in range(NUM_READERS[-1])]
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


# ---- The kernels --------------------------------------------------------------------------------


def arrangements(form: Format) -> list[tuple[int, ...]]:
    """Return the widths in which a matrix's planes may be multiplied; the whole, merged, first.

    With the first ``n`` planes resident, drafts multiply those, merged; full passes multiply
    those and the streamed ones.
    """
    if form.is_float:
        return [()]
    num_planes = len(form.plane_widths)
    found = [merged_widths(form, num_planes), form.plane_widths]
    for num in range(1, num_planes):
        resident = merged_widths(form, num)
        found += [resident, resident + form.plane_widths[num:]]
    return list(dict.fromkeys(found))


def _measure_products(kernels: str, num_threads: int) -> tuple[ProductSpeed, ...]:
    cases = [
        (form, widths)
        for form in FORMATS.values()
        for widths in arrangements(form)[: None if form.name in _DRAFTED else 1]
    ]
    buffer = np.full(_matrix_bytes(), FILL, np.uint8)
    times: dict[tuple[str, tuple[int, ...], int], list[float]] = {}
    estimates: dict[tuple[str, tuple[int, ...]], float] = {}
    started_s = time.perf_counter()
    for _ in range(ROUNDS):
        for form, widths in cases:
            for num_tokens in PRODUCT_TOKENS:
                most = PRODUCT_S / estimates.get((form.name, widths), 1e-12) / num_tokens
                cost = _time_product(kernels, num_threads, form, widths, num_tokens, buffer, most)
                if num_tokens == 1:
                    estimates[form.name, widths] = cost
                times.setdefault((form.name, widths, num_tokens), []).append(cost)
        if time.perf_counter() - started_s > MAX_SECONDS:
            break
    products = []
    for form, widths in cases:
        found = [times[form.name, widths, num] for num in PRODUCT_TOKENS]
        costs = tuple(map(_lower_quartile, found))
        spread = statistics.median(_median_and_spread(each)[1] for each in found)
        products.append(ProductSpeed(form.name, widths, costs, spread))
    return tuple(products)


def _time_product(
    kernels: str,
    num_threads: int,
    form: Format,
    widths: tuple[int, ...],
    num_tokens: int,
    buffer: NDArray[np.uint8],
    most_weights: float,
) -> float:
    """Return the seconds per weight of one product with a matrix of at most so many weights."""
    bits = sum(widths) if widths else form.bits
    panel_bytes = MATRIX_COLUMNS * PANEL_ROWS * bits // 8
    panel_bytes += MATRIX_COLUMNS // form.block_columns * form.scales_bytes
    per_panel = MATRIX_COLUMNS * PANEL_ROWS
    num_panels = max(min(buffer.nbytes // panel_bytes, int(most_weights / per_panel)), 2)
    matrix = ProbeMatrix(
        kind=_FLOAT_KINDS.get(form.name, 0),
        bits=form.bits,
        scales_kind=_SCALES_KINDS[form.scales],
        num_rows=num_panels * PANEL_ROWS,
        num_columns=MATRIX_COLUMNS,
        num_planes=max(len(widths), 1),
        whole_kind=_FLOAT_KINDS.get(form.split_from, 0) if sum(widths) > form.bits else 0,
        widths=(ctypes.c_int32 * 5)(*(widths or (form.bits,))),
    )
    seconds = _quick_s(
        load_library().probe_matmul,
        *(kernels.encode(), num_threads, ctypes.byref(matrix)),
        *(buffer.ctypes.data, buffer.nbytes, num_tokens),
        num=1,
    )
    return seconds / (num_panels * per_panel)


def _matrix_bytes() -> int:
    """Return the size of a matrix that no cache holds."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text(encoding="ascii")
        cache_bytes = int(text.strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        cache_bytes = 0
    return min(max(MATRIX_BYTES, cache_bytes * 3 // 2), MAX_MATRIX_BYTES)


def _waited_s() -> float:
    """Return how long this thread, one of those that compute, has waited for a processor."""
    try:
        text = Path("/proc/thread-self/schedstat").read_text(encoding="ascii")
        return int(text.split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0  # the kernel does not keep it


def _measure_attention(kernels: str, num_threads: int) -> tuple[float, float]:
    """Return the seconds per value of attention to keys in a cache, and what memory adds.

    As in the engine, keys and values lie in small pages, whose addresses are not at hand either.
    """
    num_bytes = _matrix_bytes()
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer[:] = FILL
    head_dim, times = 128, []
    for num_heads, used_bytes in ((4 * num_threads, KV_BYTES * num_threads), (64, num_bytes)):
        num_positions = used_bytes // (4 * head_dim * num_heads) // 16 * 16
        seconds = _quick_s(
            load_library().probe_attention,
            *(kernels.encode(), num_threads, num_heads, head_dim, num_positions),
            *(buffer.ctypes.data, buffer.nbytes),
        )
        times.append(seconds / (num_heads * head_dim * num_positions))
    cached, cold = times
    return cached, max(cold - cached, 0.0)


def _measure_rows(kernels: str, row_op: int) -> float:
    width, num_rows = 4096, 64
    rows = load_library().probe_rows
    return _quick_s(rows, kernels.encode(), 1, row_op, width, num_rows) / (width * num_rows)


def _measure_loop(num_threads: int) -> float:
    num_loops = 100
    return _quick_s(load_library().probe_barriers, num_threads, num_loops) / num_loops


def _measure_logits(function: Callable[[NDArray[np.float32]], object]) -> float:
    """Time what Python does with a row of logits, as in ``decoding``."""
    row, seconds = np.zeros(1 << 17, np.float32), []
    for _ in range(SHORT_REPETITIONS):
        begin_s = time.perf_counter()
        function(row)
        seconds.append(time.perf_counter() - begin_s)
    return _lower_quartile(seconds) / row.size


def _quick_s(
    function: Callable[..., int], *arguments: object, num: int = SHORT_REPETITIONS
) -> float:
    """Have a function of the library time itself some times; return the lower quartile."""
    seconds = (ctypes.c_double * num)()
    if function(*arguments, num, ctypes.byref(seconds)) != 0:
        raise InferenceError("no memory or no threads to probe the kernels with")
    return _lower_quartile(list(seconds))


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the range between the quartiles over it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / median
