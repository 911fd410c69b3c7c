"""Read a model's specification from GGUF metadata or from a Hugging Face config.json.

Nothing is guessed: a family that is not in the table of ``families.py``, a field that changes
the maths and is not supported, or a GGUF tensor that the specification does not account for is
an error. Nor is anything computed: sizes up to 70B and beyond are read from a config alone.

Left out: mixtures of experts, soft-capping, encoders, vision towers (a multimodal Gemma 3 is
read as its text model), and RoPE scaling by ``dynamic`` and ``longrope``, whose frequencies
depend on the length of the text. How weights are quantized is the weight store's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mutirao.errors import FormatError
from mutirao.inference.architecture.description_fields import (
    count,
    flag,
    number,
    refuse,
    token_ids,
    uniform,
    unsupported,
)
from mutirao.inference.architecture.families import (
    FAMILIES,
    GGUF_ROPE_TABLE,
    LAYER_TYPES,
    Family,
    gguf_names,
    hf_ignored,
    hf_names,
    norms_stored_minus_one,
)
from mutirao.inference.architecture.model_spec import (
    MATRICES,
    MAX_LAYERS,
    ModelSpec,
    RopeSpec,
    matrix_shapes,
    rope_vectors,
    vector_shapes,
)
from mutirao.inference.architecture.rope_description import config_rope, gguf_rope

__all__ = [
    "GGUF_ROPE_TABLE",
    "ModelSpec",
    "RopeSpec",
    "gguf_names",
    "hf_ignored",
    "hf_names",
    "matrix_shapes",
    "norms_stored_minus_one",
    "rope_vectors",
    "spec_from_config",
    "spec_from_gguf",
    "vector_shapes",
]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Other families' configurations may hold these, and their models take no notice.
_OF_SOME_FAMILIES = {
    "sliding_window",
    "use_sliding_window",
    "sliding_window_pattern",
    "max_window_layers",
    "layer_types",
    "query_pre_attn_scalar",
    "word_embed_proj_dim",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
}

# Fields that change the maths, each with the values under which they change nothing.
_REFUSED_IN_CONFIG: dict[str, tuple[Any, ...]] = {
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "layer_norm_elementwise_affine": (None, True),
    "partial_rotary_factor": (None, 1),
}
_REFUSED_IN_GGUF: dict[str, tuple[Any, ...]] = {
    "expert_count": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "attention.causal": (None, True),
    "attention.scale": (None, 0),
    "attention.clamp_kqv": (None, 0),
    "attention.max_alibi_bias": (None, 0),
    "attention.temperature_scale": (None, 0),
    "logit_scale": (None, 0, 1),
    "residual_scale": (None, 0, 1),
    "embedding_scale": (None, 0, 1),
    "use_parallel_residual": (None, False),
    "rope.scaling.attn_factor": (None, 1),
    "rope.scaling.yarn_attn_factor": (None, 1),
    "rope.scaling.yarn_ext_factor": (None, 1),
    "rope.scaling.yarn_log_multiplier": (None, 0),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Read a specification from a config.json; no weights are needed.

    Args:
        config: the parsed file, with RoPE written the old way or the new.

    Raises:
        FormatError: the family, or a field that changes the maths, is not supported; a field is
            missing or out of range.
    """
    model_type = config.get("model_type")
    name = next((n for n, f in FAMILIES.items() if model_type in f.config_types), None)
    if name is None:
        accepted = [kind for family in FAMILIES.values() for kind in family.config_types]
        raise unsupported("model_type", model_type, accepted)
    family = FAMILIES[name]
    fields = _config_fields(family, config)
    refuse(fields, _REFUSED_IN_CONFIG)
    values = {"architecture": name} | _config_sizes(fields)
    values |= _config_window(family, fields, values["num_layers"])
    values |= config_rope(family, fields, values["head_dim"])
    biases = [
        bias for key, group in family.biases_if.items() if flag(fields, key) for bias in group
    ]
    has_norm_before = flag(fields, "do_layer_norm_before", True)
    values |= {
        "norm": "rms",
        "norm_eps": number(fields, "rms_norm_eps", 1e-5),
        "norm_placement": "before" if has_norm_before else "after",
        "final_norm": has_norm_before and not flag(fields, "_remove_final_layer_norm"),
        "attention_scale": count(fields, "query_pre_attn_scalar", values["head_dim"]) ** -0.5,
        "activation": _activation(fields["hidden_act"]),
        "biases": (*family.biases, *biases),
        "tied_head": flag(fields, "tie_word_embeddings"),
        "embedding_scale": math.sqrt(values["d_model"]) if family.scales_embedding else 1.0,
        "eos_token_ids": token_ids(fields.get("eos_token_id")),
    }
    return ModelSpec(**values | dict(family.constants))


