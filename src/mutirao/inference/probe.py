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

import datetime
import hashlib
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from mutirao.console import console
from mutirao.environment import cache_directory
from mutirao.errors import FormatError
from mutirao.inference.disk_probe import file_to_read, has_direct, measure_disk
from mutirao.inference.kernel_probe import (
    measure_attention,
    measure_logits,
    measure_loop,
    measure_products,
    measure_rows,
    waited_s,
)
from mutirao.inference.machine import Machine
from mutirao.inference.native.build import source_hash
from mutirao.inference.native.library import load_library

MAX_AGE_DAYS = 30
DISTURBED_SPREAD = 0.3
DISTURBED_SHARE = 0.1
"""A probe whose rounds lie further apart, or that waited for the processor for a larger part of
its time, was disturbed, and is good for a day only."""


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
    with file_to_read(directory) as path:
        direct = has_direct(path)
        reads, read_cpu_s_per_byte = measure_disk(path, direct)
    waited_before_s, started_s = waited_s(), time.perf_counter()
    products = measure_products(kernels, num_threads)
    attention_s, cache_s = measure_attention(kernels, num_threads)
    rows = [measure_rows(kernels, row_op) for row_op in range(3)]
    return Machine(
        host=platform.node(),
        processor=_processor(),
        num_cores=len(os.sched_getaffinity(0)),
        num_threads=num_threads,
        kernels=kernels,
        disk=f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        measured_on=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        waited_share=(waited_s() - waited_before_s) / (time.perf_counter() - started_s),
        direct=direct,
        reads=reads,
        read_cpu_s_per_byte=read_cpu_s_per_byte,
        products=products,
        attention_s_per_value=attention_s,
        cache_s_per_value=cache_s,
        norm_s_per_value=rows[0],
        activation_s_per_value=rows[1],
        quantize_s_per_value=rows[2],
        loop_s=measure_loop(num_threads),
        choice_s_per_logit=measure_logits(lambda row: int(row.copy().argmax())),
        confidence_s_per_logit=measure_logits(lambda row: float(np.exp(row - row[0]).sum())),
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
