"""Building a weight store: read by rows, packed by slabs, finished by one rename.

The store grows in a hidden folder beside its place, where a journal names every tensor that
is done, with its checksums; a killed build goes on behind the last of them, after reading
them again. Only a whole store, flushed to the disk, gets its name. Builders of one store
take turns.

Memory stays below 50 MB above what the imports take, whatever the matrices' sizes, but for
the tokenizer's conversion, which comes first. Measured with Qwen2.5-1.5B in Q4_K_M: 33 MB
after the imports, 43 MB at the peak of the weights, 156 MB at that of the tokenizer; 100 to
195 MB/s (2 cores shared with other work, 2026-11-22).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import ArtifactError, DiskFullError, FormatError, explain_disk_errors
from mutirao.formats.gguf_header import read_gguf_header
from mutirao.inference.store.plane_formats import split_format
from mutirao.inference.store.planes import PANEL_ROWS, pack, row_bytes
from mutirao.inference.store.source_fingerprint import fingerprint, is_same_source
from mutirao.inference.store.source_weights import SourceMatrix, SourceModel, open_source
from mutirao.inference.store.split_floats import SplitError
from mutirao.inference.store.store_index import (
    CHECKSUMS_NAME,
    INDEX_NAME,
    SLAB_PANELS,
    VERSION,
    WEIGHTS_NAME,
    Checksums,
    Extent,
    Layout,
    OtherVersionError,
    StoredTensor,
    StoreIndex,
    checksum,
    num_slabs,
    plan_layout,
    read_index,
    write_index,
)

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"
STEP_BYTES = 1 << 21
"""Bytes of a matrix that are read and packed at a time: large enough for the disk, small
enough for a core's cache (assumption)."""

Report = Callable[[int, int], object]


def build_store(source_path: Path, directory: Path, progress: Report | None) -> None:
    """Build the store of ``source_path`` at ``directory``; see ``WeightStore.build``."""
    directory = directory.resolve()
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _turn(directory):
            if _is_there(source_path, directory):  # another process may have built it meanwhile
                return
            try:
                with explain_disk_errors(directory):
                    _fill(source_path, partial, progress)
                    _put_in_place(partial, directory)
            except DiskFullError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ArtifactError(
            f"weight store {directory} cannot be written: {error.strerror}; name another folder "
            "with MUTIRAO_HOME"
        ) from error


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Hold a store's place while it is built; another process waits for it."""
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is building %s: waiting for it", directory)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_there(source_path: Path, directory: Path) -> bool:
    """Whether the store is whole and of this source; a foreign or damaged folder is refused."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        index = read_index(directory)
    except OtherVersionError:
        return False
    return is_same_source(index.source, source_path)


def _fill(source_path: Path, partial: Path, progress: Report | None) -> None:
    """Bring the folder ``partial`` to a whole store, from wherever it is."""
    source = fingerprint(source_path)
    with open_source(source_path) as model:
        formats = {n: split_format(m.format, m.num_columns) for n, m in model.matrices.items()}
        while True:
            layout = plan_layout(model.spec, formats)
            plan = hashlib.sha256(repr((VERSION, source, layout)).encode()).hexdigest()
            try:
                with _Journal(partial, plan, layout) as journal:
                    files = _write_tokenizer(source_path, partial)
                    what = f"building the weight store of {source_path.name}"
                    with _reported(progress, what) as report:
                        sums = _write_weights(model, layout, journal, report)
                break
            except SplitError:
                _leave_whole(model, formats)
    if not is_same_source(source, source_path):
        raise FormatError(f"{source_path} changed while it was read; run the same command again")
    content = sums.astype("<u8").tobytes()
    (partial / CHECKSUMS_NAME).write_bytes(content)
    files[CHECKSUMS_NAME] = hashlib.sha256(content).hexdigest()
    write_index(StoreIndex(source, model.spec, layout, files), partial / INDEX_NAME)


def _leave_whole(model: SourceModel, formats: dict[str, str]) -> None:
    """Give matrices of floats that cannot be split their own format; every matrix is tried."""
    for name, matrix in model.matrices.items():
        if formats[name] == matrix.format:
            continue
        step = _step_rows(row_bytes(matrix.format, matrix.num_columns))
        try:
            for begin in range(0, matrix.num_rows, step):
                end = min(begin + step, matrix.num_rows)
                raw = matrix.read_rows(begin, end)
                pack(raw, formats[name], end - begin, matrix.num_columns)
        except SplitError as error:
            logger.warning("%s is stored whole and cannot draft: %s", name, error)
            formats[name] = matrix.format


def _write_tokenizer(source_path: Path, partial: Path) -> dict[str, str]:
    """Write the tokenizer's files; return their sha256 by name."""
    from mutirao.inference.text.tokenizer_files import write_tokenizer

    metadata = None if source_path.is_dir() else read_gguf_header(source_path).metadata
    write_tokenizer(source_path, partial, metadata)
    ours = (WEIGHTS_NAME, CHECKSUMS_NAME, INDEX_NAME, JOURNAL_NAME)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(partial.iterdir())
        if path.name not in ours
    }


