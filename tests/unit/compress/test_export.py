"""Exports as artifacts: checked, refused, left alone, told on the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_exports import save_tiny
from typer.testing import CliRunner

from mutirao.artifact import open_artifact, write_artifact
from mutirao.cli.app import app
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig
from mutirao.compress.export import ExportConfig, export_model, plan_export
from mutirao.compress.export_check import directory_logits
from mutirao.errors import ArtifactError, DiskFullError, FormatError, InputError
from mutirao.formats.gguf_description import GGUFDescription
from mutirao.formats.huggingface import load_causal_lm
from mutirao.inference.engine import Engine
from mutirao.inference.read_back import engine_logits


@pytest.fixture(scope="module")
def small(tiny_model_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "small"
    compress_model(tiny_model_directory, folder, CompressConfig(bits=4))
    return folder


@pytest.mark.parametrize("read_logits", [None, engine_logits])
def test_a_gguf_file_is_an_artifact(small, tmp_path, read_logits):
    reader = {} if read_logits is None else {"read_logits": read_logits}
    done = export_model(small, tmp_path / "out", ExportConfig(), **reader)
    manifest = open_artifact(tmp_path / "out", "gguf")
    assert sorted(manifest.files) == ["README.md", "model.gguf"]
    assert manifest.parents["model"].sha256 == open_artifact(small).sha256
    assert manifest.recipe["export"]["format"] == "gguf"
    assert manifest.metrics["num_tensors_by_type"] == {"BF16": 1, "F32": 5, "Q4_1": 14}
    assert manifest.metrics["parity"] == done.parity.model_dump(mode="json")
    assert done.parity.mean_kl_nats < 1e-4
    assert done.parity.same_top_share > 0.98
    assert done.parity.num_tokens > 100
    card = (tmp_path / "out" / "README.md").read_text()
    assert "14 Q4_1" in card
    assert "mean KL divergence" in card


def test_the_engine_runs_it(tiny_model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("MUTIRAO_HOME", str(tmp_path / "home"))
    export_model(tiny_model_directory, tmp_path / "out", ExportConfig(check=False))
    texts = []
    for path in (tiny_model_directory, tmp_path / "out" / "model.gguf"):
        with Engine.open(path, context=96) as engine:
            texts.append(engine.generate("The patient", max_new_tokens=24).text)
            assert engine.tokenizer.has_chat_template
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("weight_type", "dtype"), [("auto", "bfloat16"), ("f32", "float32")])
def test_a_compressed_model_as_a_plain_directory(small, tmp_path, weight_type, dtype):
    config = ExportConfig(format="huggingface", weight_type=weight_type)
    plan = plan_export(small, config)
    done = export_model(small, tmp_path / "out", config)
    manifest = open_artifact(tmp_path / "out", "model")
    assert manifest.parents["model"].sha256 == open_artifact(small).sha256
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert manifest.metrics["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert done.plan == plan
    assert done.parity.mean_kl_nats <= (0.0 if dtype == "float32" else 1e-3)
    model, _ = load_causal_lm(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    assert "Expanded from the compressed model" in (tmp_path / "out" / "README.md").read_text()


def test_what_predicts_otherwise_is_not_written(tiny_model_directory, tmp_path, monkeypatch):
    """Rows of queries and keys left as they are: plausible numbers, another model."""
    monkeypatch.setattr(GGUFDescription, "new_order", lambda self, name: None)
    with pytest.raises(ArtifactError, match=r"does not predict what its source predicts: mean KL"):
        export_model(
            tiny_model_directory, tmp_path / "out", ExportConfig(), read_logits=engine_logits
        )
    assert list(tmp_path.iterdir()) == []
    done = export_model(tiny_model_directory, tmp_path / "out", ExportConfig(check=False))
    assert done.parity is None
    assert open_artifact(tmp_path / "out").metrics["parity"] is None


def test_a_tolerance_of_ones_own(tiny_model_directory, tmp_path):
    config = ExportConfig(weight_type="q8_0", tolerance=1e-9)
    with pytest.raises(ArtifactError, match=r"accepted up to 1e-09"):
        export_model(tiny_model_directory, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers(tmp_path):
    from safetensors.torch import save_file

    folder = save_tiny(tmp_path / "model", "Llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="mean KL divergence nan"):
        export_model(folder, tmp_path / "out", ExportConfig())


def test_places_that_are_not_written_over(tiny_model_directory, small, tmp_path):
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "somebody's" / "letters").write_text("dear")
    config = ExportConfig(check=False)
    with pytest.raises(InputError, match="exists and is no artifact"):
        export_model(small, tmp_path / "somebody's", config)
    for place in (tiny_model_directory, tiny_model_directory.parent):
        with pytest.raises(InputError, match="holds the model itself"):
            export_model(tiny_model_directory, place, config)
    export_model(tiny_model_directory, tmp_path / "out", config)
    export_model(small, tmp_path / "out", config)  # an older export is replaced
    assert "Q4_1" in open_artifact(tmp_path / "out").metrics["num_tensors_by_type"]


def test_bad_models(tiny_model_directory, small, tmp_path):
    with pytest.raises(FormatError, match="is not a folder"):
        export_model(tmp_path / "nowhere", tmp_path / "out", ExportConfig())
    with pytest.raises(InputError, match=r"weight_type=q8_0 is not supported with format hugg"):
        export_model(
            small, tmp_path / "out", ExportConfig(format="huggingface", weight_type="q8_0")
        )
    altered = shutil.copytree(small, tmp_path / "altered")
    with (altered / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x02")
    with pytest.raises(ArtifactError, match="altered"):
        export_model(altered, tmp_path / "out", ExportConfig())
    opt = shutil.copytree(tiny_model_directory, tmp_path / "opt")
    config = json.loads((opt / "config.json").read_bytes()) | {"model_type": "opt"}
    (opt / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="architecture opt are not exported as GGUF"):
        export_model(opt, tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_older_export(small, tmp_path, monkeypatch):
    import errno
    import os

    with write_artifact(tmp_path / "out", "gguf") as writer:
        (writer.path / "model.gguf").write_text("older")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DiskFullError, match="no room left to write"):
        export_model(small, tmp_path / "out", ExportConfig())
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.gguf").read_text() == "older"


def test_the_engines_reader_leaves_no_store(small, tmp_path):
    export_model(small, tmp_path / "out", ExportConfig(check=False))
    windows = [[4, 5, 6]]
    got = engine_logits(tmp_path / "out" / "model.gguf", windows)
    assert got[0].shape == directory_logits(small, windows)[0].shape
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "README.md",
        "manifest.json",
        "model.gguf",
    ]


def test_the_command(small, tmp_path):
    runner, out = CliRunner(), str(tmp_path / "out")
    told = runner.invoke(app, ["export", str(small), "--out", out, "--dry-run"])
    assert "would write" in told.stdout
    assert "14 Q4_1" in told.stdout
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, ["export", str(small), "--out", out, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["num_tensors_by_type"]["Q4_1"] == 14
    assert document["parity"]["mean_kl_nats"] < 1e-4
    assert (tmp_path / "out" / "model.gguf").is_file()
    assert document["model"].endswith("model.gguf")
    bad = runner.invoke(app, ["export", str(small), "--out", out, "--type", "q5_k"])
    assert "weight_type" in str(bad.exception)
    assert bad.exception.exit_code == 2


def test_a_dry_run_refuses_what_the_export_would(small, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    runner = CliRunner()
    for out in (tmp_path / "file", tmp_path / "folder", small):
        said = set()
        for more in ([], ["--dry-run"]):
            told = runner.invoke(app, ["export", str(small), "--out", str(out), *more])
            assert isinstance(told.exception, InputError)
            said.add(str(told.exception))
        assert len(said) == 1
    (tmp_path / "empty").mkdir()
    fine = runner.invoke(app, ["export", str(small), "--out", str(tmp_path / "empty"), "--dry-run"])
    assert "would write" in fine.stdout
