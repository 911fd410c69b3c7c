"""What a model's own description becomes, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import FormatError
from mutirao.inference.architecture.architectures import (
    GGUF_ROPE_TABLE,
    ModelSpec,
    RopeSpec,
    gguf_names,
    hf_ignored,
    hf_names,
    matrix_shapes,
    norms_stored_minus_one,
    rope_vectors,
    spec_from_config,
    spec_from_gguf,
    vector_shapes,
)

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _sizes(layers, width, mlp, heads, kv_heads, vocab, **more):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    } | more


# Fields of the published config.json files that matter, and the models' published sizes.
PUBLISHED = {
    "Llama-2-7b": (
        {"model_type": "llama"} | _sizes(32, 4096, 11_008, 32, 32, 32_000),
        6_738_415_616,
    ),
    "Llama-3.1-70B": (
        {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE}
        | _sizes(80, 8192, 28_672, 64, 8, 128_256, max_position_embeddings=131_072),
        70_553_706_496,
    ),
    "SmolLM2-135M": (
        {"model_type": "llama", "tie_word_embeddings": True} | _sizes(30, 576, 1536, 9, 3, 49_152),
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "sliding_window": 4096} | _sizes(32, 4096, 14_336, 32, 8, 32_000),
        7_241_732_096,
    ),
    "Qwen2.5-72B": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131_072}
        | _sizes(80, 8192, 29_568, 64, 8, 152_064),
        72_706_203_648,
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True}
        | _sizes(28, 1024, 3072, 16, 8, 151_936),
        596_049_920,
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512}
        | _sizes(26, 1152, 6912, 4, 1, 262_144),
        999_885_952,
    ),
    "opt-350m": (
        {
            "model_type": "opt",
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_attention_heads": 16,
            "vocab_size": 50_272,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
        331_196_416,
    ),
}
SMALL = {"model_type": "llama"} | _sizes(2, 64, 96, 4, 2, 100)


def _num_parameters(spec):
    vectors = {k: v for k, v in vector_shapes(spec).items() if not k.startswith("rope_freqs")}
    return sum(rows * columns for rows, columns in matrix_shapes(spec).values()) + sum(
        size for (size,) in vectors.values()
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    config, num_parameters = PUBLISHED[name]
    assert _num_parameters(spec_from_config(config)) == num_parameters


def test_a_multimodal_gemma_is_read_as_its_text_model():
    # As gemma-3-4b-it has it: most fields are left to the defaults.
    config = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    }
    spec = spec_from_config(config)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    assert spec.windowed_layers[:6] == (0, 1, 2, 3, 4, 6)
    assert (spec.window, len(spec.windowed_layers)) == (1024, 29)
    assert spec.rope == RopeSpec(1_000_000.0, 256, scaling="linear", factor=8.0)
    assert spec.rope_local == RopeSpec(10_000.0, 256)
    assert spec.eos_token_ids == (1, 106)
    assert spec.embedding_scale == pytest.approx(2560**0.5)
    assert (spec.attention_scale, spec.activation) == (1 / 16, "gelu_tanh")


def test_rope_is_read_as_it_was_written_before_and_is_now():
    old = {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE}
    new = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500_000.0}}
    spec = spec_from_config(SMALL | old)
    assert spec == spec_from_config(SMALL | new)
    assert spec.rope is not None
    assert (spec.rope.scaling, spec.rope.original_context) == ("llama3", 8192)


def test_old_and_new_gemma_rope_are_one():
    config = PUBLISHED["gemma-3-1b"][0]
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": scaling}
    new = {
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        }
    }
    assert spec_from_config(config | old) == spec_from_config(config | new)


def test_another_familys_fields_change_nothing():
    foreign = {"sliding_window": 8, "query_pre_attn_scalar": 3, "word_embed_proj_dim": 32}
    assert spec_from_config(SMALL | foreign) == spec_from_config(SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mamba"),
        ("model_type", None),
        ("num_local_experts", 8),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_bidirectional_attention", True),
        ("layer_norm_elementwise_affine", False),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1.0}, "rope_type": ["x"]}),
        ("hidden_act", "xielu"),
        ("hidden_act", ["silu"]),
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", 65),
        ("hidden_size", "64"),
        ("num_hidden_layers", 10**9),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("attention_bias", "yes"),
        ("rms_norm_eps", float("nan")),
        ("vocab_size", True),
        ("eos_token_id", -1),
        ("eos_token_id", [2, "x"]),
    ],
)
def test_what_changes_the_maths_and_is_not_supported_is_refused(field, value):
    with pytest.raises(FormatError, match=r"expected|not define|not a multiple") as error:
        spec_from_config(SMALL | {field: value})
    assert len(str(error.value)) < 500


def test_an_unknown_family_is_named_with_those_that_are_supported():
    with pytest.raises(FormatError, match=r"'mamba'.*llama or mistral or qwen2 or .* or opt"):
        spec_from_config(SMALL | {"model_type": "mamba"})


@pytest.mark.parametrize("layer_types", [["sliding_attention"], ["chunked_attention"] * 28, "all"])
def test_unknown_layer_types_are_refused(layer_types):
    config = PUBLISHED["Qwen3-0.6B"][0] | {"use_sliding_window": True}
    with pytest.raises(FormatError, match="layer_types"):
        spec_from_config(config | {"layer_types": layer_types})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_spec_survives_json(name):
    spec = spec_from_config(PUBLISHED[name][0])
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_layers": "2"},
        {"rope": {"theta": 1.0}},
        {"rope": None, "rope_local": {"theta": 1.0}},
        {"activation": "tanh"},
        {"norm": "batch"},
        {"norm_placement": "around"},
        {"biases": ["attn_z"]},
        {"windowed_layers": [1]},
        {"window": 4, "windowed_layers": [2]},
        {"window": 4, "windowed_layers": [1, 0]},
        {"num_kv_heads": 3},
        {"position_offset": -1},
        {"norm_eps": 0.0},
        {"surprise": 1},
    ],
)
def test_an_altered_spec_is_refused(change):
    values = spec_from_config(SMALL).to_json()
    with pytest.raises(FormatError):
        ModelSpec.from_json(values | change)


def test_an_incomplete_spec_is_refused():
    values = spec_from_config(SMALL).to_json()
    del values["window"]
    with pytest.raises(FormatError, match="window"):
        ModelSpec.from_json(values)
    with pytest.raises(FormatError, match="list"):
        ModelSpec.from_json([1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_has_one_name_in_a_gguf_and_under_each_prefix_one_in_a_directory(name):
    spec = spec_from_config(PUBLISHED[name][0])
    stored = {n for n in vector_shapes(spec) if not n.startswith("rope_freqs")}
    stored |= set(matrix_shapes(spec))
    assert sorted(gguf_names(spec).values()) == sorted(stored)
    assert set(hf_names(spec).values()) == stored


def test_names_in_a_directory():
    names = hf_names(spec_from_config(PUBLISHED["gemma-3-1b"][0]))
    assert names["model.layers.3.post_attention_layernorm.weight"] == (
        "blk.3.post_attention_norm.weight"
    )
    assert names["language_model.model.layers.3.mlp.up_proj.weight"] == "blk.3.ffn_up"
    names = hf_names(spec_from_config(PUBLISHED["Qwen2.5-72B"][0]))
    assert names["model.layers.79.post_attention_layernorm.weight"] == "blk.79.ffn_norm.weight"
    assert names["model.layers.79.self_attn.k_proj.bias"] == "blk.79.attn_k.bias"
    assert names["lm_head.weight"] == "output"
    names = hf_names(spec_from_config(PUBLISHED["opt-350m"][0]))
    assert names["model.decoder.layers.0.final_layer_norm.bias"] == "blk.0.ffn_norm.bias"
    assert names["decoder.embed_positions.weight"] == "position_embd"


def test_what_may_be_left_out_of_a_directory():
    tied = spec_from_config(SMALL | {"tie_word_embeddings": True})
    assert hf_ignored(tied, "lm_head.weight")
    assert not hf_ignored(spec_from_config(SMALL), "lm_head.weight")
    assert hf_ignored(tied, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert hf_ignored(tied, "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    assert not hf_ignored(tied, "model.layers.0.mlp.experts.0.up_proj.weight")


def test_only_gemma_norms_are_stored_minus_one():
    gemma = spec_from_config(PUBLISHED["gemma-3-1b"][0])
    assert len(norms_stored_minus_one(gemma)) == 26 * 6 + 1
    assert "blk.0.attn_k_norm.weight" in norms_stored_minus_one(gemma)
    assert not norms_stored_minus_one(spec_from_config(SMALL))


def test_frequencies():
    spec = spec_from_config(SMALL)
    got = rope_vectors(spec)
    assert set(got) == {"rope_freqs"}
    expected = [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 10**-2.5, 0.001, 10**-3.5]
    np.testing.assert_allclose(got["rope_freqs"], expected, rtol=1e-6)
    assert got["rope_freqs"].dtype == np.float32
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    scaled = rope_vectors(spec_from_config(SMALL | linear))
    np.testing.assert_allclose(scaled["rope_freqs"], got["rope_freqs"] / 4, rtol=1e-6)
    assert not rope_vectors(spec_from_config(PUBLISHED["opt-350m"][0]))


def test_a_table_of_rope_factors():
    metadata, shapes = _gguf()
    spec = spec_from_gguf(metadata, shapes | {GGUF_ROPE_TABLE: (8,)})
    table = np.array([1, 1, 2, 2, 4, 4, 8, 8], np.float32)
    plain = rope_vectors(spec_from_gguf(metadata, shapes))["rope_freqs"]
    np.testing.assert_allclose(rope_vectors(spec, table)["rope_freqs"], plain / table, rtol=1e-6)
    for bad in (None, table[:4], table * 0, table * np.nan):
        with pytest.raises(FormatError, match="RoPE factors"):
            rope_vectors(spec, bad)


def _gguf(**changes):
    """Metadata and shapes of a small Llama's GGUF file."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 128,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
    }
    spec = spec_from_config(SMALL)
    named = matrix_shapes(spec) | vector_shapes(spec)
    shapes = {name: named[ours] for name, ours in gguf_names(spec).items()}
    return metadata | {key.replace("__", "."): value for key, value in changes.items()}, shapes


