"""GGUF files from tiny random models: every type, exact codes, what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from safetensors.torch import load_file, save_file
from small_vocabularies import EDGES
from tiny_exports import save_sentencepiece, save_tiny
from tokenizers import Tokenizer

from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.compress.export_check import check_tokens, directory_logits
from mutirao.errors import DiskFullError, FormatError
from mutirao.formats.compressed_tensors import pack_codes, unpack_codes
from mutirao.formats.gguf_blocks import Codes, convert
from mutirao.formats.gguf_header import read_gguf_header
from mutirao.formats.gguf_plan import Change, plan_gguf
from mutirao.formats.gguf_tokenizer import convert_gguf_tokenizer
from mutirao.formats.gguf_vocabulary import PROBE, _cuts, find_name
from mutirao.formats.gguf_writer import write_gguf
from mutirao.formats.packed_rows import expand_codes
from mutirao.formats.pre_tokenizers import PRE_TOKENIZERS
from mutirao.inference.read_back import engine_logits


def _write(folder: Path, path: Path, weight_type: str = "auto") -> dict:
    """Write a file and return its tensors, dequantized, by name."""
    plan = plan_gguf(folder, weight_type)
    write_gguf(plan, path)
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        tensors[tensor.name] = quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    assert plan.num_tensors_by_type == _types(path)
    header = read_gguf_header(path)
    padded = sum(-(-tensor.num_bytes // 32) * 32 for tensor in header.tensors.values())
    assert path.stat().st_size - padded < 40_000  # the header alone
    return tensors


def _types(path: Path) -> dict[str, int]:
    kinds = [tensor.type_name for tensor in read_gguf_header(path).tensors.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _interleaved(weight: torch.Tensor, num_heads: int) -> np.ndarray:
    """Each head's first half of rows beside its second, by hand."""
    size = len(weight) // num_heads
    rows = [
        head * size + half * size // 2 + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return weight[rows].float().numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "Llama", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("weight_type", "types", "change", "tolerance"),
    [
        ("auto", {"BF16": 15, "F32": 5}, Change.KEPT, 0),
        ("bf16", {"BF16": 15, "F32": 5}, Change.KEPT, 0),
        ("f32", {"F32": 20}, Change.KEPT, 0),
        ("f16", {"F16": 15, "F32": 5}, Change.ROUNDED_16, 2**-11),
        ("q8_0", {"Q8_0": 15, "F32": 5}, Change.ROUNDED_8, 1 / 250),
        ("q4_0", {"Q8_0": 1, "F32": 5, "Q4_0": 14}, Change.ROUNDED_4, 1 / 7),
        ("q4_1", {"Q8_0": 1, "F32": 5, "Q4_1": 14}, Change.ROUNDED_4, 1 / 14),
    ],
)
def test_every_type(
    llama: Path, tmp_path: Path, weight_type: str, types: dict, change: Change, tolerance: float
) -> None:
    plan = plan_gguf(llama, weight_type)
    assert plan.num_tensors_by_type == types
    assert plan.change == change
    written = _write(llama, tmp_path / "m.gguf", weight_type)
    source = load_file(llama / "model.safetensors")
    down = source["model.layers.1.mlp.down_proj.weight"].float().numpy()
    query = _interleaved(source["model.layers.1.self_attn.q_proj.weight"], 4)
    key = _interleaved(source["model.layers.1.self_attn.k_proj.weight"], 2)
    for name, expected in {"ffn_down": down, "attn_q": query, "attn_k": key}.items():
        got = written[f"blk.1.{name}.weight"]
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    norm = source["model.layers.0.input_layernorm.weight"].float().numpy()
    assert written["blk.0.attn_norm.weight"].tolist() == norm.tolist()
    assert "output.weight" not in written


