"""Small GGUF files of every format: random blocks, a byte vocabulary, two layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 256, 512, 4, 2, 2

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
SPLITS = ("BF16_SPLIT", "F16_SPLIT")
"""How the store keeps most of the latter two."""

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)} | {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where a block's float16 scales lie, in bytes."""


def block_bytes(name: str) -> tuple[int, int]:
    """Numbers and bytes per block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def random_rows(
    name: str, num_rows: int, num_columns: int, rng: np.random.Generator, spread: float = 0.05
) -> NDArray[np.uint8]:
    """Rows of blocks with any codes and finite scales, uint8 (rows, bytes)."""
    name = name.removesuffix("_SPLIT")
    if name in FLOATS:
        values = rng.normal(scale=spread, size=(num_rows, num_columns)).astype(np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    size, num_bytes = block_bytes(name)
    shape = (num_rows, num_columns // size, num_bytes)
    blocks = rng.integers(0, 256, shape, np.uint8)
    for place in HALVES.get(name, ()):
        scales = rng.normal(scale=spread / 8, size=(*shape[:2], 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(num_rows, -1)


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def matrix_shapes(*, is_tied: bool = True) -> dict[str, tuple[int, int]]:
    """The matrices of the file, rows first, by GGUF name without ``.weight``."""
    kv_dim = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (260, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv_dim, HIDDEN),
            f"blk.{layer}.attn_v": (kv_dim, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, INNER),
        }
    return shapes if is_tied else shapes | {"output": (260, HIDDEN)}


def vector_names() -> list[str]:
    """The norms of the file, by GGUF name."""
    layers = (f"blk.{n}.{kind}_norm.weight" for n in range(LAYERS) for kind in ("attn", "ffn"))
    return ["output_norm.weight", *layers]


def write_tiny_gguf(
    path: Path,
    formats: Mapping[str, str] | str = "Q8_0",
    *,
    seed: int = 0,
    is_tied: bool = True,
) -> dict[str, NDArray[np.uint8]]:
    """Write a two-layer llama; return each matrix's raw rows, by name without ``.weight``.

    ``formats`` is one for all matrices, or one for some by name and Q8_0 for the rest.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĊĊ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    rows = {}
    for name, (num_rows, num_columns) in matrix_shapes(is_tied=is_tied).items():
        kind = formats if isinstance(formats, str) else formats.get(name, "Q8_0")
        rows[name] = random_rows(kind, num_rows, num_columns, rng)
        dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", rows[name], raw_dtype=dtype)
    for name in vector_names():
        writer.add_tensor(name, rng.normal(1, 0.1, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rows
