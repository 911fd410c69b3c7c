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
from mutirao.config import Config, load_recipe, parse_recipe, recipe_template
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


SMALL_STEPS = {"steps": 2, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("wanda,gptq", {"bits": 4, "prune": {"sparsity": 0.5}}),
        ("magnitude,awq,gptq", {"bits": 4}),
        ("share,gptq", {"bits": 4}),
        ("magnitude,rtn", {"bits": 4, "prune": {"pattern": "2:4"}}),
    ],
)
def test_steps_follow_each_other(tiny_model_directory, tmp_path, method, settings):
    config = CompressConfig(method=method, **settings)
    out = tmp_path / "small"
    metrics = compress_model(
        tiny_model_directory, out, config, text=_text(tmp_path), text_config=TEXT
    )
    model, _ = load_packed(out)
    first, second = (model.model.layers[index].mlp.up_proj.weight for index in (0, 1))
    if "share" in method:
        assert torch.equal(first, second)
        saved = metrics["total_bytes"] - metrics["ideal_bytes"]
        tensors = load_file(out / "model.safetensors")
        layers = [t.nbytes for n, t in tensors.items() if "layers.1" in n and "proj.weight" in n]
        assert saved == sum(layers)
    else:
        assert float((first == 0).float().mean()) >= 0.5
        num_weights = sum(
            layer.weight.numel()
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and name != "lm_head"
        )
        # Of 4 bits per weight, half are zeros; one bit per weight says which.
        assert metrics["total_bytes"] - metrics["ideal_bytes"] == num_weights // 8
    assert open_artifact(out).recipe["compress"]["method"] == method
    assert metrics["peak_memory_bytes"] > 50_000_000
    assert metrics["compress_s"] > 0


@pytest.mark.parametrize("method", ["magnitude", "share", "svd"])
def test_a_model_that_is_not_rounded_is_a_plain_one(tiny_model_directory, tmp_path, method):
    out = tmp_path / "small"
    metrics = compress_model(
        tiny_model_directory,
        out,
        CompressConfig(method=method),
        text=_text(tmp_path),
        text_config=TEXT,
    )
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors.keys() == load_file(tiny_model_directory / "model.safetensors").keys()
    assert metrics["bits_per_weight"] == 16
    assert metrics["total_bytes"] == metrics["original_bytes"]
    assert metrics["ideal_bytes"] < 0.9 * metrics["total_bytes"]
    assert metrics["heldout.divergence"] > 0
    model, _ = load_causal_lm(out)
    assert all(bool(torch.isfinite(each).all()) for each in model.parameters())


def test_distillation_after_another_step_learns_from_the_original(
    tiny_model_directory, tmp_path, monkeypatch
):
    from mutirao.compress.training import distillation

    seen = {}

    def distill(teacher, tokenizer, ids_WT, config, *, student=None):
        seen.update(teacher=teacher, student=student, ids_WT=ids_WT, config=config)
        return student

    monkeypatch.setattr(distillation, "distill", distill)
    config = CompressConfig(method="magnitude,distill,rtn", distillation=SMALL_STEPS)
    compress_model(
        tiny_model_directory, tmp_path / "small", config, text=_text(tmp_path), text_config=TEXT
    )
    original, tokenizer = load_causal_lm(tiny_model_directory)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = original.get_parameter(name)
    assert torch.equal(seen["teacher"].get_parameter(name).bfloat16(), weight)
    assert float((seen["student"].get_parameter(name) == 0).float().mean()) >= 0.5
    windows = read_windows(_text(tmp_path), CausalModel(original, tokenizer), TEXT)
    assert torch.equal(seen["ids_WT"], windows.calibration)
    assert seen["config"].steps == 2


def test_a_student_is_measured_beside_its_teacher(tiny_model_directory, tmp_path, monkeypatch):
    from mutirao.compress.training import distillation

    def distill(teacher, tokenizer, ids_WT, config):
        teacher.model.layers = teacher.model.layers[:1]
        teacher.config.num_hidden_layers = 1
        teacher.config.layer_types = None
        return teacher

    monkeypatch.setattr(distillation, "distill", distill)
    metrics = compress_model(
        tiny_model_directory,
        tmp_path / "small",
        CompressConfig(method="distill"),
        text=_text(tmp_path),
        text_config=TEXT,
    )
    assert metrics["bits_per_weight"] == 16
    assert metrics["original_bytes"] == 2 * 82240
    assert metrics["total_bytes"] < 0.7 * metrics["original_bytes"]
    assert metrics["heldout.rise"] != 0


