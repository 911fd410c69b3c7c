"""The GGUF check against files that the gguf library writes, and the conversion of a tiny one."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from mutirao.errors import FormatError
from mutirao.formats.gguf import check_gguf, convert_gguf

HIDDEN, INNER, HEADS = 32, 64, 2


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def write_tiny_llama(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a one-layer llama with a byte vocabulary; return its tensors as float32."""
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ĊĊ"]
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        if name == "blk.0.ffn_down.weight":
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
        tensors[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_gguf(tiny, out)
    return out


def patched(tiny: Path, tmp_path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(tiny.read_bytes())
    data[offset : offset + len(content)] = content
    path = tmp_path / "patched.gguf"
    path.write_bytes(data)
    return path


def test_summary_is_what_was_written(tiny: Path, tmp_path: Path) -> None:
    tensors = write_tiny_llama(tmp_path / "again.gguf")
    summary = check_gguf(tiny)
    assert (summary.architecture, summary.name, summary.license) == ("llama", "Tiny", "apache-2.0")
    assert summary.num_tensors == len(tensors) == 11
    assert summary.num_parameters == sum(values.size for values in tensors.values())
    assert summary.num_tensors_by_type == {"F32": 10, "Q8_0": 1}
    assert summary.size_bytes == tiny.stat().st_size


def test_agrees_with_the_gguf_library_on_where_data_ends(tiny: Path, tmp_path: Path) -> None:
    last = max(gguf.GGUFReader(tiny).tensors, key=lambda tensor: tensor.data_offset)
    end = last.data_offset + last.n_bytes
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:end])
    check_gguf(cut)
    cut.write_bytes(tiny.read_bytes()[: end - 1])
    with pytest.raises(FormatError, match="is truncated"):
        check_gguf(cut)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"PK\x03\x04", "no GGUF file"),
        (4, struct.pack("<I", 1), "version 1, which is not supported"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "announces 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 1 << 60), "announces 1152921504606846976 metadata pairs"),
        (24, struct.pack("<Q", (1 << 64) - 1), "bytes of a metadata key"),
        (8, struct.pack("<Q", 0), "holds no tensors"),
    ],
)
def test_lying_headers(
    tiny: Path, tmp_path: Path, offset: int, content: bytes, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        check_gguf(patched(tiny, tmp_path, offset, content))


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\0\0\0", b"\0" * 100])
def test_what_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=str(path)):
        check_gguf(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FormatError, match="is not a file"):
            check_gguf(path)


def test_error_message_has_no_control_characters(tiny: Path, tmp_path: Path) -> None:
    place = tiny.read_bytes().index(b"blk.0.attn_q.weight")
    path = patched(tiny, tmp_path, place, b"\x1b[2J")
    path = patched(path, tmp_path, place + len("blk.0.attn_q.weight"), struct.pack("<I", 9))
    with pytest.raises(FormatError, match="9 dimensions") as caught:
        check_gguf(path)
    assert str(caught.value).isprintable()


def test_converted_weights_are_the_dequantized_ones(converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = write_tiny_llama(tmp_path / "again.gguf")
    weights = load_file(converted / "model.safetensors")
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }.items():
        assert str(weights[ours].dtype) == "torch.bfloat16"
        # bfloat16 keeps 8 significant bits: a rounding error of at most 2^-8, relatively.
        np.testing.assert_allclose(weights[ours].float().numpy(), written[theirs], rtol=2**-8)


def test_converted_directory_is_complete(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (converted / "chat_template.jinja").is_file()
    card = (converted / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert "More Information Needed" not in card
    for text in converted.glob("*.json"):
        assert str(converted.parent) not in text.read_text()


def test_converted_tokenizer(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.model_max_length == 128
    for text in ("Olá,  12 mg\n\n1. x", "日本語 😀", "<|im_start|>user\nhi<|im_end|>"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer("a").input_ids == [3 + ord("a")]  # no BOS is added
    # Digits are split off first, so the two line breaks before one stay together.
    assert tokenizer.tokenize("\n\n1") == ["ĊĊ", "1"]


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "nonesuch")
    writer.add_tensor("a", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(path).architecture == "nonesuch"
    with pytest.raises(FormatError, match="nonesuch"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
