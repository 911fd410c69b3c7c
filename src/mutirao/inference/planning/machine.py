"""What a machine does per second, as the probe measured it: data and the simplest sums over it.

``probe.probe`` fills a ``Machine`` in; the cost model reads it. It can be written down by hand
as well, to ask what a model would do on a machine that is not there. Memory is not part of it:
what is available changes from one minute to the next, and ``memory_limits`` asks anew.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from mutirao.errors import FormatError
from mutirao.inference.store.plane_formats import Format, find_format

VERSION = 2
PRODUCT_TOKENS = (1, 2, 4, 8, 16, 64)
"""Tokens in the products that are timed: the kernels' tiles, and a chunk of a prompt."""
LARGEST_TILE = 16


@dataclass(frozen=True)
class DiskSpeed:
    """Reading the disk in one way."""

    chunk_bytes: int
    """Of one read."""
    num_readers: int
    """Reads under way at a time."""
    bytes_per_s: float
    """Median of the rounds."""
    spread: float
    """Of the rounds: the range between their quartiles, over the median."""


@dataclass(frozen=True)
class ProductSpeed:
    """Products of a matrix in one format and arrangement with some tokens at a time."""

    format: str
    """Of the weights, such as 'Q4_K'."""
    widths: tuple[int, ...]
    """Bits of the planes that are multiplied, adjacent ones merged or not; () for floats."""
    s_per_weight: tuple[float, ...]
    """Lower quartiles, for PRODUCT_TOKENS tokens, from memory."""
    spread: float
    """As of ``DiskSpeed``; the median over PRODUCT_TOKENS."""