def test_a_gguf_and_a_config_of_one_model_give_one_spec_but_for_the_order_of_pairs():
    metadata, shapes = _gguf()
    spec = spec_from_gguf(metadata, shapes)
    assert spec.rope is not None
    assert spec.rope.interleaved
    assert spec.eos_token_ids == (2, 7)
    same = dataclasses.replace(
        spec, rope=dataclasses.replace(spec.rope, interleaved=False), eos_token_ids=()
    )
    config = SMALL | {"rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    assert same == spec_from_config(config)


def test_biases_and_a_tied_head_are_seen_in_the_tensors():
    metadata, shapes = _gguf()
    del shapes["output.weight"]
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_q.bias": (64,), f"blk.{layer}.attn_v.bias": (32,)}
    spec = spec_from_gguf(metadata, shapes)
    assert spec.tied_head
    assert spec.biases == ("attn_q", "attn_v")


def test_counts_by_layer_are_read_where_they_are_all_one():
    metadata, shapes = _gguf()
    spec = spec_from_gguf(metadata, shapes)
    key = "llama.attention.head_count_kv"
    assert spec_from_gguf(metadata | {key: [2, 2]}, shapes) == spec
    with pytest.raises(FormatError, match="one value for all layers"):
        spec_from_gguf(metadata | {key: [2, 1]}, shapes)


def test_a_wide_gemma_gguf_scales_attention_by_its_width_per_head():
    # gemma-3-27b: query_pre_attn_scalar is 168 = 5376 / 32, which GGUF has no field for.
    config = {"model_type": "gemma3_text", "query_pre_attn_scalar": 168, "head_dim": 128}
    config |= _sizes(62, 5376, 21_504, 32, 16, 262_208, sliding_window=1024)
    expected = spec_from_config(config)
    named = matrix_shapes(expected) | vector_shapes(expected)
    shapes = {name: named[ours] for name, ours in gguf_names(expected).items()}
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.block_count": 62,
        "gemma3.embedding_length": 5376,
        "gemma3.feed_forward_length": 21_504,
        "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16,
        "gemma3.attention.key_length": 128,
        "gemma3.attention.value_length": 128,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": 1024,
        "gemma3.context_length": 131_072,
        "gemma3.rope.freq_base": 1_000_000.0,
    }
    assert spec_from_gguf(metadata, shapes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"general__architecture": "falcon"},
        {"general__architecture": None},
        {"llama__expert_count": 8},
        {"llama__attention__causal": False},
        {"llama__residual_scale": 0.5},
        {"llama__rope__scaling__type": "longrope"},
        {"llama__rope__scaling__type": "linear"},
        {"llama__attention__value_length": 8},
        {"llama__attention__layer_norm_rms_epsilon": None},
        {"llama__block_count": 3},
        {"llama__embedding_length": 128},
        {"llama__feed_forward_length": 95},
        {"llama__rope__dimension_count": 32},
    ],
)
def test_gguf_metadata_that_cannot_be_followed_are_refused(changes):
    with pytest.raises(FormatError):
        spec_from_gguf(*_gguf(**changes))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", None),
        ("blk.1.ffn_norm.weight", (63,)),
        ("blk.0.attn_k.weight", (64, 32)),
        ("blk.0.ffn_gate_exps.weight", (96, 64)),
        ("blk.0.attn_q_norm.weight", (16,)),
        ("token_embd.weight", None),
        ("token_embd.weight", (6400,)),
    ],
)
def test_gguf_tensors_that_do_not_fit_are_named(name, shape):
    metadata, shapes = _gguf()
    shapes[name] = shape
    if shape is None:
        del shapes[name]
    with pytest.raises(FormatError, match=name):
        spec_from_gguf(metadata, shapes)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["linear", "yarn", "llama3", "sliding_attention"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["rope_type", "type", "factor", "rope_theta", "full_attention", "truncate"]
            ),
            children,
            max_size=3,
        )
    ),
    max_leaves=5,
)
FIELDS = sorted(
    {key for config, _ in PUBLISHED.values() for key in config}
    | {"rope_parameters", "layer_types", "rms_norm_eps", "sliding_window_pattern", "hidden_act"}
    | {"max_window_layers", "use_sliding_window", "query_pre_attn_scalar", "text_config"}
    | {"tie_word_embeddings", "attention_bias", "eos_token_id", "rope_local_base_freq"}
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(PUBLISHED)),
    junk=st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3),
)
def test_any_config_gives_a_spec_or_a_format_error(name, junk):
    try:
        spec = spec_from_config(PUBLISHED[name][0] | junk)
    except FormatError:
        return
    for vector in rope_vectors(spec).values() if max(_widths(spec)) < 1 << 20 else ():
        assert np.isfinite(vector).all()
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def _widths(spec):
    return [rope.rotary_dim for rope in (spec.rope, spec.rope_local) if rope] or [0]


@settings(max_examples=300, deadline=None)
@given(
    junk=st.dictionaries(
        st.sampled_from(
            [
                *_gguf()[0],
                "llama.rope.freq_base",
                "llama.rope.scaling.type",
                "llama.rope.scaling.factor",
                "llama.attention.sliding_window",
                "llama.attention.sliding_window_pattern",
                "llama.attention.key_length",
                "llama.rope.dimension_count",
            ]
        ),
        JUNK,
        min_size=1,
        max_size=3,
    )
)
def test_any_gguf_metadata_give_a_spec_or_a_format_error(junk):
    metadata, shapes = _gguf()
    try:
        spec = spec_from_gguf(metadata | junk, shapes)
    except FormatError:
        return
    assert np.isfinite(rope_vectors(spec)["rope_freqs"]).all()
