"""Synthetic GGUF files of some size: random weights that make no sense, quickly written.

And a home for tests of the engine: a cache of its own, with the kernels that are compiled
already, and a probe of the machine that took a moment instead of ten seconds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from small_stores import skip_without_kernels, weights_deviation
from tiny_gguf import byte_alphabet, random_rows

from mutirao.errors import InputError
from mutirao.inference.engine import Engine
from mutirao.inference.native.library import load_library
from mutirao.inference.planning import probe

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĊĊ")
EOS = 2
HEAD_DIM = 64


def write_synthetic_gguf(
    path: Path,
    *,
    hidden: int = 256,
    inner: int = 512,
    num_layers: int = 2,
    kind: str = "Q4_K",
    context: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    deviation: float | None = None,
    eos: int = EOS,
    seed: int = 0,
) -> Path:
    """Write a llama of random blocks, four query heads to a key/value head; return its path.

    Weights have a deviation of 1.2 / sqrt(hidden), so that numbers stay about as large as they
    are from layer to layer.
    """
    rng = np.random.default_rng(seed)
    heads, kv_heads = hidden // HEAD_DIM, max(1, hidden // HEAD_DIM // 4)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Synthetic")
    writer.add_block_count(num_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    spread = (1.2 / hidden**0.5 if deviation is None else deviation) / weights_deviation(kind)
    dtype = gguf.GGMLQuantizationType[kind]
    shapes = {"token_embd": (len(TOKENS), hidden), "output": (len(TOKENS), hidden)}
    for layer in range(num_layers):
        kv_dim = kv_heads * HEAD_DIM
        shapes |= {
            f"blk.{layer}.attn_q": (hidden, hidden),
            f"blk.{layer}.attn_k": (kv_dim, hidden),
            f"blk.{layer}.attn_v": (kv_dim, hidden),
            f"blk.{layer}.attn_output": (hidden, hidden),
            f"blk.{layer}.ffn_gate": (inner, hidden),
            f"blk.{layer}.ffn_up": (inner, hidden),
            f"blk.{layer}.ffn_down": (hidden, inner),
        }
        for norm in ("attn", "ffn"):
            writer.add_tensor(f"blk.{layer}.{norm}_norm.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for name, (rows, columns) in shapes.items():
        blocks = random_rows(kind, rows, columns, rng, spread)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def engine_home(home: Path, num_threads: int = 2) -> Iterator[Path]:
    """Use a folder as MUTIRAO_HOME, with kernels and a quick probe in its cache."""
    skip_without_kernels()
    library = Path(load_library()._name)
    (home / "cache" / "kernels").mkdir(parents=True)
    shutil.copy(library, home / "cache" / "kernels")
    quick = {"ROUNDS": 1, "MAX_SECONDS": 0.1, "FILE_BYTES": 1 << 23, "READ_SLICE_S": 0.002}
    small = {"MATRIX_BYTES": 1 << 20, "MAX_MATRIX_BYTES": 1 << 20, "PRODUCT_S": 0.001}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUTIRAO_HOME", str(home))
        with mock.patch.multiple(probe, **quick, **small):
            probe.probe(home, num_threads)
        yield home


def least_memory(path: Path, **settings: object) -> int:
    """Return the least memory that the engine says this process needs for a model, in bytes."""
    with pytest.raises(InputError) as raised:
        Engine.open(path, memory=1_000_000, **settings)
    words = str(raised.value).split("at least ")[1].split()
    assert words[1].startswith("MB")
    return int(words[0]) * 1_000_000


def model_bytes(engine: Engine) -> int:
    """Return the bytes of a model's matrices that are multiplied."""
    choice = engine.opened.choice
    return choice.resident_bytes + choice.streamed_bytes


def child_environment(home: Path) -> dict[str, str]:
    """Return the environment for a process that uses a home, on its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MUTIRAO")}
    return kept | {"MUTIRAO_HOME": str(home)}
