"""What a GGUF file says of a model: metadata and tensors, from a Hugging Face configuration.

Llama, Mistral, Qwen 2 and Qwen 3 are described; what their GGUF architectures cannot say, or
what the engine here would not read back, is an error. Keys are those of the GGUF specification
(github.com/ggml-org/ggml, docs/gguf.md); names of tensors come from the gguf package. Left out:
Gemma and OPT, mixtures of experts, RoPE scaling whose frequencies depend on the length of the
text (``dynamic``, ``longrope``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import FormatError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architectures by ``model_type``."""
EMBEDDING, HEAD, ROPE_TABLE = "token_embd.weight", "output.weight", "rope_freqs.weight"

Metadata = dict[str, Any]
"""Values by key: bool, int, float, str, or a list of ints, floats or strings."""


@dataclass(frozen=True)
class GGUFDescription:
    """A model as a GGUF file describes it."""

    architecture: str
    metadata: Metadata
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor that must be there, (rows, columns) or (size,), by GGUF name in the order
    of the file."""
    bias_sizes: dict[str, int]
    """Of every bias that may be there."""
    num_heads: dict[str, int]
    """By 'attn_q' and 'attn_k', into how many heads the rows are divided whose halves GGUF
    interleaves; empty where it keeps their order."""
    rope_divisors: NDArray[np.float32] | None
    """(head_dim / 2,) by which RoPE's frequencies are divided, where the metadata cannot say."""

    def new_order(self, name: str) -> NDArray[np.intp] | None:
        """Return which of the source's rows each row of a tensor is; None where all stay.

        A head's rows 0..n are x and n..2n are y of n pairs that RoPE turns; the llama
        architecture has each x beside its y.
        """
        role = name.split(".")[-2]
        if role not in self.num_heads:
            return None
        size = self.bias_sizes[f"{name.rpartition('.')[0]}.bias"]
        halves = np.arange(size).reshape(self.num_heads[role], 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)


def describe(config: Any) -> GGUFDescription:
    """Describe a model.

    Args:
        config: transformers' configuration of it.

    Raises:
        FormatError: an architecture, or a feature of one, that is not written as GGUF.
    """
    if config.model_type not in ARCHITECTURES:
        raise FormatError(
            f"models of architecture {config.model_type} are not exported as GGUF (expected one "
            f"of {', '.join(ARCHITECTURES)})"
        )
    _refuse(config)
    architecture = ARCHITECTURES[config.model_type]
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head_dim,
    }
    if head_dim * heads != config.hidden_size or architecture == "qwen3":
        sizes |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if window := _window(config):
        sizes["attention.sliding_window"] = window
    rope, divisors = _rope(config, head_dim)
    shapes, bias_sizes = _shapes(config, heads * head_dim, kv_heads * head_dim, head_dim)
    if divisors is not None:
        shapes[ROPE_TABLE] = divisors.shape
    return GGUFDescription(
        architecture,
        {f"{architecture}.{key}": value for key, value in (sizes | rope).items()},
        shapes,
        bias_sizes,
        {"attn_q": heads, "attn_k": kv_heads} if architecture == "llama" else {},
        divisors,
    )


def gguf_names(config: Any, names: Iterable[str]) -> dict[str, str]:
    """Return GGUF names of a model's tensors by their own; those that are not kept are left out.

    Not kept are the head of a model whose embedding is its head, and frequencies that old files
    hold beside the weights.

    Raises:
        FormatError: a tensor has no place in a model of this architecture.
    """
    import gguf

    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found: dict[str, str] = {}
    for name in names:
        is_tied_head = name == "lm_head.weight" and config.tie_word_embeddings
        if is_tied_head or name.endswith(".rotary_emb.inv_freq"):
            continue
        whole = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
        there = table.get_name(whole, (".weight", ".bias"))
        if there is None:
            raise FormatError(
                f"tensor {name[:100]!r} has no place in a GGUF file of architecture "
                f"{ARCHITECTURES[config.model_type]}; choose another model"
            )
        found[name] = there
    return found


