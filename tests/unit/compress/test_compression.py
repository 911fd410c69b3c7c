from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mutirao.artifact import open_artifact, write_artifact
from mutirao.cli.app import app
from mutirao.compress import compression
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.compress.windows import read_windows
from mutirao.config import Config, parse_recipe
from mutirao.errors import (
    ArtifactError,
    DataError,
    DiskFullError,
    FormatError,
    InputError,
    RecipeError,
    ShapeError,
)
from mutirao.formats.compressed_tensors import load_packed
from mutirao.formats.huggingface import load_causal_lm, save_causal_lm
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.causal import CausalModel

SEQUENCE = [[5, 6, 7, 8, 9, 10, 200, 40]]


def _expected_model(folder, bits):
    """The original with each linear weight replaced by what its codes stand for."""
    model, tokenizer = load_causal_lm(folder, dtype=fast_dtype())
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            q = quantize_weight(layer.weight.detach().bfloat16(), bits, 32)
            codes = q.codes.float().reshape(*q.scale.shape, 32)
            weight = (codes - q.zero.float()[..., None]) * q.scale.float()[..., None]
            layer.weight.data = weight.reshape(layer.weight.shape).to(layer.weight.dtype)
    return CausalModel(model, tokenizer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_compressed_model_opens_from_disk_as_what_was_rounded(
    tiny_model_directory, tmp_path, bits
):
    out = tmp_path / "small"
    compress_model(tiny_model_directory, out, CompressConfig(bits=bits))
    got = CausalModel.open(out).token_logprobs(SEQUENCE, [1])[0]
    want = _expected_model(tiny_model_directory, bits).token_logprobs(SEQUENCE, [1])[0]
    assert got.tolist() == want.tolist()
    original = CausalModel.open(tiny_model_directory).token_logprobs(SEQUENCE, [1])[0]
    assert got.tolist() != original.tolist()


def test_metrics_count_every_stored_byte(tiny_model_directory, tmp_path):
    compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(bits=3))
    metrics = open_artifact(tmp_path / "small", "model").metrics
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    model, _ = load_causal_lm(tiny_model_directory)
    num_weights = sum(p.numel() for p in model.parameters())
    assert metrics["total_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert metrics["original_bytes"] == 2 * num_weights
    assert metrics["bits_per_weight"] == pytest.approx(8 * metrics["total_bytes"] / num_weights)
    assert metrics["weight_bits"] == 3
    # One layer by hand: 96 x 64 codes of 3 bits, and 2 groups per row with scale and zero.
    layer = {n: t.nbytes for n, t in tensors.items() if "layers.0.mlp.up_proj" in n}
    assert sorted(layer.values()) == sorted([96 * 64 * 3 // 8, 96 * 2 * 2, 9 * 2 * 4, 16])


def test_lineage_card_and_tokenizer_come_along(tiny_model_directory, tmp_path):
    parent = tmp_path / "model"
    with write_artifact(parent, "model") as writer:
        for file in tiny_model_directory.iterdir():
            (writer.path / file.name).write_bytes(file.read_bytes())
    compress_model(parent, tmp_path / "small", CompressConfig(bits=4))
    manifest = open_artifact(tmp_path / "small", "model")
    assert manifest.parents["model"].sha256 == open_artifact(parent).sha256
    assert manifest.recipe["compress"] == {"method": "rtn", "bits": 4, "group_size": 32}
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"{manifest.metrics['bits_per_weight']:.2f} bits per weight" in card
    opened = CausalModel.open(tmp_path / "small")
    assert opened.tokenizer.chat_template
    assert opened.encode("fever") == CausalModel.open(parent).encode("fever")


def test_an_altered_model_is_refused(tiny_model_directory, tmp_path):
    parent = tmp_path / "model"
    with write_artifact(parent, "model") as writer:
        for file in tiny_model_directory.iterdir():
            (writer.path / file.name).write_bytes(file.read_bytes())
    with (parent / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x02")
    with pytest.raises(ArtifactError, match="altered"):
        compress_model(parent, tmp_path / "small", CompressConfig())
    assert not (tmp_path / "small").exists()


def test_a_compressed_model_is_not_compressed_again(tiny_model_directory, tmp_path):
    compress_model(tiny_model_directory, tmp_path / "small", CompressConfig())
    with pytest.raises(InputError, match="compressed already"):
        compress_model(tmp_path / "small", tmp_path / "smaller", CompressConfig())


def test_nothing_is_left_when_a_group_does_not_fit(tiny_model_directory, tmp_path):
    with pytest.raises(ShapeError, match="group_size=40"):
        compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(group_size=40))
    assert list(tmp_path.iterdir()) == []


def test_unsupported_bits_are_named():
    class Recipe(Config):
        compress: CompressConfig = CompressConfig()

    message = r"^compress\.bits=5 is not supported \(expected one of 2, 3, 4, 8\)$"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(Recipe, {"compress": {"bits": 5}})
    with pytest.raises(RecipeError, match=message):
        CompressConfig(bits=5)


def _text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("fever and cough for three days. " * 400)
    return path


TEXT = TextConfig(window_tokens=32, calibration_windows=8, heldout_windows=6)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_was_written_is_opened_again_and_measured(tiny_model_directory, tmp_path, method):
    out = tmp_path / "small"
    config = CompressConfig(method=method, bits=3)
    metrics = compress_model(
        tiny_model_directory, out, config, text=_text(tmp_path), text_config=TEXT
    )
    assert metrics == open_artifact(out, "model").metrics
    original, compressed = CausalModel.open(tiny_model_directory), CausalModel.open(out)
    windows = read_windows(_text(tmp_path), original, TEXT)
    assert metrics["heldout.num_tokens"] == 6 * 31
    for name, model in (("original", original), ("compressed", compressed)):
        sequences = windows.heldout.tolist()
        scores = model.token_logprobs(sequences, [1] * len(sequences))
        loss = -sum(float(each.sum()) for each in scores) / (6 * 31)
        assert metrics[f"heldout.{name}"] == pytest.approx(loss, abs=0.02)
    assert metrics["heldout.divergence"] > 0
    assert "GPTQ" in (out / "README.md").read_text() or method == "rtn"


def test_gptq_without_text_is_refused(tiny_model_directory, tmp_path):
    with pytest.raises(InputError, match="--text"):
        compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(method="gptq"))
    assert not (tmp_path / "small").exists()


def test_weights_that_are_not_finite_are_refused(tiny_model_directory, tmp_path):
    model, tokenizer = load_causal_lm(tiny_model_directory)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    save_causal_lm(model, tokenizer, tmp_path / "damaged")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj are not finite"):
        compress_model(tmp_path / "damaged", tmp_path / "small", CompressConfig())
    assert not (tmp_path / "small").exists()


def test_the_command_says_what_it_cost(tiny_model_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("fever and cough for three days. " * 6000)
    command = ["compress", str(tiny_model_directory), "--method", "gptq", "--bits", "4"]
    command += ["--text", str(text), "--out", str(tmp_path / "small"), "--json"]
    command += ["--window-tokens", "32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["heldout.rise"] == pytest.approx(0, abs=0.5)


def test_a_model_that_others_quantized_is_refused(tiny_model_directory, tmp_path):
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"compressed already \(bitsandbytes\)"):
        compress_model(model, tmp_path / "small", CompressConfig())


def test_weights_that_were_rounded_before_are_pointed_out(tiny_model_directory, tmp_path, caplog):
    compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(bits=4))
    assert not caplog.records
    model, tokenizer = load_packed(tmp_path / "small")
    save_causal_lm(model, tokenizer, tmp_path / "expanded")
    compress_model(tmp_path / "expanded", tmp_path / "smaller", CompressConfig(bits=3))
    assert "was rounded before" in caplog.text


def test_a_full_disk_leaves_nothing(tiny_model_directory, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compression, "save_file", full)
    with pytest.raises(DiskFullError):
        compress_model(tiny_model_directory, tmp_path / "small", CompressConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_opened_again_is_not_kept(
    tiny_model_directory, tmp_path, monkeypatch
):
    def damage(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 5)

    monkeypatch.setattr(compression, "save_file", damage)
    with pytest.raises(FormatError, match="cannot be read"):
        compress_model(
            tiny_model_directory,
            tmp_path / "small",
            CompressConfig(),
            text=_text(tmp_path),
            text_config=TEXT,
        )
    assert not (tmp_path / "small").exists()
