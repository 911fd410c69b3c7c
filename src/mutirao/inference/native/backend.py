"""Run a program with the native engine: weights resident or streamed, as a placement says.

The same ``run`` as ``reference.ReferenceBackend``, which is its oracle. Needs neither PyTorch
nor transformers. One engine serves one sequence; its keys and values stay until a later run
writes over their positions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InferenceError, InputError
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
from mutirao.inference.native.library import (
    Extent,
    OpDescription,
    Settings,
    TensorDescription,
    load_library,
)
from mutirao.inference.store.planes import find_format

if TYPE_CHECKING:
    from mutirao.inference.store.store_index import StoredTensor
    from mutirao.inference.store.weight_store import WeightStore

Mode = Literal["full", "draft"]
Wanted = Literal["last", "all", "none"]
Floats = NDArray[np.float32]

ALL_PLANES = 99
"""In a placement: everything resident."""
NOTHING = -1
"""In a placement: scales and planes are all streamed, or read by rows."""

_KINDS = {"F32": 1, "F16": 2, "BF16": 3}
_SCALES = {"": 0, "H": 1, "HM": 2, "K6": 3, "K8": 4, "E": 5}
_FUNCTIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_OPS: tuple[type, ...] = (
    *(Embed, Scale, RMSNorm, LayerNorm, MatMul, Rope, Attention, Activation, Add),
    SelectRows,
)
LOAD_POLL_S = 0.1


@dataclass(frozen=True)
class Placement:
    """What of the weights is in memory, and with what buffers the rest is streamed."""

    resident: Mapping[str, int] = field(default_factory=dict)
    """By matrix: planes in memory (with the scales), ALL_PLANES, or NOTHING; default all."""
    joined: bool = False
    """Split floats that are wholly resident lie in memory as plain ones: larger, but faster."""
    num_threads: int = 2
    num_readers: int = 8
    direct: bool = True
    """Read past the page cache."""
    queued: bool = False
    """Read by io_uring where the kernel allows it, else by ``num_readers`` threads."""
    max_tokens: int = 256
    """Most tokens in one pass: prompts are taken in chunks of so many."""
    max_logit_rows: int = 1
    """Most rows of logits wanted from one pass."""
    context: int = 2048
    """Most positions."""
    ring_bytes: int = 16 << 20
    """Memory for pieces read ahead, in bytes."""
    piece_bytes: int = 1 << 20
    """Aim for the size of one piece, in bytes."""
    kernels: str = ""
    """'avx512', 'avx2', 'scalar', or '' for the best."""


def resident_planes(tensor: StoredTensor, placement: Placement) -> int:
    """Return how many planes of a matrix are resident: NOTHING, or 0 to all of them."""
    return min(placement.resident.get(tensor.name, ALL_PLANES), len(tensor.planes))


class NativeBackend:
    """An engine in memory; close it, or use it as a context manager, to give all back."""

    def __init__(
        self,
        store: WeightStore,
        placement: Placement,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Describe the program to the engine and load what is resident.

        Args:
            store: the open weight store.
            placement: what is resident.
            progress: told the bytes loaded so far, some times a second.

        Raises:
            MissingKernelError: there is no native library.
            InferenceError: no memory, or the store is damaged or cannot be read.
        """
        self._handle: int | None = None
        self._lock = threading.RLock()  # what C is at work on is not taken from under it
        self._num_cached = 0
        self._library = load_library()
        self.program: Program = compile_program(store.spec)
        self.placement = placement
        spec = store.spec
        self._vocab_size, self._directory = spec.vocab_size, store.directory
        settings = Settings(
            placement.num_threads,
            placement.num_readers,
            int(placement.direct),
            int(placement.queued),
            placement.max_tokens,
            spec.num_layers,
            spec.num_kv_heads,
            spec.head_dim,
            placement.context,
            placement.ring_bytes,
            placement.piece_bytes,
        )
        self._handle = self._library.engine_create(
            os.fsencode(store.weights_path), placement.kernels.encode(), ctypes.byref(settings)
        )
        if not self._handle:
            raise InputError(
                f"an engine with {placement.num_threads} threads and kernels "
                f"{placement.kernels or 'of the best kind'} cannot be made on this machine"
            )
        self._tensors = {name: index for index, name in enumerate(store.tensors)}
        self._vectors = {name: index for index, name in enumerate(store.vectors)}
        self._buffers = {name: index for index, name in enumerate(self.program.buffers)}
        try:
            self._describe(store)
            self._load(progress)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NativeBackend:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine's threads and give its memory back; may be called again."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle:
                self._library.engine_destroy(handle)

    def run(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        logits: Wanted = "last",
        mode: Mode = "full",
    ) -> Floats:
        """Run tokens through the model and keep their keys and values.

        Args:
            tokens: token ids; longer than ``max_tokens``, they are taken in chunks.
            position: of the first, at most as many as have been run; keys and values at and
                after it are written anew.
            logits: of the last token, of all (at most ``max_logit_rows``), or none.
            mode: ``draft`` multiplies only the resident planes.

        Returns:
            float32 (rows, vocabulary), a copy; (0, vocabulary) for "none".

        Raises:
            InputError: no tokens, they do not fit into the context, or the model lacks one.
            InferenceError: a read failed, the store is damaged, memory ran out, or the backend
                is closed.
        """
        self._check_run(tokens, position, logits)
        size = self.placement.max_tokens
        head = self.program.layer_starts[-1]
        for begin in range(0, len(tokens), size):
            chunk = tokens[begin : begin + size]
            is_last = begin + size >= len(tokens)
            if logits == "all":
                wanted = list(range(len(chunk)))
            else:
                wanted = [len(chunk) - 1] if is_last and logits == "last" else []
            end = len(self.program.ops) if wanted else head
            with self._lock:
                self.run_ops(chunk, position + begin, 0, end, mode=mode, wanted=wanted)
                self._num_cached = position + begin + len(chunk)
                rows = self.logits(len(wanted))
        return rows

    def run_ops(
        self,
        tokens: Sequence[int],
        position: int,
        begin: int,
        end: int,
        *,
        mode: Mode = "full",
        wanted: Sequence[int] = (),
    ) -> None:
        """Run a part of the program, ops [begin, end), on at most ``max_tokens`` tokens.

        Args:
            tokens: token ids; their number counts even where the part does not embed.
            position: of the first token.
            begin: first op.
            end: op to stop before.
            mode: see ``run``.
            wanted: rows whose logits are wanted, at most ``max_logit_rows``.

        Raises:
            InferenceError: a read failed, the store is damaged, or memory ran out.
        """
        if len(wanted) > self.placement.max_logit_rows:
            raise InputError(
                f"logits of {len(wanted)} rows were asked for (at most "
                f"{self.placement.max_logit_rows} were planned)"
            )
        ids = np.asarray(tokens, np.int32)
        rows = np.asarray(wanted, np.int32)
        with self._lock:
            self._check(
                self._library.engine_run(
                    self._open_handle(),
                    ids.ctypes.data,
                    *(len(ids), position, begin, end, int(mode == "draft")),
                    rows.ctypes.data,
                    len(rows),
                )
            )

    def logits(self, num_rows: int) -> Floats:
        """Return the first rows of the last run's logits, float32 (num_rows, vocabulary)."""
        return self.buffer(self.program.logits)[:num_rows].copy()

    def buffer(self, name: str) -> Floats:
        """Return a view of a buffer, float32 (rows, width); the next run writes over it."""
        stride = ctypes.c_int32()
        address = self._library.engine_buffer(
            self._open_handle(), self._buffers[name], ctypes.byref(stride)
        )
        rows = self._buffer_rows(name)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        whole: Floats = np.ctypeslib.as_array(pointer, (rows, stride.value))
        return whole[:, : self.program.buffers[name]]

    def set_draft_planes(self, name: str, num_planes: int) -> None:
        """Let drafts read the first planes of a matrix that is streamed whole; 0: all."""
        with self._lock:
            handle = self._open_handle()
            self._library.engine_set_draft_planes(handle, self._tensors[name], num_planes)

    @property
    def kernels(self) -> str:
        """The kernels in use, such as 'avx512'."""
        with self._lock:
            return str(self._library.engine_kernels(self._open_handle()).decode())

    @property
    def num_threads(self) -> int:
        """Threads that compute now: fewer than planned where others use the machine too."""
        with self._lock:
            return int(self._library.engine_threads(self._open_handle()))

    def use_threads(self, num_threads: int) -> None:
        """Compute with so many threads, at most those planned; 0: as many as are worth it."""
        with self._lock:
            self._library.engine_use_threads(self._open_handle(), num_threads)

    @property
    def is_queued(self) -> bool:
        """Whether weights are read by io_uring."""
        with self._lock:
            return bool(self._library.engine_is_queued(self._open_handle()))

    @property
    def bytes_read(self) -> int:
        """Bytes streamed from the store since it was loaded."""
        with self._lock:
            return int(self._library.engine_bytes_read(self._open_handle()))

    @property
    def wait_s(self) -> float:
        """Time that computing waited for pieces, in seconds."""
        with self._lock:
            return float(self._library.engine_wait_s(self._open_handle()))

    def op_seconds(self) -> dict[str, float]:
        """Return the time spent in each kind of op, in seconds."""
        with self._lock:
            return {
                kind.__name__: float(self._library.engine_op_s(self._open_handle(), index))
                for index, kind in enumerate(_OPS)
            }

    def _buffer_rows(self, name: str) -> int:
        few = _after_selection(self.program)
        return self.placement.max_logit_rows if name in few else self.placement.max_tokens

    def _describe(self, store: WeightStore) -> None:
        tensors = (TensorDescription * len(store.tensors))(
            *(_tensor(each, self.placement) for each in store.tensors.values())
        )
        vectors = [np.ascontiguousarray(v, np.float32) for v in store.vectors.values()]
        addresses = (ctypes.c_void_p * len(vectors))(*(v.ctypes.data for v in vectors))
        widths = np.array([v.size for v in vectors], np.int32)
        buffer_widths = np.array(list(self.program.buffers.values()), np.int32)
        buffer_rows = np.array([self._buffer_rows(name) for name in self._buffers], np.int32)
        ops = (OpDescription * len(self.program.ops))(*self._ops(store))
        checksums = np.ascontiguousarray(store.checksums, np.uint64)
        self._check(
            self._library.engine_describe(
                self._handle,
                *(tensors, len(tensors), ctypes.cast(addresses, ctypes.c_void_p)),
                *(widths.ctypes.data, len(vectors)),
                *(buffer_widths.ctypes.data, buffer_rows.ctypes.data, len(buffer_widths)),
                *(ops, len(ops), checksums.ctypes.data, checksums.size),
            )
        )

    def _ops(self, store: WeightStore) -> list[OpDescription]:
        """Describe the ops; a matrix's input is quantized once for all that read it."""
        described = []
        quantized: str | None = None
        for op in self.program.ops:
            flag = 0
            if isinstance(op, MatMul) and not find_format(store.tensors[op.weight].format).is_float:
                flag = int(quantized != op.input)
                quantized = op.input
            described.append(self._op(op, flag))
            if getattr(op, "out", getattr(op, "buffer", None)) == quantized:
                quantized = None
        return described

    def _op(self, op: Op, quantize_first: int) -> OpDescription:
        at, vector = self._buffers, self._vectors
        out = OpDescription(kind=_OPS.index(type(op)), input=-1, out=-1, weight=-1, bias=-1)
        out.other = out.third = -1
        out.out = at[op.buffer if isinstance(op, Scale | Rope) else op.out]
        out.input = out.out if isinstance(op, Scale | Rope | Embed) else 0
        if isinstance(op, Embed):
            out.weight, out.flag = self._tensors[op.weight], int(op.by_position)
            out.amount, out.accumulate = op.position_offset, int(op.accumulate)
        elif isinstance(op, Scale):
            out.factor = op.factor
        elif isinstance(op, Rope):
            out.weight, out.num_heads, out.head_dim = (
                vector[op.frequencies],
                op.num_heads,
                op.head_dim,
            )
            out.flag, out.factor = int(op.interleaved), op.factor
        elif isinstance(op, Attention):
            out.input, out.other, out.third = at[op.query], at[op.key], at[op.value]
            out.layer, out.num_heads, out.num_kv_heads = op.layer, op.num_heads, op.num_kv_heads
            out.head_dim, out.factor, out.window = op.head_dim, op.scale, op.window or 0
        else:
            out.input = at[op.input]
        if isinstance(op, RMSNorm):
            out.weight, out.eps, out.amount = vector[op.weight], op.eps, op.num_groups
        elif isinstance(op, LayerNorm):
            out.weight, out.bias, out.eps = vector[op.weight], vector[op.bias], op.eps
        elif isinstance(op, MatMul):
            out.weight, out.accumulate = self._tensors[op.weight], int(op.accumulate)
            out.bias = -1 if op.bias is None else vector[op.bias]
            out.flag = quantize_first
        elif isinstance(op, Activation):
            out.flag = _FUNCTIONS[op.function]
            out.other = -1 if op.multiply_by is None else at[op.multiply_by]
        return out

    def _load(self, progress: Callable[[int], None] | None) -> None:
        result: list[int] = []
        loading = threading.Thread(
            target=lambda: result.append(self._library.engine_load(self._handle))
        )
        loading.start()
        try:
            while loading.is_alive():
                loading.join(LOAD_POLL_S)
                if progress is not None:
                    progress(int(self._library.engine_bytes_loaded(self._handle)))
        except BaseException:
            self._library.engine_cancel(self._handle)
            raise
        finally:
            while loading.is_alive():  # the engine must not be taken from under it
                with contextlib.suppress(KeyboardInterrupt):
                    loading.join()
        self._check(result[0])

    def _open_handle(self) -> int:
        if self._handle is None:
            raise InferenceError("the model is closed; open it again")
        return self._handle

    def _check_run(self, tokens: Sequence[int], position: int, logits: Wanted) -> None:
        limit, cached = self.placement.context, self._num_cached
        if not tokens or position + len(tokens) > limit:
            raise InputError(
                f"{len(tokens)} tokens at position {position} do not fit into the context of "
                f"{limit}"
            )
        if not 0 <= position <= cached:
            raise InputError(
                f"position={position} is not supported (expected 0 to {cached}, the tokens in the "
                "cache)"
            )
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise InputError(
                f"tokens from {min(tokens)} to {max(tokens)} are not the model's (expected 0 to "
                f"{self._vocab_size - 1})"
            )
        if logits == "all" and len(tokens) > self.placement.max_tokens:
            raise InputError(
                f"logits of all of {len(tokens)} tokens were asked for (at most "
                f"{self.placement.max_tokens} are run at a time)"
            )

    def _check(self, result: int) -> None:
        if result != 0:
            message = self._message()
            if "weight store" in message:
                message += f"; delete {self._directory}, and it is built again from the model"
            raise InferenceError(f"inference failed: {message}")

    def _message(self) -> str:
        message: Any = self._library.engine_error(self._open_handle())
        return str(message.decode(errors="replace")) or "the engine gave no reason"


