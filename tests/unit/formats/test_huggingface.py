"""Model directories: what is refused, and that a model saved is the model loaded."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mutirao.errors import FormatError
from mutirao.formats.huggingface import (
    check_model_directory,
    check_safetensors,
    load_causal_lm,
    save_causal_lm,
)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).bfloat16()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<unk>", "a", "b", "c", "d", "e", "f", "g"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_causal_lm(tiny_model(), tiny_tokenizer(), path, base_model="o/n", license="mit")
    return path


def test_saved_is_loaded(folder: Path) -> None:
    check_model_directory(folder)
    model, tokenizer = load_causal_lm(folder)
    assert not model.training
    assert tokenizer("c").input_ids == [3]
    expected = tiny_model().state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert load_causal_lm(folder, "float32")[0].dtype == torch.float32


def test_card(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "o/n"\nlibrary_name: "transformers"\nlicense: "mit"\n')
    assert 'pipeline_tag: "text-generation"\n---\n' in card
    assert "More Information Needed" not in card


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "No such file"),
        ("model.safetensors", "holds no model.safetensors"),
        ("tokenizer.json", "holds no tokenizer"),
    ],
)
def test_missing_part(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FormatError, match=message):
        check_model_directory(folder)


def test_every_truncation_of_the_weights_is_caught(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for length in (0, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            load_causal_lm(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": [0]}}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
def test_damaged_safetensors_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match="damaged"):
        check_safetensors(path)


@pytest.mark.parametrize("config", ["", "[]", "{", "{}", '{"model_type": 3}'])
def test_damaged_config(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(FormatError, match=r"config\.json"):
        check_model_directory(folder)


def test_shards_must_stay_inside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="names no shards"):
        check_model_directory(folder)


def test_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(FormatError, match="cannot be loaded"):
        load_causal_lm(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a folder"):
        check_model_directory(tmp_path / "none")