def test_training_for_the_grid_gets_its_bits(tiny_model_directory, tmp_path, monkeypatch):
    from mutirao.compress.training import quantized_training

    seen = []
    monkeypatch.setattr(
        quantized_training, "train_quantized", lambda model, ids, config: seen.append(config)
    )
    config = CompressConfig(method="qat,rtn", bits=3, group_size=16, quantized_training=SMALL_STEPS)
    compress_model(
        tiny_model_directory, tmp_path / "small", config, text=_text(tmp_path), text_config=TEXT
    )
    assert (seen[0].bits, seen[0].group_size, seen[0].steps) == (3, 16, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rtn,wanda"}, "only tune can follow rtn"),
        ({"method": "gptq,awq"}, "only tune can follow gptq"),
        ({"method": "tune"}, "tune moves the grids of a rounding"),
        ({"method": "nf4,tune"}, r"expected rtn, gptq, awq or awq,gptq right before it"),
        ({"method": "tune,gptq"}, "'tune' is no step"),
        ({"method": "gptq", "tuning": {}}, "compress.tuning is for tune"),
        ({"method": "wander"}, "'wander' is no step"),
        ({"method": ""}, "'' is no step"),
        ({"method": "qat"}, "trains for rounding that does not follow"),
        ({"method": "fp8", "bits": 4}, r"bits=4 is not for compress.method=fp8 \(expected 8\)"),
        ({"method": "nf4", "group_size": 32}, r"group_size=32 is not for compress.method=nf4"),
        ({"method": "wanda", "bits": 4}, r"bits=4 is not for compress.method=wanda"),
        ({"prune": {}}, "compress.prune is for wanda and magnitude"),
        (
            {"method": "share,distill", "distillation": {"layers": 1}},
            "the student of distill is what share made",
        ),
        (
            {"method": "qat,rtn", "bits": 3, "quantized_training": {"bits": 4}},
            "expected 3 in groups of 32",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        CompressConfig(**settings)


@pytest.mark.parametrize(
    "method", ["nf4", "fp8", "svd", "awq, gptq", "share,qat,rtn", "rtn", "awq,gptq,tune"]
)
def test_a_recipe_of_every_kind_loads_again(tmp_path, method):
    class Recipe(Config):
        compress: tuple[CompressConfig, ...] = (CompressConfig(method=method),)

    path = tmp_path / "recipe.toml"
    path.write_text(recipe_template(Recipe()))
    assert load_recipe(Recipe, path) == Recipe()
    assert Recipe().compress[0].rounder == {"svd": None, "share,qat,rtn": "rtn"}.get(
        method, method.replace(" ", "").removesuffix(",tune")
    )


@pytest.mark.parametrize(
    "method", ["awq", "wanda", "svd", "distill", "qat,rtn", "magnitude,gptq", "rtn,tune"]
)
def test_steps_that_look_at_text_ask_for_it(tiny_model_directory, tmp_path, method):
    with pytest.raises(InputError, match=r"looks at text and none was given; .*--text"):
        compress_model(tiny_model_directory, tmp_path / "small", CompressConfig(method=method))


def test_the_command_gives_each_step_its_options(tmp_path, monkeypatch):
    seen = []

    def compress_model(path, out, config, *, text, text_config):
        seen.append(config)
        return {"total_bytes": 1, "original_bytes": 2, "bits_per_weight": 8.0, "ideal_bytes": 1}

    monkeypatch.setattr(compression, "compress_model", compress_model)
    (tmp_path / "model").mkdir()
    command = ["compress", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--method"]
    for options in (
        "wanda,svd,share --sparsity 0.25 --pattern free --kept-parameters 0.5 --share-every 3",
        "distill,qat,rtn --student-layers 1 --student-width 32 --training-steps 7 --bits 2 "
        "--learning-rate 0.01",
    ):
        result = CliRunner().invoke(app, [*command, *options.split()])
        assert result.exit_code == 0, result.output
    first, second = seen
    assert (first.prune.sparsity, first.low_rank.kept, first.sharing.every) == (0.25, 0.5, 3)
    assert first.bits == 16
    trained = (second.distillation, second.quantized_training)
    assert [(each.steps, each.learning_rate) for each in trained] == [(7, 0.01)] * 2
    assert (second.distillation.layers, second.distillation.hidden) == (1, 32)
    assert second.quantized_training.bits == 2
    for option in ("--sparsity 0.3", "--share-every 2"):
        result = CliRunner().invoke(app, [*command, "rtn", *option.split()])
        assert isinstance(result.exception, RecipeError)
        assert "which compress.method=rtn does not have" in str(result.exception)
    result = CliRunner().invoke(app, [*command, "rtn", "--training-steps", "5"])
    assert isinstance(result.exception, InputError)
    assert "--training-steps" in str(result.exception)


@pytest.mark.parametrize("method", ["gptq,tune", "distill", "qat,rtn"])
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    tiny_model_directory, tmp_path, monkeypatch, method
):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "trl", None)
    monkeypatch.delitem(modules, "mutirao.compress.training.teacher_trainer", raising=False)
    monkeypatch.setattr("mutirao.compress.compression.load_causal_lm", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"TRL, which cannot be imported .* pip install"):
        compress_model(
            tiny_model_directory,
            tmp_path / "small",
            CompressConfig(method=method),
            text=_text(tmp_path),
            text_config=TEXT,
        )
    assert not (tmp_path / "small").exists()