def spec_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """Read a specification from a GGUF file's metadata and tensor shapes.

    Args:
        metadata: values by key; arrays as lists.
        shapes: each tensor's (rows, columns) or (size,): the reverse of the order in the file.

    Raises:
        FormatError: as ``spec_from_config``; or a tensor is missing, of another shape than the
            metadata say, or not accounted for.
    """
    kind = metadata.get("general.architecture")
    name = next((n for n, f in FAMILIES.items() if kind and kind == f.gguf_type), None)
    if name is None:
        accepted = [family.gguf_type for family in FAMILIES.values() if family.gguf_type]
        raise unsupported("general.architecture", kind, accepted)
    family = FAMILIES[name]
    prefix = f"{kind}."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    refuse(fields, _REFUSED_IN_GGUF)
    values = {"architecture": name} | _gguf_sizes(fields, shapes)
    values |= _gguf_window(family, fields, values["num_layers"])
    values |= gguf_rope(family, fields, values["head_dim"], GGUF_ROPE_TABLE in shapes)
    d_model, scaled_dim = values["d_model"], values["head_dim"]
    if values["num_layers"] == family.gguf_wide_scale_layers:
        scaled_dim = d_model // values["num_heads"]
    biases = (bias for bias in MATRICES if f"blk.0.{bias}.bias" in shapes or bias in family.biases)
    eos = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot"))
    values |= {
        "norm": "rms",
        "norm_eps": number(fields, "attention.layer_norm_rms_epsilon"),
        "attention_scale": scaled_dim**-0.5,
        "activation": _activation(family.config_defaults["hidden_act"]),
        "biases": tuple(biases),
        "tied_head": "output.weight" not in shapes,
        "embedding_scale": math.sqrt(d_model) if family.scales_embedding else 1.0,
        "eos_token_ids": token_ids([token for token in eos if token is not None]),
    }
    spec = ModelSpec(**values | dict(family.constants))
    _check_tensors(spec, shapes)
    return spec


