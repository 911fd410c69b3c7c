"""What ``mutirao doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from mutirao import __version__
from mutirao.console import format_bytes, output
from mutirao.environment import cache_directory, home_directory

DISK_PROBE_BYTES = 64 * 1024 * 1024
REQUIRED = ("torch", "transformers", "peft", "flwr", "datatrove", "spacy", "rensa", "safetensors")
OPTIONAL = {"compressed-tensors": "transformers can open our compressed models too"}
MINIMUM_MEMORY_BYTES = 4_000_000_000
MINIMUM_DISK_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warning", "missing", "optional"]
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at the installation and at the machine; nothing is changed or sent."""
    return [
        Finding("mutirao", "ok", __version__),
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        *(_required(name) for name in REQUIRED),
        *(_optional(name, use) for name, use in OPTIONAL.items()),
        _accelerator(),
        _kernels(),
        _cores(),
        _memory(),
        _disk(),
        Finding("home", "ok", f"{home_directory()} (MUTIRAO_HOME)"),
        _cache(),
    ]


def print_findings(findings: list[Finding]) -> None:
    """Print a table of the findings."""
    from rich.table import Table

    marks = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "missing": "[red]✗[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row(
            marks.get(finding.status, "[dim]-[/]"), finding.name, finding.value, finding.advice
        )
    output.print(table)


def _required(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}")


def _optional(name: str, use: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "optional", f"not installed ({use})", "pip install 'mutirao[interop]'")


def _accelerator() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("accelerator", "warning", "unknown without torch")
    if torch.cuda.is_available():
        return Finding("accelerator", "ok", torch.cuda.get_device_name(0))
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("accelerator", "ok", f"none; the CPU is used ({capability})")


def _kernels() -> Finding:
    """Whether there are native kernels of the inference engine, or a compiler to make them."""
    from mutirao.inference.native.library import built_library

    if built_library():
        return Finding("kernels", "ok", "compiled")
    if shutil.which(os.environ.get("CC", "cc")):
        return Finding("kernels", "ok", "will be compiled when first wanted (half a minute)")
    advice = "install a C compiler (Debian: apt install gcc libc6-dev), or name one with CC"
    return Finding(
        "kernels", "warning", "none, and no C compiler: models run slowly, without --memory", advice
    )


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cores", "ok", str(usable))


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    value = f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"
    if memory.available < MINIMUM_MEMORY_BYTES:
        return Finding("memory", "warning", value, "the demonstration takes up to 4 GB")
    return Finding("memory", "ok", value)


def _disk() -> Finding:
    """Measure the disk that holds the home directory, by a write and a read past the cache."""
    folder = home_directory()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < MINIMUM_DISK_BYTES:
        advice = "the demonstration takes 2 GB; set MUTIRAO_HOME to a folder with more room"
        return Finding("disk", "warning", f"{format_bytes(free)} free", advice)
    try:
        write_per_s, read_per_s = _disk_speed(folder)
    except OSError as error:
        return Finding("disk", "warning", f"{folder} cannot be written: {error.strerror}")
    speed = f"writes {format_bytes(write_per_s)}/s, reads {format_bytes(read_per_s)}/s"
    return Finding("disk", "ok", f"{format_bytes(free)} free, {speed}")


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Return bytes per second of one write with flush, and of one read after dropping pages."""
    block = os.urandom(DISK_PROBE_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mutirao-probe-") as file:
        started = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        Path(file.name).read_bytes()
        read_s = time.perf_counter() - started
    return DISK_PROBE_BYTES / write_s, DISK_PROBE_BYTES / read_s


def _cache() -> Finding:
    folder = cache_directory()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Finding("cache", "ok", f"{format_bytes(size)} in {folder}; may be deleted at any time")
