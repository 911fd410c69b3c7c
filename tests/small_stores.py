"""Weight stores of small random models of every architecture, made without a source to read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_gguf import QUANTIZED, random_rows

from mutirao.errors import MissingKernelError
from mutirao.inference.architecture.model_spec import (
    ModelSpec,
    RopeSpec,
    matrix_shapes,
    rope_vectors,
    vector_shapes,
)
from mutirao.inference.native.library import load_library
from mutirao.inference.store.plane_formats import FORMATS
from mutirao.inference.store.planes import dequantize, pack
from mutirao.inference.store.store_index import StoredTensor, StoreIndex, checksum, plan_layout
from mutirao.inference.store.weight_store import WeightStore

LLAMA = {
    "architecture": "llama",
    "num_layers": 2,
    "d_model": 256,
    "embedding_dim": 256,
    "ffn_dim": 512,
    "vocab_size": 300,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "context_length": 256,
    "norm": "rms",
    "norm_eps": 1e-5,
    "attention_scale": 0.125,
    "activation": "silu",
    "tied_head": False,
    "rope": RopeSpec(10_000.0, 64, interleaved=True),
}
QWEN2 = LLAMA | {
    "architecture": "qwen2",
    "rope": RopeSpec(1_000_000.0, 64),
    "biases": ("attn_q", "attn_k", "attn_v"),
    "tied_head": True,
}
OPT = LLAMA | {
    "architecture": "opt",
    "num_kv_heads": 4,
    "norm": "layer",
    "activation": "relu",
    "rope": None,
    "tied_head": True,
    "gated_ffn": False,
    "biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
    "position_offset": 2,
}
SPECS = {
    "llama": ModelSpec(**LLAMA),
    "llama-yarn": ModelSpec(
        **LLAMA
        | {"rope": RopeSpec(1e4, 32, scaling="yarn", original_context=64, factor=4, magnitude=1.2)}
    ),
    "qwen2": ModelSpec(**QWEN2),
    "qwen2-odd-heads": ModelSpec(
        **QWEN2 | {"num_heads": 8, "head_dim": 20, "rope": RopeSpec(1e4, 12)}
    ),
    "qwen3": ModelSpec(
        **LLAMA
        | {"architecture": "qwen3", "head_dim": 96, "qk_norm": True, "rope": RopeSpec(1e6, 96)}
    ),
    "gemma3": ModelSpec(
        **LLAMA
        | {
            "architecture": "gemma3",
            "num_layers": 4,
            "norm_placement": "both",
            "qk_norm": True,
            "activation": "gelu_tanh",
            "tied_head": True,
            "embedding_scale": 16.0,
            "rope": RopeSpec(1e6, 64, scaling="linear", factor=8.0),
            "rope_local": RopeSpec(1e4, 64),
            "window": 6,
            "windowed_layers": (0, 2, 3),
        }
    ),
    "opt": ModelSpec(**OPT),
    "opt-after-projected": ModelSpec(
        **OPT | {"embedding_dim": 128, "norm_placement": "after", "final_norm": False}
    ),
}
"""Every kind of operation and every variant of it that a known architecture has."""


def small_spec(**changes: object) -> ModelSpec:
    """A one-layer llama of 32 columns and 5 tokens, with changes."""
    sizes = {"num_layers": 1, "d_model": 32, "embedding_dim": 32, "ffn_dim": 32, "vocab_size": 5}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "rope": RopeSpec(1e4, 16)}
    return ModelSpec(**LLAMA | sizes | heads | changes)


def mixed_formats(spec: ModelSpec, start: int = 0) -> dict[str, str]:
    """A quantized format for each matrix, each in turn where its columns allow it."""
    formats, index = {}, start
    for name, (_, num_columns) in matrix_shapes(spec).items():
        while num_columns % FORMATS[QUANTIZED[index % 8]].block_columns:
            index += 1
        formats[name] = QUANTIZED[index % 8]
        index += 1
    return formats


def random_vectors(
    shapes: Mapping[str, tuple[int]], rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Norms around 1, biases around 0."""
    return {
        name: rng.normal(0.0 if name.endswith("bias") else 1.0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_store(
    directory: Path,
    spec: ModelSpec,
    formats: Mapping[str, str] | str,
    *,
    seed: int = 0,
    spread: float = 0.08,
) -> WeightStore:
    """A store of random weights of standard deviation ``spread``.

    Matrices are of one format, or of one for each. Only ``weights.bin`` is written, so the store
    is opened by this alone.
    """
    rng = np.random.default_rng(seed)
    if isinstance(formats, str):
        formats = dict.fromkeys(matrix_shapes(spec), formats)
    layout = plan_layout(spec, formats)
    vectors = random_vectors(vector_shapes(spec), rng) | rope_vectors(spec)
    directory.mkdir(parents=True, exist_ok=True)
    content = np.zeros(layout.weights_bytes, np.uint8)
    sums = np.zeros(layout.num_checksums, np.uint64)
    for tensor in layout.tensors.values():
        scale = spread / weights_deviation(tensor.format)
        rows = random_rows(tensor.format, tensor.num_rows, tensor.num_columns, rng, scale)
        put_matrix(content, sums, tensor, rows.tobytes())
    content.tofile(directory / "weights.bin")
    index = StoreIndex({}, spec, layout, {})
    return WeightStore(directory, spec, layout.tensors, vectors, sums, index)


@cache
def weights_deviation(name: str) -> float:
    """Standard deviation of random weights of a format whose scales have a spread of 1."""
    rows = random_rows(name, 64, 256, np.random.default_rng(0), 1.0)
    scales, planes = pack(rows.tobytes(), name, 64, 256)
    return float(dequantize(scales, planes, name, 64, 256).std())


def put_matrix(
    content: NDArray[np.uint8], sums: NDArray[np.uint64], tensor: StoredTensor, raw: bytes
) -> None:
    """Write a matrix's extents and their checksums."""
    scales, planes = pack(raw, tensor.format, tensor.num_rows, tensor.num_columns)
    parts = planes if FORMATS[tensor.format].is_float else [scales, *planes]
    for extent, part in zip(tensor.extents, parts, strict=True):
        data = part.reshape(-1)
        content[extent.offset : extent.offset + extent.num_bytes] = data
        slab_bytes = extent.num_bytes // tensor.num_panels * 16
        for slab, begin in enumerate(range(0, data.size, slab_bytes)):
            sums[extent.checksums + slab] = checksum(data[begin : begin + slab_bytes])


def has_kernels() -> bool:
    """Whether the native library is there, or can be compiled."""
    try:
        load_library()
    except MissingKernelError:
        return False
    return True


def skip_without_kernels() -> None:
    """Skip a test that needs the native library, saying why it is not there."""
    try:
        load_library()
    except MissingKernelError as error:
        pytest.skip(str(error))
