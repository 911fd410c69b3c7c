"""How much memory a plan takes: the peak of the whole process, part by part, in bytes.

Follows what native/engine.c and native/stream.c allocate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from mutirao.inference.architecture.model_spec import ModelSpec, vector_shapes
from mutirao.inference.architecture.program import MatMul, SelectRows, compile_program
from mutirao.inference.native.backend import Placement, resident_planes
from mutirao.inference.store.plane_formats import (
    PANEL_ROWS,
    find_format,
    num_panels,
    plane_panel_bytes,
    scales_panel_bytes,
)

if TYPE_CHECKING:
    from mutirao.inference.store.store_index import StoredTensor

PROCESS_BYTES = 60_000_000
"""Python, numpy, the command line and the tokenizer of a vocabulary of 150,000, and what malloc
keeps for itself. Measured as resident memory with Python 3.11 and numpy 2 on x86-64,
2026-11-22: 53.3 MB (interpreter 9.1, numpy 16.8, this package with rich 12.1, opened store 4.0,
tokenizer 9.3, typer 2.0); the rest is for the stacks of threads and the results of a pass."""
STACK_BYTES = 64 << 10
"""Of each thread, what it touches (assumption)."""
SLAB_PANELS = 16
PAGE_BYTES = 4096
KV_PAGE_TOKENS = 16
MAX_LOADERS = 16
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class MemoryUse:
    """Peak memory of a process that runs a model, in bytes, by what it is for."""

    weights: int
    """Resident scales and planes."""
    kv_cache: int
    """Float16 keys and values of every position of the context."""
    activations: int
    """Buffers of a pass, and its quantized inputs."""
    logits: int
    """Of the rows wanted at once, in the engine and as handed to Python."""
    vectors: int
    """Norms, biases and checksums, in Python and in the engine."""
    reading: int
    """The ring that streamed pieces are read into, or what loading takes, if that is more."""
    process: int
    """The interpreter, its modules, the tokenizer, threads."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


def memory_needed(
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    placement: Placement,
    *,
    process_bytes: int = PROCESS_BYTES,
) -> MemoryUse:
    """Return the peak memory of running a model in a placement.

    Args:
        spec: the model.
        tensors: its matrices, by store name.
        placement: what is resident, and the sizes of buffers.
        process_bytes: what the process takes besides; measured by default.
    """
    weights = sum(
        resident_bytes(each, resident_planes(each, placement), joined=placement.joined)
        for each in tensors.values()
    )
    streams = is_streaming(tensors, spec, placement)
    besides = memory_besides_weights(
        spec, tensors, placement, streams=streams, process_bytes=process_bytes
    )
    return replace(besides, weights=weights + (HUGE_PAGE_BYTES if weights else 0))


def memory_besides_weights(
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    placement: Placement,
    *,
    streams: bool = True,
    process_bytes: int = PROCESS_BYTES,
) -> MemoryUse:
    """Return what running a model takes before any weight is resident.

    What a budget leaves above it, less HUGE_PAGE_BYTES, is for weights.

    Args:
        spec: the model.
        tensors: its matrices, by store name.
        placement: the sizes of buffers; what is resident does not matter.
        streams: whether there is a ring.
        process_bytes: what the process takes besides; measured by default.
    """
    num_threads = placement.num_threads + placement.num_readers
    staging = min(placement.num_readers, MAX_LOADERS) * max(map(_slab_bytes, tensors.values()))
    kv_cache = kv_cache_bytes(spec, placement.context)
    return MemoryUse(
        weights=0,
        kv_cache=kv_cache,
        activations=_activation_bytes(spec, tensors, placement),
        logits=2 * 4 * placement.max_logit_rows * spec.vocab_size,
        vectors=_vector_bytes(spec, tensors),
        # While weights are loaded there are neither keys and values nor logits yet.
        reading=max(placement.ring_bytes if streams else 0, staging - kv_cache),
        process=process_bytes + num_threads * STACK_BYTES,
    )