def _after_selection(program: Program) -> set[str]:
    """Name the buffers that only the head writes: they have a row for each logit wanted."""
    is_selected = False
    few: set[str] = set()
    for op in program.ops:
        is_selected = is_selected or isinstance(op, SelectRows)
        if is_selected:
            few.add(str(getattr(op, "out", getattr(op, "buffer", ""))))
    return few


def _tensor(stored: StoredTensor, placement: Placement) -> TensorDescription:
    form = find_format(stored.format)
    return TensorDescription(
        kind=_KINDS.get(form.name, 0),
        bits=form.bits,
        scales_kind=_SCALES[form.scales],
        num_rows=stored.num_rows,
        num_columns=stored.num_columns,
        num_planes=len(stored.planes),
        widths=(ctypes.c_int32 * 5)(*form.plane_widths),
        resident_planes=resident_planes(stored, placement),
        whole_kind=_KINDS.get(form.split_from, 0),
        joined=int(placement.joined),
        centre=-float(form.code_offset),
        scales=_extent(stored.scales),
        planes=(Extent * 5)(*(_extent(each) for each in stored.planes)),
    )


def _extent(extent: Any) -> Extent:
    if extent is None:
        return Extent(0, 0, 0)
    return Extent(extent.offset, extent.num_bytes, extent.checksums)