def _config_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's fields by their usual names, the family's defaults filled in.

    A multimodal config keeps the text model's fields apart, all but two.
    """
    text = config.get("text_config")
    fields = dict(text if isinstance(text, Mapping) else config)
    for key in ("tie_word_embeddings", "eos_token_id"):
        if key in config:
            fields[key] = config[key]
    for theirs, ours in family.config_aliases.items():
        fields.pop(ours, None)
        if theirs in fields:
            fields[ours] = fields.pop(theirs)
    foreign = _OF_SOME_FAMILIES - set(family.config_defaults)
    return {**family.config_defaults, **{k: v for k, v in fields.items() if k not in foreign}}


def _config_sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    d_model, num_heads = count(fields, "hidden_size"), count(fields, "num_attention_heads")
    if fields.get("head_dim") is None and d_model % num_heads:
        raise FormatError(
            f"hidden_size={d_model} is not a multiple of num_attention_heads={num_heads}, and "
            "head_dim is not given; download the model again"
        )
    return {
        "num_layers": count(fields, "num_hidden_layers", limit=MAX_LAYERS),
        "d_model": d_model,
        "embedding_dim": count(fields, "word_embed_proj_dim", d_model),
        "ffn_dim": count(fields, "intermediate_size"),
        "vocab_size": count(fields, "vocab_size"),
        "num_heads": num_heads,
        "num_kv_heads": count(fields, "num_key_value_heads", num_heads),
        "head_dim": count(fields, "head_dim", d_model // num_heads),
        "context_length": count(fields, "max_position_embeddings"),
    }


def _gguf_sizes(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    fields = {key: uniform(key, value) for key, value in fields.items()}
    d_model, num_heads = count(fields, "embedding_length"), count(fields, "attention.head_count")
    head_dim = count(fields, "attention.key_length", max(d_model // num_heads, 1))
    if count(fields, "attention.value_length", head_dim) != head_dim:
        raise unsupported(
            "attention.value_length", fields["attention.value_length"], [str(head_dim)]
        )
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise FormatError(
            f"token_embd.weight has shape {embedding} (expected rows and columns of a matrix); "
            "download or convert the model again"
        )
    return {
        "num_layers": count(fields, "block_count", limit=MAX_LAYERS),
        "d_model": d_model,
        "embedding_dim": d_model,
        "ffn_dim": count(fields, "feed_forward_length"),
        "vocab_size": int(embedding[0]),
        "num_heads": num_heads,
        "num_kv_heads": count(fields, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "context_length": count(fields, "context_length"),
    }


def _config_window(family: Family, fields: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    window = fields.get("sliding_window")
    if not flag(fields, "use_sliding_window", True):
        window = None
    if window is None and not family.has_local_rope:
        return {"window": None, "windowed_layers": ()}
    layers = _windowed_layers(fields, num_layers)
    return {"window": count(fields, "sliding_window"), "windowed_layers": layers}


def _windowed_layers(fields: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the indices of the windowed layers: as listed, or by the family's own rule."""
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        is_complete = isinstance(layer_types, list) and len(layer_types) == num_layers
        if not is_complete or any(kind not in LAYER_TYPES for kind in layer_types):
            raise FormatError(
                f"layer_types={str(layer_types)[:200]} is not supported (expected {num_layers} "
                f"of {', '.join(LAYER_TYPES)})"
            )
        return tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    if "sliding_window_pattern" in fields:
        pattern = count(fields, "sliding_window_pattern")
        return tuple(i for i in range(num_layers) if (i + 1) % pattern)
    first = fields.get("max_window_layers", 0)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise unsupported("max_window_layers", first, ["a count of layers"])
    return tuple(range(first, num_layers))


def _gguf_window(family: Family, fields: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    window = fields.get("attention.sliding_window")
    if not window and not family.has_local_rope:
        return {"window": None, "windowed_layers": ()}
    if family.gguf_window is None:
        raise unsupported("attention.sliding_window", window, ["none in this family"])
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == num_layers:
        layers = tuple(i for i, is_windowed in enumerate(pattern) if is_windowed)
    elif family.gguf_window == "all":
        layers = tuple(range(num_layers))
    else:
        key = "sliding_window_pattern"
        rule = {key: family.config_defaults[key] if pattern is None else pattern}
        layers = _windowed_layers(rule, num_layers)
    return {"window": count(fields, "attention.sliding_window"), "windowed_layers": layers}


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise unsupported("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]


def _check_tensors(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a GGUF file holds exactly the tensors of a specification, in their shapes."""
    ours: dict[str, tuple[int, ...]] = {**matrix_shapes(spec), **vector_shapes(spec)}
    names = gguf_names(spec)
    for name, stored in names.items():
        if tuple(shapes.get(name, ())) != ours[stored]:
            came = tuple(shapes[name]) if name in shapes else "not there"
            raise FormatError(
                f"tensor {name} is {came} (expected shape {ours[stored]}, rows first, as the "
                "model's metadata say); download or convert the model again"
            )
    for name in shapes:
        if name not in names and name != GGUF_ROPE_TABLE:
            shown = "".join(c if c.isprintable() else "?" for c in name[:100])
            raise FormatError(
                f"tensor {shown} has no place in a model of the {spec.architecture} family as it "
                "is supported (no mixture of experts, no fused matrices); choose another model"
            )
