"""The families of models that can be run: what their members share, and how files name tensors.

What a family always does (Qwen 2 has biases on queries, keys and values; Gemma 3 has norms on
both ends of a branch) stands in one table, ``FAMILIES``; ``architectures.py`` reads what differs
between its members. A new family is a new row, if ``ModelSpec`` can express it.

Sources: the configuration and modelling code of transformers 5.19, and llama.cpp (its GGUF
documentation and ``convert_hf_to_gguf.py``) for what GGUF files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mutirao.inference.architecture.model_spec import ModelSpec, matrix_shapes, vector_shapes

GGUF_ROPE_TABLE = "rope_freqs.weight"
LAYER_TYPES = ("full_attention", "sliding_attention")
"""How config.json calls layers that see everything, and those that have a window."""

_QKV = ("attn_q", "attn_k", "attn_v")
_ATTENTION = (*_QKV, "attn_output")

_LLAMA_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "layers.N.self_attn.q_proj": "blk.N.attn_q",
    "layers.N.self_attn.k_proj": "blk.N.attn_k",
    "layers.N.self_attn.v_proj": "blk.N.attn_v",
    "layers.N.self_attn.o_proj": "blk.N.attn_output",
    "layers.N.self_attn.q_norm": "blk.N.attn_q_norm",
    "layers.N.self_attn.k_norm": "blk.N.attn_k_norm",
    "layers.N.mlp.gate_proj": "blk.N.ffn_gate",
    "layers.N.mlp.up_proj": "blk.N.ffn_up",
    "layers.N.mlp.down_proj": "blk.N.ffn_down",
    "layers.N.input_layernorm": "blk.N.attn_norm",
    "layers.N.post_attention_layernorm": "blk.N.ffn_norm",
}
_GEMMA_TENSORS = _LLAMA_TENSORS | {
    "layers.N.post_attention_layernorm": "blk.N.post_attention_norm",
    "layers.N.pre_feedforward_layernorm": "blk.N.ffn_norm",
    "layers.N.post_feedforward_layernorm": "blk.N.post_ffw_norm",
}
_OPT_TENSORS = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "project_in": "project_in",
    "project_out": "project_out",
    "final_layer_norm": "output_norm",
    "layers.N.self_attn.q_proj": "blk.N.attn_q",
    "layers.N.self_attn.k_proj": "blk.N.attn_k",
    "layers.N.self_attn.v_proj": "blk.N.attn_v",
    "layers.N.self_attn.out_proj": "blk.N.attn_output",
    "layers.N.fc1": "blk.N.ffn_up",
    "layers.N.fc2": "blk.N.ffn_down",
    "layers.N.self_attn_layer_norm": "blk.N.attn_norm",
    "layers.N.final_layer_norm": "blk.N.ffn_norm",
}


@dataclass(frozen=True)
class Family:
    """What the models of a family share, and how their files name things.

    Attributes:
        tensors: names in a Hugging Face file (without prefix and ``.weight``) to store names.
        config_defaults: the config.json fields that matter to this family beside those that
            every family must give, and what its configuration class assumes without them.
        config_types: values of ``model_type`` in a config.json.
        gguf_type: value of ``general.architecture``; None: no GGUF file is read.
        prefixes: what stands before the names in a Hugging Face file.
        config_aliases: fields that it calls otherwise, to the usual name.
        constants: values of ModelSpec that hold for every member.
        biases: matrices that always have a bias.
        biases_if: config field that must be true for further biases, and which.
        gguf_interleaved: query and key rows are permuted in GGUF for interleaved RoPE.
        gguf_window: a GGUF file's window holds for ``all`` layers or by the ``pattern`` of the
            config defaults; None: a file that has one is refused.
        gguf_wide_scale_layers: a file of so many layers scales attention by the width per head,
            d_model / num_heads, rather than by head_dim; GGUF has no field for it.
        has_local_rope: windowed layers have their own RoPE base.
        scales_embedding: by the square root of d_model.
        norms_minus_one: a Hugging Face file holds w of a norm that multiplies by 1 + w.
    """

    tensors: Mapping[str, str]
    config_defaults: Mapping[str, Any]
    config_types: tuple[str, ...]
    gguf_type: str | None = None
    prefixes: tuple[str, ...] = ("model.", "")
    config_aliases: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    biases_if: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_interleaved: bool = False
    gguf_window: str | None = None
    gguf_wide_scale_layers: int | None = None
    has_local_rope: bool = False
    scales_embedding: bool = False
    norms_minus_one: bool = False


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        config_types=("llama",),
        gguf_type="llama",
        tensors=_LLAMA_TENSORS,
        config_defaults=_COMMON | {"max_position_embeddings": 2048},
        biases_if={"attention_bias": _ATTENTION, "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")},
        gguf_interleaved=True,
        gguf_window="all",
    ),
    "mistral": Family(  # its GGUF files call themselves llama
        config_types=("mistral",),
        tensors=_LLAMA_TENSORS,
        config_defaults=_COMMON
        | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        config_types=("qwen2",),
        gguf_type="qwen2",
        tensors=_LLAMA_TENSORS,
        config_defaults=_QWEN,
        biases=_QKV,
    ),
    "qwen3": Family(
        config_types=("qwen3",),
        gguf_type="qwen3",
        tensors=_LLAMA_TENSORS,
        config_defaults=_QWEN | {"head_dim": 128},
        constants={"qk_norm": True},
        biases_if={"attention_bias": _ATTENTION},
    ),
    "gemma3": Family(
        config_types=("gemma3", "gemma3_text"),
        gguf_type="gemma3",
        tensors=_GEMMA_TENSORS,
        prefixes=("model.", "language_model.model.", "model.language_model.", ""),
        config_aliases={"hidden_activation": "hidden_act"},
        config_defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
        },
        constants={"qk_norm": True, "norm_placement": "both"},
        biases_if={"attention_bias": _ATTENTION},
        gguf_window="pattern",
        gguf_wide_scale_layers=62,  # 27B (llama.cpp, src/llama-model.cpp, LLM_ARCH_GEMMA3)
        has_local_rope=True,
        scales_embedding=True,
        norms_minus_one=True,
    ),
    "opt": Family(
        config_types=("opt",),
        tensors=_OPT_TENSORS,
        prefixes=("model.decoder.", "decoder."),
        config_aliases={"activation_function": "hidden_act", "ffn_dim": "intermediate_size"},
        config_defaults={
            "hidden_act": "relu",
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None,
            "enable_bias": True,
            "tie_word_embeddings": True,
        },
        constants={"norm": "layer", "norm_eps": 1e-5, "gated_ffn": False, "position_offset": 2},
        biases_if={"enable_bias": (*_ATTENTION, "ffn_up", "ffn_down")},
    ),
}


def gguf_names(spec: ModelSpec) -> dict[str, str]:
    """Return store names by GGUF tensor names: exactly the tensors that a file must hold.

    ``rope_freqs.weight``, a table that ``rope_vectors`` takes, is not among them.
    """
    names = {f"{name}.weight": name for name in matrix_shapes(spec)}
    vectors = (name for name in vector_shapes(spec) if not name.startswith("rope_freqs"))
    return names | {name: name for name in vectors}


def hf_names(spec: ModelSpec) -> dict[str, str]:
    """Return store names by Hugging Face tensor names, under every prefix that is in use.

    Several of them lead to one store name; a model holds exactly one of each.
    """
    family = FAMILIES[spec.architecture]
    wanted = [*matrix_shapes(spec), *vector_shapes(spec)]
    stems = {ours: theirs for theirs, ours in family.tensors.items()}
    names: dict[str, str] = {}
    for name in wanted:
        if name == "output" or name.startswith("rope_freqs"):
            continue
        theirs = _hf_name(stems, name)
        names |= {prefix + theirs: name for prefix in family.prefixes}
    if not spec.tied_head:
        names |= {f"{prefix}lm_head.weight": "output" for prefix in ("", "language_model.")}
    return names


def _hf_name(stems: Mapping[str, str], name: str) -> str:
    """Return a store name's counterpart, without prefix: blk.3.attn_q.bias, of a layer."""
    stem, dot, part = name.rpartition(".")
    if not dot or part not in ("weight", "bias"):
        stem, part = name, "weight"
    if stem.startswith("blk."):
        _, index, role = stem.split(".")
        return stems[f"blk.N.{role}"].replace(".N.", f".{index}.") + f".{part}"
    return f"{stems[stem]}.{part}"


def hf_ignored(spec: ModelSpec, name: str) -> bool:
    """Say whether a Hugging Face tensor that ``hf_names`` lacks may be left out.

    Those are the head of a model whose embedding is its head, RoPE frequencies that old files
    keep beside the weights, and the vision part of a multimodal model.
    """
    is_tied_head = spec.tied_head and name.endswith("lm_head.weight")
    is_vision = any(f"{part}." in name for part in ("vision_tower", "multi_modal_projector"))
    return is_tied_head or is_vision or name.endswith(".rotary_emb.inv_freq")


def norms_stored_minus_one(spec: ModelSpec) -> frozenset[str]:
    """Return the vectors, by store name, to which 1 is added when read from a Hugging Face file.

    A GGUF file holds them with the 1 added.
    """
    if not FAMILIES[spec.architecture].norms_minus_one:
        return frozenset()
    return frozenset(name for name in vector_shapes(spec) if name.endswith("norm.weight"))