def test_metadata(llama: Path, tmp_path: Path) -> None:
    write_gguf(plan_gguf(llama), tmp_path / "m.gguf")
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    expected = {
        "general.architecture": "llama",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_BF16),
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.chat_template"].startswith("{% for message")
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_a_licence_comes_along(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "licensed")
    (folder / "README.md").write_text('---\nlicense: "apache-2.0"\n---\n\n# A model\n')
    assert plan_gguf(folder).metadata["general.license"] == "apache-2.0"


CASES = {
    "llama": ("Llama", {}),
    "llama-wide-heads-biases": ("Llama", {"head_dim": 32, "attention_bias": True}),
    "llama-mlp-bias": ("Llama", {"mlp_bias": True, "num_key_value_heads": 4}),
    "llama-odd-vocabulary": ("Llama", {"vocab_size": 337, "tie_word_embeddings": True}),
    "llama3-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-yarn-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_engine_reads_the_same_model(case: tuple, tmp_path: Path) -> None:
    """Float32 sums differ, by 1e-5 at the worst (2 CPU cores, PyTorch 2.13); nothing else may."""
    family, settings = case
    folder = save_tiny(tmp_path / "model", family, dtype=torch.float32, **settings)
    plan = plan_gguf(folder)
    write_gguf(plan, tmp_path / "m.gguf")
    assert bool(plan.notes) == (family == "Mistral")  # llama.cpp reads no window there
    windows = [list(range(30, 70)), [1, 5, 9]]
    expected = directory_logits(folder, windows)
    got = engine_logits(tmp_path / "m.gguf", windows)
    for first, second in zip(expected, got, strict=True):
        assert first.std() > 0.3
        np.testing.assert_allclose(second, first, atol=5e-5)


def test_tokens_beyond_the_tokenizer_are_unused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Llama", vocab_size=323)
    metadata = plan_gguf(folder).metadata
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["[PAD320]", "[PAD321]", "[PAD322]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]


def test_rows_that_fill_no_blocks_stay_floats_and_it_is_said(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Qwen2", intermediate_size=80)
    plan = plan_gguf(folder, "q4_0")
    assert plan.num_tensors_by_type == {"Q8_0": 2, "F32": 11, "Q4_0": 12, "BF16": 2}
    assert plan.notes[0] == (
        "blk.0.ffn_down.weight stays in BF16: its rows of 80 weights are no whole number of "
        "blocks of 32"
    )
    written = _write(folder, tmp_path / "m.gguf", "q4_0")
    source = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert written["blk.0.ffn_down.weight"].tolist() == source.float().numpy().tolist()


# --- codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, 64])
def test_four_bit_codes_are_kept(llama: Path, tmp_path: Path, group_size: int) -> None:
    folder = save_tiny(tmp_path / "model", "Llama", intermediate_size=128)
    small = tmp_path / "small"
    compress_model(folder, small, CompressConfig(bits=4, group_size=group_size))
    plan = plan_gguf(small)
    assert plan.num_tensors_by_type == {"BF16": 2, "F32": 5, "Q4_1": 14}
    assert plan.change == Change.CODES
    written = _write(small, tmp_path / "m.gguf")
    name = "model.layers.0.mlp.down_proj"
    codes, scale, zero = _parts(small, name, 4)
    step = np.repeat(scale, group_size, axis=1)
    got, expected = written["blk.0.ffn_down.weight"], expand_codes(codes, scale, zero)
    assert (np.abs(got - expected) <= step / 137).all()
    raw = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "0.ffn_down" in t.name)
    low = raw.data.reshape(64, -1, 20)[..., 4:] & 15
    assert low.tolist() == codes.reshape(64, -1, 2, 16)[:, :, 0].tolist()


@pytest.mark.parametrize(("bits", "zero", "kind"), [(4, 8, "Q4_0"), (8, 128, "Q8_0")])
@pytest.mark.parametrize("is_written", [True, False])
def test_codes_around_the_middle_need_no_offset(
    tmp_path: Path, bits: int, zero: int, kind: str, is_written: bool
) -> None:
    """With zero points that are all the middle, and with none at all."""
    folder = save_tiny(tmp_path / "model", "Llama")
    small = tmp_path / "small"
    compress_model(folder, small, CompressConfig(bits=bits))
    tensors = load_file(small / "model.safetensors")
    for name in [each for each in tensors if each.endswith("zero_point")]:
        rows = tensors[name.replace("zero_point", "scale")].shape
        middle = torch.full((rows[1], rows[0]), zero, dtype=torch.uint8)
        tensors[name] = pack_codes(middle, bits).T.contiguous()
        if not is_written:
            del tensors[name]
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    assert plan_gguf(small).num_tensors_by_type == {"BF16": 2, "F32": 5, kind: 14}
    written = _write(small, tmp_path / "m.gguf")
    codes, scale, zeros = _parts(small, "model.layers.1.self_attn.k_proj", bits)
    expected = _interleaved(torch.from_numpy(expand_codes(codes, scale, zeros)), 2)
    assert written["blk.1.attn_k.weight"].tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("weight_type", ["q4_1", "q8_0"])
def test_fewer_bits_fit_into_larger_blocks(
    llama: Path, tmp_path: Path, bits: int, weight_type: str
) -> None:
    small = tmp_path / "small"
    compress_model(llama, small, CompressConfig(bits=bits))
    with pytest.raises(FormatError, match=rf"codes of {bits} bits in groups of 32.*--type q4_1 or"):
        plan_gguf(small)
    written = _write(small, tmp_path / "m.gguf", weight_type)
    expected = expand_codes(*_parts(small, "model.layers.0.mlp.up_proj", bits))
    assert written["blk.0.ffn_up.weight"].tolist() == expected.tolist()


@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 16)])
def test_codes_without_a_block_are_refused(
    llama: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    small = tmp_path / "small"
    compress_model(llama, small, CompressConfig(bits=bits, group_size=group_size))
    with pytest.raises(FormatError, match=r"--type q8_0, which rounds again to 8 bits"):
        plan_gguf(small)
    written = _write(small, tmp_path / "m.gguf", "q8_0")
    expected = expand_codes(*_parts(small, "model.layers.0.mlp.up_proj", bits))
    assert np.abs(written["blk.0.ffn_up.weight"] - expected).max() <= np.abs(expected).max() / 250


def _parts(folder: Path, layer: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros, through the reader in torch."""
    tensors = load_file(folder / "model.safetensors")
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    scale = tensors[f"{layer}.weight_scale"].float()
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if f"{layer}.weight_zero_point" in tensors:
        zero = unpack_codes(tensors[f"{layer}.weight_zero_point"].T, bits, rows).T
    codes = unpack_codes(tensors[f"{layer}.weight_packed"], bits, columns)
    return codes.numpy(), scale.numpy(), zero.contiguous().numpy()


def test_what_float16_cannot_hold_is_refused() -> None:
    codes = Codes(
        np.zeros((1, 32), np.uint8), np.full((1, 1), 7e4, np.float32), np.zeros((1, 1), np.uint8)
    )
    with pytest.raises(FormatError, match=r"7e\+04 does not fit float16.*--type bf16"):
        codes.blocks("Q4_0")
    with pytest.raises(FormatError, match="does not fit"):
        convert(np.full((2, 32), 1e5, np.float32), "F16")


# --- tokenizers ------------------------------------------------------------------------------


def test_every_way_of_cutting_is_found_again() -> None:
    ways = dict.fromkeys(PRE_TOKENIZERS.values())
    cuts = {way: _cuts(way.pre_tokenizer()) for way in ways}
    for first in ways:
        document = {
            "normalizer": first.normalizer(),
            "pre_tokenizer": first.pre_tokenizer(),
            "model": {"ignore_merges": first.ignore_merges},
        }
        assert PRE_TOKENIZERS[find_name(document)] in (
            way for way in ways if way.patterns == first.patterns
        )
        for second in ways:
            assert (cuts[first] == cuts[second]) == (first.patterns == second.patterns)


def test_digits_before_byte_level_are_smollm() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, byte_level | {"use_regex": True}]}
    assert find_name({"pre_tokenizer": steps, "model": {}}) == "smollm"
    with pytest.raises(FormatError, match=r"has no name in GGUF files.*--format huggingface"):
        find_name({"pre_tokenizer": {"type": "Whitespace"}, "model": {}})


def test_a_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Llama", vocab_size=700)
    save_sentencepiece(folder)
    write_gguf(plan_gguf(folder), tmp_path / "m.gguf")
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 4, 6]
    assert check_tokens(folder, tmp_path / "m.gguf") > 100


def test_texts_become_the_same_tokens(llama: Path, tmp_path: Path) -> None:
    write_gguf(plan_gguf(llama), tmp_path / "m.gguf")
    assert check_tokens(llama, tmp_path / "m.gguf") > 100
    document, _ = convert_gguf_tokenizer(read_gguf_header(tmp_path / "m.gguf").metadata)
    back, own = Tokenizer.from_str(json.dumps(document)), _tokenizer(llama)
    for text in (*EDGES, PROBE):
        assert back.encode(text).ids == own.encode(text).ids


def test_a_tokenizer_that_comes_out_otherwise_is_refused(llama: Path, tmp_path: Path) -> None:
    write_gguf(plan_gguf(llama), tmp_path / "m.gguf")
    folder = shutil.copytree(llama, tmp_path / "other")
    document = json.loads((folder / "tokenizer.json").read_bytes())
    del document["model"]["merges"][0]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"cannot be written as GGUF: .* becomes \["):
        check_tokens(folder, tmp_path / "m.gguf")


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, "type Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "has no name in GGUF"),
    ],
)
def test_tokenizers_that_gguf_cannot_say(
    llama: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(FormatError, match=message):
        plan_gguf(folder)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Llama", vocab_size=300)
    with pytest.raises(FormatError, match="token of id 319, and the embedding only 300 rows"):
        plan_gguf(folder)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, r"architecture gpt_neox are not exported as GGUF.*llama, mis"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' cannot be written as GGUF \(expected 'silu'"),
        ({"vocab_size": 319}, r"embed_tokens.weight is BF16 of shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor of blk.2.attn_norm.weight"),
        ({"num_hidden_layers": 1}, "has no place in a GGUF file of architecture llama"),
        ({"tie_word_embeddings": False}, r"lacks the tensor of output.weight"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"RoPE scaling \{'rope_type': 'dynamic'",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized in a way that is not read"),
    ],
)
def test_models_that_are_not_written(
    llama: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    with pytest.raises(FormatError, match=message):
        plan_gguf(folder)


def test_a_window_in_qwen2_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "model", "Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    )
    with pytest.raises(FormatError, match="use_sliding_window=True cannot be written"):
        plan_gguf(folder)


def test_a_damaged_model_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(FormatError, match="truncated"):
        plan_gguf(folder)
    with pytest.raises(FormatError, match="is not a folder"):
        plan_gguf(tmp_path / "nowhere")


def test_a_tensor_under_two_names_and_ends_that_are_none(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": ["end"]}')
    with pytest.raises(FormatError, match=r"end-of-text tokens .* cannot be read"):
        plan_gguf(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="twice, under two names"):
        plan_gguf(folder)


def test_a_model_that_shrinks_meanwhile(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    plan = plan_gguf(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(FormatError, match="became shorter"):
        write_gguf(plan, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_full_disk_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DiskFullError, match="no room left to write"):
        write_gguf(plan_gguf(llama), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_that_reserves_no_room(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(reason, "not here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    _write(llama, tmp_path / "m.gguf")


def test_a_small_disk(llama: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        with pytest.raises(DiskFullError):
            write_gguf(plan_gguf(llama), folder / "m.gguf")
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)