@dataclass(frozen=True)
class Machine:
    """A machine as the probe found it."""

    host: str
    processor: str
    num_cores: int
    """That this process may use."""
    num_threads: int
    """That computed in the probe."""
    kernels: str
    """'avx512', 'avx2' or 'scalar'."""
    disk: str
    """Device number of the file system, 'major:minor'."""
    measured_on: str
    """Date, ISO 8601."""
    waited_share: float
    """Part of the time in which kernels were timed that others had the processor."""
    direct: bool
    """Whether direct I/O works there."""
    reads: tuple[DiskSpeed, ...]
    read_cpu_s_per_byte: float
    """Processor time that reading takes from computing."""
    products: tuple[ProductSpeed, ...]
    attention_s_per_value: float
    """Per query head, position and value of the head, with keys and values in a cache."""
    cache_s_per_value: float
    """Of bringing them from memory, per key/value head, position and value; may be 0."""
    norm_s_per_value: float
    """On one thread, as are the next two."""
    activation_s_per_value: float
    quantize_s_per_value: float
    loop_s: float
    """Of handing out work and meeting at the end."""
    choice_s_per_logit: float
    """Of handing logits to Python and finding the largest."""
    confidence_s_per_logit: float
    """Of a draft's probability of its own choice."""

    @property
    def spread(self) -> float:
        """The median spread of the products, or of the ways to read, whichever is larger."""
        groups = (self.products, self.reads)
        return max(statistics.median(each.spread for each in group) for group in groups)

    def read_bytes_per_s(self, chunk_bytes: float, num_readers: int) -> float:
        """Return how fast the disk is read, interpolated between what was measured.

        Args:
            chunk_bytes: of one read, > 0; below the smallest one measured, reads are taken to
                cost the same time each.
            num_readers: reads under way at a time, >= 1.
        """
        chunks = sorted({each.chunk_bytes for each in self.reads})
        speeds = {(e.chunk_bytes, e.num_readers): e.bytes_per_s for e in self.reads}
        readers = sorted({each.num_readers for each in self.reads})
        by_chunk = [
            _interpolate(readers, [speeds[chunk, n] for n in readers], num_readers)
            for chunk in chunks
        ]
        speed = _interpolate(chunks, by_chunk, chunk_bytes)
        return speed * min(1.0, chunk_bytes / chunks[0])

    def product_s(
        self, format_name: str, widths: tuple[int, ...], num_weights: int, num_tokens: int
    ) -> float:
        """Return the seconds of one matrix product.

        Args:
            format_name: of the weights.
            widths: of the planes that are multiplied, as they lie in memory; () for floats.
            num_weights: rows times columns.
            num_tokens: >= 1.
        """
        per_tile = dict(zip(PRODUCT_TOKENS, self._costs(format_name, widths), strict=True))
        tiles = [LARGEST_TILE] * (num_tokens // LARGEST_TILE)
        tiles += [size for size in (8, 4, 2, 1) if num_tokens & size]
        # The first tile brings a panel from memory; the others find it in a cache.
        many = PRODUCT_TOKENS[-1]
        others_s = (per_tile[many] - per_tile[LARGEST_TILE]) / (many // LARGEST_TILE - 1)
        again = others_s / per_tile[LARGEST_TILE]
        tiles_s = per_tile[tiles[0]] + again * sum(per_tile[size] for size in tiles[1:])
        return num_weights * tiles_s

    @cached_property
    def _products_by_key(self) -> dict[tuple[str, tuple[int, ...]], Sequence[float]]:
        return {(each.format, each.widths): each.s_per_weight for each in self.products}

    def _costs(self, format_name: str, widths: tuple[int, ...]) -> Sequence[float]:
        """Return the times of an arrangement; of one not measured, by its like of the same bits."""
        by_key = self._products_by_key
        if (format_name, widths) in by_key:
            return by_key[format_name, widths]
        form = find_format(format_name)
        whole = merged_widths(form, len(form.plane_widths))
        if format_name == "F16_SPLIT":  # as BF16_SPLIT, whose rests are narrower
            near = self._costs("BF16_SPLIT", _narrow(widths))
            measured = by_key.get((format_name, whole))
            if widths == _narrow(widths) or measured is None:
                return near
            known = zip(near, measured, self._costs("BF16_SPLIT", _narrow(whole)), strict=True)
            return [cost * ours / theirs for cost, ours, theirs in known]
        for other in (name for name, found in by_key if found == widths):
            alike = by_key.get((other, whole))
            if find_format(other).bits == form.bits and alike and (format_name, whole) in by_key:
                known = zip(by_key[other, widths], by_key[format_name, whole], alike, strict=True)
                return [cost * ours / theirs for cost, ours, theirs in known]
        raise FormatError(
            f"the probe does not know {format_name} matrices in planes of {widths} bits; probe "
            "this machine again with --probe"
        )

    def to_json(self) -> str:
        """Return the machine as one JSON object."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            FormatError: damaged, or of another version.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values.pop("version") != VERSION:
                raise ValueError("it is of another version")
            values["reads"] = tuple(DiskSpeed(**each) for each in values["reads"])
            values["products"] = tuple(
                ProductSpeed(
                    each["format"],
                    tuple(each["widths"]),
                    tuple(float(cost) for cost in each["s_per_weight"]),
                    float(each["spread"]),
                )
                for each in values["products"]
            )
            machine = cls(**values)
            if not machine.reads or not machine.products or not _are_positive(machine):
                raise ValueError("a measurement is missing, or not positive")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(
                f"the probe's file cannot be used: {error}; probe this machine again with --probe"
            ) from None
        return machine


@dataclass(frozen=True)
class MemoryLimits:
    """Memory of this machine, or of the control group that this process is in."""

    total_bytes: int
    """Physical memory, or the group's limit where that is less."""
    available_bytes: int
    """What can be taken now without pushing others out."""


def merged_widths(form: Format, num_planes: int) -> tuple[int, ...]:
    """Return the widths of resident planes as they lie in memory, adjacent ones merged.

    Mirrors ``merge_plan`` of native/weights.c.

    Args:
        form: the format; a float format gives ().
        num_planes: how many of its planes are resident.
    """
    if form.is_float:
        return ()
    if form.bits == 8 and num_planes == len(form.plane_widths):
        return (8,)
    head = (4,) if num_planes >= 3 else form.plane_widths[:num_planes]
    return head + form.plane_widths[3:num_planes]


def _narrow(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths of BF16_SPLIT for those of F16_SPLIT."""
    return tuple(8 if width == 10 else width for width in widths)


def memory_limits() -> MemoryLimits:
    """Ask for the memory of this machine and of this process's control group, v1 or v2."""
    meminfo = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        meminfo[key] = int(value.split()[0]) * 1024
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    for limit, used in _group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return MemoryLimits(total, available)


def _group_limits(membership: Path, root: Path) -> list[tuple[int, int]]:
    """Return limit and use of this process's groups and those above them, in bytes.

    Page cache that can be dropped is counted as used here only where it is active.
    """
    found = []
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if not controllers:
            files = ("memory.max", "memory.current", "inactive_file")
        folder = top / name.strip("/")
        for group in (folder, *folder.parents):
            if top not in (group, *group.parents):
                break
            found += _group_limit(group, *files)
    return found


def _group_limit(group: Path, limit: str, usage: str, droppable: str) -> list[tuple[int, int]]:
    try:
        text = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []  # not a group, or not readable from inside a container
    if not text.isdecimal():
        return []  # "max"
    inactive = next((int(line.split()[1]) for line in stat if line.split()[0] == droppable), 0)
    return [(int(text), max(used - inactive, 0))]


def _interpolate(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """Interpolate over the logarithm of ascending places; beyond the ends, the ends' values."""
    if place <= places[0]:
        return values[0]
    for (low, left), (high, right) in zip(
        zip(places, values, strict=True), list(zip(places, values, strict=True))[1:], strict=False
    ):
        if place <= high:
            part = math.log(place / low) / math.log(high / low)
            return left + part * (right - left)
    return values[-1]


def _are_positive(machine: Machine) -> bool:
    numbers = [each.bytes_per_s for each in machine.reads]
    numbers += [cost for each in machine.products for cost in each.s_per_weight]
    numbers += [machine.attention_s_per_value, machine.norm_s_per_value, machine.loop_s]
    numbers += [machine.activation_s_per_value, machine.quantize_s_per_value]
    numbers += [machine.choice_s_per_logit, machine.confidence_s_per_logit]
    return all(math.isfinite(number) and number > 0 for number in numbers) and all(
        len(each.s_per_weight) == len(PRODUCT_TOKENS) for each in machine.products
    )
