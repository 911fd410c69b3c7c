"""What each op of a pass costs on a machine, and which bytes have to come before it.

Mirrors native/engine.c: every op ends at a barrier, a product of streamed weights is cut into
pieces of whole slabs, and ops that take rows apart have one thread for each row. Times are in
seconds, sizes in bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mutirao.errors import InputError
from mutirao.inference.architecture.model_spec import ModelSpec
from mutirao.inference.architecture.program import (
    Activation,
    Add,
    Attention,
    Embed,
    LayerNorm,
    MatMul,
    Op,
    Program,
    RMSNorm,
    Rope,
    Scale,
    SelectRows,
    compile_program,
)
from mutirao.inference.native.backend import Placement, resident_planes
from mutirao.inference.planning.machine import Machine, merged_widths
from mutirao.inference.store.plane_formats import PANEL_ROWS, find_format

if TYPE_CHECKING:
    from mutirao.inference.store.store_index import StoredTensor

PAGE_BYTES = 4096
SLAB_PANELS = 16
MAX_PIECES = 1500
"""Pieces followed one by one in a pass; of more, neighbours are taken together."""


@dataclass(frozen=True)
class Step:
    """A stretch of computing that begins once some bytes have come."""

    compute_s: float
    read_s: float = 0.0
    """That the disk takes for them; 0: nothing is streamed."""
    num_bytes: int = 0


@dataclass(frozen=True)
class Piece:
    """Panels that are streamed together; several pieces of the engine where there are many."""

    num_bytes: int
    read_s: float
    share: float
    """Of the matrix."""
    num_joined: int


@dataclass(frozen=True)
class PassSteps:
    """A full pass: its steps in order, and what they add up to."""

    steps: list[Step]
    parts: dict[str, float]
    """Seconds by what computes; without waiting."""
    num_bytes: int
    """Read from the disk."""


class PassCosts:
    """What passes of one model in one placement cost on one machine."""

    def __init__(
        self,
        machine: Machine,
        spec: ModelSpec,
        tensors: Mapping[str, StoredTensor],
        placement: Placement,
    ) -> None:
        """See ``predict`` for the arguments."""
        self.machine, self.tensors, self.placement = machine, tensors, placement
        self.program: Program = compile_program(spec)
        self.pieces = self._cut()
        largest = max((each.num_bytes for each in self._all_pieces()), default=0)
        self.ring_bytes = max(placement.ring_bytes - largest // 2, largest)
        """Pieces lie whole, so half of one is unused at the ring's end on average."""

    def steps(self, num_tokens: int, position: int, *, num_logits: int | None = None) -> PassSteps:
        """Follow a full pass.

        Args:
            num_tokens: in the pass.
            position: keys that the first one sees.
            num_logits: rows that the head computes; None: all; 0 stops before it.
        """
        steps: list[Step] = []
        parts = dict.fromkeys(("products", "attention", "other", "reading"), 0.0)
        for kind, step in self._follow(num_tokens, position, num_logits, is_draft=False):
            parts[kind] += step.compute_s
            steps.append(step)
        num_bytes = sum(step.num_bytes for step in steps)
        if num_bytes:
            # Readers take their time from the cores that compute, unless some are idle.
            idle = max(self.machine.num_cores - self.machine.num_threads, 0)
            reading_s = num_bytes * self.machine.read_cpu_s_per_byte / self.machine.num_cores
            parts["reading"] = reading_s if not idle else 0.0
            share = parts["reading"] / num_bytes
            steps = [
                replace(s, compute_s=s.compute_s + share * s.num_bytes) if s.num_bytes else s
                for s in steps
            ]
        return PassSteps(steps, parts, num_bytes)

    def draft_s(self, position: int) -> float:
        """Return the seconds of drafting one token on the resident planes.

        Raises:
            InputError: a matrix has no resident plane, so there is no draft.
        """
        followed = self._follow(1, position, None, is_draft=True)
        drafting_s = sum(step.compute_s for _, step in followed)
        width = self.program.buffers[self.program.logits]
        return drafting_s + width * self.machine.confidence_s_per_logit

    def _follow(
        self, num_tokens: int, position: int, num_logits: int | None, *, is_draft: bool
    ) -> Iterable[tuple[str, Step]]:
        """Yield the steps of a pass, each with the part of the breakdown it belongs to."""
        rows, quantized = num_tokens, ""
        wanted = num_tokens if num_logits is None else num_logits
        for op in self.program.ops:
            if isinstance(op, SelectRows):
                rows = wanted
                if not rows:
                    return
            if isinstance(op, MatMul):
                if op.input != quantized:
                    yield "other", self._quantizing(op, rows)
                quantized = op.input
                for step in self._product(op, rows, is_draft=is_draft):
                    yield "products", step
            elif isinstance(op, Attention):
                yield "attention", self._attention(op, rows, position)
            else:
                yield "other", self._row_op(op, rows)
            if getattr(op, "out", getattr(op, "buffer", None)) == quantized:
                quantized = ""
        width = self.program.buffers[self.program.logits]
        yield "other", Step(rows * width * self.machine.choice_s_per_logit)

    def _quantizing(self, op: MatMul, rows: int) -> Step:
        tensor = self.tensors[op.weight]
        if find_format(tensor.format).is_float:
            return Step(0.0)
        values = rows * tensor.num_columns * self.machine.quantize_s_per_value
        return Step(values / min(self.machine.num_threads, 4 * rows) + self.machine.loop_s)

    def _product(self, op: MatMul, rows: int, *, is_draft: bool) -> list[Step]:
        tensor = self.tensors[op.weight]
        num_resident = resident_planes(tensor, self.placement)
        weights = tensor.num_panels * PANEL_ROWS * tensor.num_columns
        pieces = self.pieces[tensor.name]
        form = find_format(tensor.format)
        widths = merged_widths(form, max(num_resident, 0))
        if is_draft and pieces and num_resident <= 0:
            raise InputError(
                f"a draft needs planes of every matrix in memory, and has none of {tensor.name}; "
                "keep one, or draft nothing"
            )
        if is_draft or not pieces:
            is_joined = form.split_from and self.placement.joined and not pieces
            if is_draft and form.split_from:
                widths = merged_widths(form, min(num_resident, len(form.code_widths)))
            kind = (form.split_from, ()) if is_joined else (tensor.format, widths)
            product_s = self.machine.product_s(*kind, weights, rows)
            return [Step(product_s + self.machine.loop_s)]
        if not form.is_float:
            widths += form.plane_widths[max(num_resident, 0) :]
        product_s = self.machine.product_s(tensor.format, widths, weights, rows)
        return [
            Step(
                piece.share * product_s + 2 * piece.num_joined * self.machine.loop_s,
                piece.read_s,
                piece.num_bytes,
            )
            for piece in pieces
        ]

    def _attention(self, op: Attention, rows: int, position: int) -> Step:
        keys = position + (rows + 1) / 2
        if op.window is not None:
            keys = min(keys, op.window)
        attended_s = rows * op.num_heads * op.head_dim * keys * self.machine.attention_s_per_value
        # Threads that share a key/value head wait for the same bytes at the same time.
        sharing = min(self.machine.num_threads, op.num_heads // op.num_kv_heads)
        brought_s = op.num_kv_heads * op.head_dim * keys * self.machine.cache_s_per_value * sharing
        return Step(attended_s + brought_s + 2 * self.machine.loop_s)

    def _row_op(self, op: Op, rows: int) -> Step:
        """An op that takes rows apart: one thread works on a row."""
        buffers = self.program.buffers
        if isinstance(op, Embed):
            return Step(self._lookup_s(op) * _turns(rows, self.machine.num_threads))
        width = 0
        per_value = self.machine.norm_s_per_value
        if isinstance(op, RMSNorm | LayerNorm | Add | SelectRows):
            width = buffers[op.input]
        elif isinstance(op, Scale | Rope):
            width = buffers[op.buffer]
        elif isinstance(op, Activation):
            width, per_value = buffers[op.input], self.machine.activation_s_per_value
        each_s = width * per_value
        return Step(each_s * _turns(rows, self.machine.num_threads) + self.machine.loop_s)

    def _lookup_s(self, op: Embed) -> float:
        """A row of a matrix: read where it is not resident, one small read for each extent."""
        tensor = self.tensors[op.weight]
        row_s = tensor.num_columns * self.machine.activation_s_per_value
        missing = len(tensor.planes) - resident_planes(tensor, self.placement)
        small = min(each.chunk_bytes for each in self.machine.reads)
        return row_s + missing * small / self.machine.read_bytes_per_s(small, 1)

    def _all_pieces(self) -> Iterable[Piece]:
        return (piece for pieces in self.pieces.values() for piece in pieces)

    def _cut(self) -> dict[str, list[Piece]]:
        """Return the streamed pieces of each matrix that is multiplied."""
        names = dict.fromkeys(op.weight for op in self.program.ops if isinstance(op, MatMul))
        place = self.placement
        cut = {
            name: cut_pieces(
                self.tensors[name], resident_planes(self.tensors[name], place), place.piece_bytes
            )
            for name in names
        }
        joined = -(-sum(map(len, cut.values())) // MAX_PIECES)
        most = max(place.ring_bytes // 4, 1)
        return {name: self._join(pieces, joined, most) for name, pieces in cut.items()}

    def _join(
        self, pieces: tuple[tuple[tuple[int, ...], float], ...], num: int, most_bytes: int
    ) -> list[Piece]:
        joined: list[Piece] = []
        for reads, share in pieces:
            size, read_s = sum(reads), sum(self._read_s(each) for each in reads)
            last = joined[-1] if joined else None
            if last and last.num_joined < num and last.num_bytes + size <= most_bytes:
                joined[-1] = Piece(
                    last.num_bytes + size,
                    last.read_s + read_s,
                    last.share + share,
                    last.num_joined + 1,
                )
            else:
                joined.append(Piece(size, read_s, share, 1))
        return joined

    @functools.cached_property
    def _read_times(self) -> dict[int, float]:
        return {}

    def _read_s(self, num_bytes: int) -> float:
        """Return the seconds of one read among others."""
        if num_bytes not in self._read_times:
            speed = self.machine.read_bytes_per_s(num_bytes, self.placement.num_readers)
            self._read_times[num_bytes] = num_bytes / speed
        return self._read_times[num_bytes]


@functools.lru_cache(maxsize=4096)
def cut_pieces(
    tensor: StoredTensor, num_resident: int, piece_bytes: int
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Cut the streamed rest of a matrix as the engine does (``cut`` in native/engine.c).

    Args:
        tensor: the matrix.
        num_resident: planes in memory; -1: neither planes nor scales.
        piece_bytes: aimed at for a piece; whole slabs of 16 panels, at least one.

    Returns:
        For each piece the bytes of its reads, whole pages, and its share of the panels.
    """
    extents = [each for each in tensor.planes[max(num_resident, 0) :] if each.num_bytes]
    if num_resident < 0 and tensor.scales is not None:
        extents.insert(0, tensor.scales)
    strides = [each.num_bytes // tensor.num_panels for each in extents]
    if not sum(strides):
        return ()
    step = max(piece_bytes // (sum(strides) * SLAB_PANELS), 1) * SLAB_PANELS
    pieces = []
    for begin in range(0, tensor.num_panels, step):
        end = min(begin + step, tensor.num_panels)
        reads = []
        for extent, stride in zip(extents, strides, strict=True):
            first = (extent.offset + begin * stride) // PAGE_BYTES
            last = -(-(extent.offset + end * stride) // PAGE_BYTES)
            reads.append((last - first) * PAGE_BYTES)
        pieces.append((tuple(reads), (end - begin) / tensor.num_panels))
    return tuple(pieces)


def _turns(rows: int, num_threads: int) -> int:
    return -(-rows // num_threads)
