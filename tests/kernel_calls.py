"""One product, or one operation, by the native library: for its tests."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from small_stores import small_spec
from tiny_gguf import random_rows

from mutirao.inference.architecture.program import Op, Program
from mutirao.inference.native import backend as native
from mutirao.inference.native.backend import NativeBackend, Placement
from mutirao.inference.native.library import load_library
from mutirao.inference.reference import quantize_activations
from mutirao.inference.store.plane_formats import FORMATS
from mutirao.inference.store.planes import dequantize, pack, unpack_scales
from mutirao.inference.store.store_index import Extent, Layout, StoredTensor, StoreIndex
from mutirao.inference.store.weight_store import WeightStore

Floats = NDArray[np.float32]

INSTRUCTION_SETS = ("avx512", "avx2", "scalar")
UNIT = 2.0**-24
"""Greatest relative error of one rounding to float32."""


@dataclass(frozen=True)
class Matrix:
    """A matrix in a format, as the kernels read it."""

    format: str
    num_rows: int
    num_columns: int
    scales: NDArray[np.uint8]
    planes: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, format: str, num_rows: int, num_columns: int, raw: bytes) -> Matrix:
        scales, planes = pack(raw, format, num_rows, num_columns)
        planes = [np.ascontiguousarray(plane) for plane in planes]
        return cls(format, num_rows, num_columns, np.ascontiguousarray(scales), planes)

    @classmethod
    def random(cls, format: str, num_rows: int, num_columns: int, seed: int = 0) -> Matrix:
        rng = np.random.default_rng(seed)
        is_empty = num_rows * num_columns == 0
        raw = b"" if is_empty else random_rows(format, num_rows, num_columns, rng).tobytes()
        return cls.of(format, num_rows, num_columns, raw)

    @property
    def is_float(self) -> bool:
        return FORMATS[self.format].is_float

    def magnitudes(self) -> NDArray[np.float64]:
        """Bounds of what is added up for each weight: scale times code, offset, minimum."""
        form = FORMATS[self.format]
        scales, minimums = unpack_scales(self.scales, self.format, self.num_rows, self.num_columns)
        bounds = np.abs(scales.astype(np.float64)) * ((1 << form.bits) + form.code_offset)
        if minimums is not None:
            bounds += np.abs(minimums)
        return np.repeat(bounds, form.scale_columns, axis=1)

    def weights(self, num_planes: int) -> Floats:
        return dequantize(
            self.scales, self.planes[:num_planes], self.format, self.num_rows, self.num_columns
        )


def is_supported(isa: str) -> bool:
    """Say whether this machine has an instruction set."""
    matrix = Matrix.random("F32", 1, 1)
    return product(matrix, np.ones((1, 1), np.float32), isa, check=False) is not None


def product(
    matrix: Matrix,
    x: Floats,
    isa: str,
    *,
    num_planes: int | None = None,
    merged: bool = False,
    bias: Floats | None = None,
    add_to: Floats | None = None,
    check: bool = True,
) -> Floats | None:
    """Return x W^T (+ bias) (+ add_to), (tokens, rows), by the kernels of one instruction set."""
    extent = Extent(0, 0, 0)
    planes = tuple(extent for _ in matrix.planes)
    scales = None if matrix.is_float else extent
    stored = StoredTensor("w", matrix.num_rows, matrix.num_columns, matrix.format, scales, planes)
    stride = -(-matrix.num_rows // 32) * 32
    out = np.zeros((len(x), stride), np.float32)
    if add_to is not None:
        out[:, : matrix.num_rows] = add_to
    padded = None if bias is None else np.zeros(stride, np.float32)
    if padded is not None:
        padded[: matrix.num_rows] = bias
    addresses = (ctypes.c_void_p * 5)(*(plane.ctypes.data for plane in matrix.planes))
    x = np.ascontiguousarray(x, np.float32)
    result = load_library().kernels_matmul(
        isa.encode(),
        ctypes.byref(native._tensor(stored, Placement())),
        len(matrix.planes) if num_planes is None else num_planes,
        matrix.scales.ctypes.data,
        ctypes.cast(addresses, ctypes.c_void_p),
        int(merged),
        *(x.ctypes.data, len(x), out.ctypes.data, stride),
        None if padded is None else padded.ctypes.data,
        int(add_to is not None),
    )
    if result != 0:
        assert not check, f"there are no {isa} kernels"
        return None
    return out[:, : matrix.num_rows]


def expected_product(
    matrix: Matrix, x: Floats, num_planes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the oracle's rounding of x gives, in float64, and a bound of float32's error.

    Adding n numbers in any order in float32 errs by at most n * UNIT times the sum of their
    magnitudes; a quantized block adds four times, for scales and offsets are rounded too.
    """
    weights = matrix.weights(num_planes).astype(np.float64)
    form = FORMATS[matrix.format]
    if matrix.is_float or (form.split_from and num_planes == len(form.plane_widths)):
        x = x.astype(np.float64)
        terms, magnitude = matrix.num_columns, np.abs(x) @ np.abs(weights).T
        return x @ weights.T, terms * UNIT * magnitude
    codes, scales = quantize_activations(torch.from_numpy(x))
    rounded = codes.double().numpy() * np.repeat(scales.double().numpy(), 32, axis=1)
    terms = matrix.num_columns // 32 * 4 + 4
    magnitude = np.abs(rounded) @ matrix.magnitudes().T
    return rounded @ weights.T, terms * UNIT * magnitude


def run_ops(
    directory: Path,
    ops: Sequence[Op],
    inputs: Mapping[str, Floats],
    widths: Mapping[str, int],
    vectors: Mapping[str, Floats],
    *,
    position: int = 0,
    placement: Placement | None = None,
    before: Sequence[Mapping[str, Floats]] = (),
    spec_changes: Mapping[str, int] | None = None,
) -> dict[str, Floats]:
    """Run operations that need no matrix on buffers of given content; return all buffers.

    Args:
        directory: for an empty file of weights.
        ops: what is run.
        inputs: by buffer, (tokens, width); all of one number of tokens.
        widths: of further buffers.
        vectors: by name.
        position: of the first token, or of the first of ``before``.
        placement: threads, kernels and so on.
        before: inputs of earlier runs at the positions before, in their order.
        spec_changes: sizes of the KV cache.
    """
    (directory / "weights.bin").write_bytes(b"")
    spec = small_spec(**(spec_changes or {}))
    buffers = {name: x.shape[1] for name, x in inputs.items()} | dict(widths)
    program = Program(buffers | {"unused": 1}, tuple(ops), (0, len(ops)), "unused")
    index = StoreIndex({}, spec, Layout({}, {}, Extent(0, 0, 0), 0, 0), {})
    store = WeightStore(directory, spec, {}, dict(vectors), np.zeros(1, np.uint64), index)
    with mock.patch.object(native, "compile_program", return_value=program):
        backend = NativeBackend(store, placement or Placement())
    with backend:
        num_tokens = 0
        for part in (*before, inputs):
            position += num_tokens
            num_tokens = len(next(iter(part.values())))
            for name, x in part.items():
                backend.buffer(name)[:num_tokens] = x
            backend.run_ops([0] * num_tokens, position, 0, len(ops))
        return {name: backend.buffer(name)[:num_tokens].copy() for name in buffers}