def _refuse(config: Any) -> None:
    """Refuse what changes the maths and what these architectures have no key for."""
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "partial_rotary_factor": (1, None),
        "num_local_experts": (0, None),
    }
    if ARCHITECTURES[config.model_type] != "llama":
        accepted["use_sliding_window"] = (False, None)
    rope = getattr(config, "rope_parameters", None) or {}
    for name, values in accepted.items():
        value = rope.get(name, getattr(config, name, None))
        if value not in values:
            raise FormatError(
                f"{config.model_type} with {name}={value!r} cannot be written as GGUF (expected "
                f"{values[0]!r})"
            )


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given) if given else int(config.hidden_size // config.num_attention_heads)


def _window(config: Any) -> int | None:
    """Return the window of attention of all layers, where the context is longer."""
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return int(window) if window and window < config.max_position_embeddings else None


def _shapes(
    config: Any, query_dim: int, kv_dim: int, head_dim: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    d_model, ffn_dim = config.hidden_size, config.intermediate_size
    matrices = {
        "attn_q": (query_dim, d_model),
        "attn_k": (kv_dim, d_model),
        "attn_v": (kv_dim, d_model),
        "attn_output": (d_model, query_dim),
        "ffn_gate": (ffn_dim, d_model),
        "ffn_up": (ffn_dim, d_model),
        "ffn_down": (d_model, ffn_dim),
    }
    norms = {"attn_norm": d_model, "ffn_norm": d_model}
    if config.model_type == "qwen3":
        norms |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d_model)}
    biases: dict[str, int] = {}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"blk.{layer}.{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in matrices.items()}
        biases |= {f"blk.{layer}.{name}.bias": shape[0] for name, shape in matrices.items()}
    shapes["output_norm.weight"] = (d_model,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, d_model)
    return shapes, biases


def _rope(config: Any, head_dim: int) -> tuple[Metadata, NDArray[np.float32] | None]:
    """Return RoPE's metadata and, for llama3's scaling, its table of divisors."""
    written = dict(getattr(config, "rope_parameters", None) or {})
    kind = written.get("rope_type", "default")
    values: Metadata = {"rope.freq_base": float(written.get("rope_theta", 10_000.0))}
    trained = written.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "default":
        return values, None
    if kind == "llama3":
        return values, _llama3_divisors(written, values["rope.freq_base"], head_dim, trained)
    if kind == "linear" or (kind == "yarn" and _is_plain_yarn(written)):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(written["factor"])}
        if kind == "yarn":
            values["rope.scaling.original_context_length"] = int(trained)
            values["rope.scaling.yarn_beta_fast"] = float(written.get("beta_fast") or 32.0)
            values["rope.scaling.yarn_beta_slow"] = float(written.get("beta_slow") or 1.0)
        return values, None
    shown = {key: value for key, value in written.items() if key != "rope_theta"}
    raise FormatError(
        f"RoPE scaling {shown} cannot be written as GGUF (expected rope_type default, linear, "
        "llama3, or yarn with no mscale, its own attention_factor and truncate left as it is)"
    )


def _is_plain_yarn(written: Metadata) -> bool:
    """Whether YaRN is such as a GGUF file without further keys means it."""
    factor, magnitude = float(written["factor"]), written.get("attention_factor")
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return (
        not written.get("mscale")
        and not written.get("mscale_all_dim")
        and written.get("truncate", True) is not False
        and (magnitude is None or math.isclose(magnitude, usual, rel_tol=1e-6))
    )


def _llama3_divisors(
    written: Metadata, theta: float, head_dim: int, trained: int
) -> NDArray[np.float32]:
    """Return (head_dim / 2,) by what Llama 3.1 divides RoPE's frequencies (arXiv:2407.21783).

    A wave that turns ``high_freq_factor`` times in the context of the training stays; one that
    turns fewer than ``low_freq_factor`` times is ``factor`` times as long; between them the
    frequencies are blended.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = trained * frequencies / (2 * math.pi)
    low, high = float(written["low_freq_factor"]), float(written["high_freq_factor"])
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / float(written["factor"]))).astype(np.float32)