def kv_cache_bytes(spec: ModelSpec, context: int) -> int:
    """Return the bytes of keys and values of so many positions, in float16.

    Per position 2 * layers * key/value heads * head size * 2 bytes, in pages of 16 positions;
    a head's values are padded to 16.
    """
    padded_dim = -(-spec.head_dim // 16) * 16
    per_position = 2 * spec.num_layers * spec.num_kv_heads * (spec.head_dim + padded_dim)
    return -(-context // KV_PAGE_TOKENS) * KV_PAGE_TOKENS * per_position


def resident_bytes(tensor: StoredTensor, num_planes: int, *, joined: bool = False) -> int:
    """Return the bytes of a matrix with its scales and first planes in memory; -1: none.

    Args:
        tensor: the matrix.
        num_planes: resident.
        joined: split floats that are whole lie there as plain ones.
    """
    if num_planes < 0:
        return 0
    form = find_format(tensor.format)
    if joined and form.split_from and num_planes == len(form.plane_widths):
        (panel_bytes,) = plane_panel_bytes(form.split_from, tensor.num_columns)
        return num_panels(tensor.num_rows) * panel_bytes
    scales = scales_panel_bytes(tensor.format, tensor.num_columns)
    planes = plane_panel_bytes(tensor.format, tensor.num_columns)
    return num_panels(tensor.num_rows) * (scales + sum(planes[:num_planes]))


def is_streaming(
    tensors: Mapping[str, StoredTensor], spec: ModelSpec, placement: Placement
) -> bool:
    """Whether any matrix that is multiplied is not wholly resident."""
    used = {op.weight for op in compile_program(spec).ops if isinstance(op, MatMul)}
    return any(
        resident_planes(tensors[name], placement) < len(tensors[name].planes) for name in used
    )


def least_ring_bytes(spec: ModelSpec, tensors: Mapping[str, StoredTensor], piece_bytes: int) -> int:
    """Return the smallest ring that any placement can be streamed through, in bytes.

    It holds three of the largest pieces: one that is multiplied and two that are read.
    """
    used = {op.weight for op in compile_program(spec).ops if isinstance(op, MatMul)}
    return 3 * max(max(_slab_bytes(tensors[name]), piece_bytes + 16 * PAGE_BYTES) for name in used)


def _slab_bytes(tensor: StoredTensor) -> int:
    """Bytes of 256 rows as they are read: whole pages of each extent."""
    panel_bytes = plane_panel_bytes(tensor.format, tensor.num_columns)
    scales = scales_panel_bytes(tensor.format, tensor.num_columns)
    return sum(SLAB_PANELS * each + 2 * PAGE_BYTES for each in (scales, *panel_bytes))


def _activation_bytes(
    spec: ModelSpec, tensors: Mapping[str, StoredTensor], placement: Placement
) -> int:
    program = compile_program(spec)
    head = program.ops[_selection(spec) :]
    few = {getattr(op, "out", None) for op in head}
    floats = 0
    for name, width in program.buffers.items():
        stride = -(-width // 32) * 32
        if name != program.logits:
            floats += stride * (placement.max_logit_rows if name in few else placement.max_tokens)
    columns = max(each.num_columns for each in tensors.values())
    stride = -(-columns // 64) * 64
    floats += placement.max_tokens * (stride // 4 + 4 * (stride // 32))  # codes, scales, sums
    floats += placement.num_threads * (placement.context + 2 * KV_PAGE_TOKENS)
    split = (each.num_columns for each in tensors.values() if find_format(each.format).split_from)
    floats += placement.num_threads * max(split, default=0) * PANEL_ROWS // 2  # a panel made whole
    frequencies = sum(size for name, (size,) in vector_shapes(spec).items() if "rope" in name)
    floats += 2 * frequencies * placement.max_tokens
    return 4 * floats


def _selection(spec: ModelSpec) -> int:
    ops = compile_program(spec).ops
    return next(index for index, op in enumerate(ops) if isinstance(op, SelectRows))


def _vector_bytes(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> int:
    floats = sum(size for (size,) in vector_shapes(spec).values())
    slabs = sum(-(-each.num_rows // (PANEL_ROWS * SLAB_PANELS)) * 6 for each in tensors.values())
    return 2 * (4 * floats + 8 * slabs)