@contextmanager
def _reported(progress: Report | None, what: str) -> Iterator[Report]:
    """Yield what to tell of bytes done: the caller's function, or a bar on the console."""
    if progress is not None:
        yield progress
        return
    from mutirao.console import download_progress

    with download_progress() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Journal:
    """The unfinished ``weights.bin`` and the record of which tensors are in it."""

    def __init__(self, partial: Path, plan: str, layout: Layout) -> None:
        """Open the journal of this plan, or begin one and drop what another plan left."""
        self.done: dict[str, list[int]] = {}
        """Checksums of finished tensors, extent after extent, by store name."""
        self._path = partial / JOURNAL_NAME
        lines = self._read_lines()
        if lines[:1] != [{"plan": plan}]:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            lines = []
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.weights = os.open(partial / WEIGHTS_NAME, flags, 0o666)
        try:
            _reserve(self.weights, layout.weights_bytes)
            if not lines:
                self._append({"plan": plan})
            for line in lines[1:]:
                self._take(line, layout)
        except BaseException:
            os.close(self.weights)
            raise

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.weights)

    def add(self, name: str, sums: list[int]) -> None:
        """Record a finished tensor."""
        self.done[name] = sums
        self._append({"tensor": name, "checksums": sums})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read_lines(self) -> list[Any]:
        """Return the journal's lines up to the first that is cut."""
        lines = []
        try:
            for line in self._path.read_bytes().splitlines():
                lines.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return lines

    def _take(self, line: Any, layout: Layout) -> None:
        """Believe a line of the journal where the bytes that it tells of are there."""
        name = line.get("tensor") if isinstance(line, dict) else None
        if not isinstance(name, str) or name not in layout.tensors:
            return
        if line.get("checksums") == self._sums(layout.tensors[name]):
            self.done[name] = line["checksums"]

    def _sums(self, tensor: StoredTensor) -> list[int]:
        sums = []
        for extent in tensor.extents:
            slab_bytes = extent.num_bytes // tensor.num_panels * SLAB_PANELS
            for begin in range(0, extent.num_bytes, slab_bytes):
                size = min(slab_bytes, extent.num_bytes - begin)
                piece = os.pread(self.weights, size, extent.offset + begin)
                sums.append(checksum(np.frombuffer(piece, np.uint8)))
        return sums


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Take the room of a file at once, so that a full disk is told before the work.

    Raises:
        OSError: ENOSPC, no room.
    """
    os.ftruncate(descriptor, num_bytes)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (AttributeError, OSError) as error:  # not every system and file system has it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = os.fstatvfs(descriptor)
        if free.f_bavail * free.f_frsize < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _write_weights(
    model: SourceModel, layout: Layout, journal: _Journal, report: Report
) -> Checksums:
    """Write vectors and all matrices that the journal lacks; return every checksum."""
    total = sum(tensor.num_bytes for tensor in layout.tensors.values())
    finished = 0
    report(0, total)
    sums = np.zeros(layout.num_checksums, np.uint64)
    sums[0] = _write_vectors(model, layout, journal.weights)
    for name, tensor in layout.tensors.items():
        if name not in journal.done:
            told = functools.partial(_tell, report, finished, total)
            journal.add(name, _write_matrix(model.matrices[name], tensor, journal.weights, told))
        finished += tensor.num_bytes
        report(finished, total)
        first = tensor.extents[0].checksums
        sums[first : first + len(journal.done[name])] = journal.done[name]
    return sums


def _tell(report: Report, before: int, total: int, num_bytes: int) -> None:
    report(before + num_bytes, total)


def _write_vectors(model: SourceModel, layout: Layout, descriptor: int) -> int:
    data = np.zeros(layout.vectors_extent.num_bytes, np.uint8)
    for name, (offset, size) in layout.vectors.items():
        data[offset : offset + 4 * size].view("<f4")[:] = model.vectors[name]
    _write(descriptor, data, layout.vectors_extent.offset)
    return checksum(data)


def _write_matrix(
    matrix: SourceMatrix, tensor: StoredTensor, descriptor: int, report: Callable[[int], object]
) -> list[int]:
    """Pack one matrix into its extents, some rows at a time; return its checksums."""
    slabs = num_slabs(tensor.num_panels)
    sums = [[0] * slabs for _ in tensor.extents]
    step = _step_rows(row_bytes(matrix.format, matrix.num_columns))
    for begin in range(0, tensor.num_rows, step):
        end = min(begin + step, tensor.num_rows)
        raw = matrix.read_rows(begin, end)
        scales, planes = pack(raw, tensor.format, end - begin, matrix.num_columns)
        parts = planes if tensor.scales is None else [scales, *planes]
        for extent, part, extent_sums in zip(tensor.extents, parts, sums, strict=True):
            _write_part(descriptor, extent, tensor, part.reshape(-1), begin, extent_sums)
        report(end * tensor.num_bytes // tensor.num_rows)
    return [each for extent_sums in sums for each in extent_sums]


def _step_rows(num_bytes: int) -> int:
    """Return rows per step: some whole slabs, or the largest part of one that is small enough."""
    slab_rows = SLAB_PANELS * PANEL_ROWS
    if num_bytes * slab_rows <= STEP_BYTES:
        return STEP_BYTES // (num_bytes * slab_rows) * slab_rows
    rows = slab_rows
    while rows > PANEL_ROWS and num_bytes * rows > STEP_BYTES:
        rows //= 2
    return rows


def _write_part(
    descriptor: int,
    extent: Extent,
    tensor: StoredTensor,
    part: NDArray[np.uint8],
    first_row: int,
    sums: list[int],
) -> None:
    """Write the panels that begin at a row into an extent and add to its checksums."""
    panel_bytes = extent.num_bytes // tensor.num_panels
    begin = first_row // PANEL_ROWS * panel_bytes
    _write(descriptor, part, extent.offset + begin)
    slab_bytes = panel_bytes * SLAB_PANELS
    for place in range(0, part.size, slab_bytes):
        slab, inside = divmod(begin + place, slab_bytes)
        piece = part[place : place + slab_bytes]
        sums[slab] = (sums[slab] + checksum(piece, inside // 8)) % (1 << 64)


def _write(descriptor: int, data: NDArray[np.uint8], offset: int) -> None:
    view = data.data
    while view:
        num = os.pwrite(descriptor, view, offset)
        view, offset = view[num:], offset + num


def _put_in_place(partial: Path, directory: Path) -> None:
    """Flush a whole store to the disk and give it its name, instead of an older one."""
    for path in (*partial.iterdir(), partial):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    aside = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        os.rename(directory, aside)
    os.rename(partial, directory)
    shutil.rmtree(aside, ignore_errors=True)
    (directory / JOURNAL_NAME).unlink(missing_ok=True)
