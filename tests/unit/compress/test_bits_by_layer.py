"""Bits layer by layer: what is rounded, written, counted, read again and refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mutirao.advise.ways import Shape
from mutirao.advise.written_mix import read_mix
from mutirao.artifact import open_artifact, write_artifact
from mutirao.cli.app import app
from mutirao.compress.blocks import linear_layers
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.export import ExportConfig, export_model
from mutirao.compress.rounding.awq import best_scale
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.errors import ArtifactError, FormatError, InputError, MutiraoError, RecipeError
from mutirao.formats.compressed_tensors import load_packed, unpack_codes
from mutirao.formats.gguf_plan import Change, plan_gguf
from mutirao.formats.huggingface import load_causal_lm
from mutirao.inference.read_back import engine_logits

PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [f"model.layers.{index}.{name}" for index in (0, 1) for name in PROJECTIONS]
MIX = dict(zip(NAMES[4:], [2, 2, 8, 3, 3, 3, 8, 4, 4, 2], strict=True))
"""The first four layers are not named."""
BITS = dict.fromkeys(NAMES, 4) | MIX
TEXT = TextConfig(window_tokens=32, calibration_windows=8, heldout_windows=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("fever and cough for three days. " * 400)
    return path


@pytest.fixture(scope="module")
def small(tiny_model_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "small"
    compress_model(tiny_model_directory, out, CompressConfig(bits=4, layer_bits=MIX))
    return out


def test_each_layer_is_rounded_to_its_own_bits(tiny_model_directory, small):
    original, _ = load_causal_lm(tiny_model_directory)
    opened, _ = load_packed(small)
    assert linear_layers(original).keys() == BITS.keys()
    for name, bits in BITS.items():
        rows = original.get_submodule(name).weight.detach().bfloat16().float().numpy()
        groups = rows.reshape(len(rows), -1, 32).astype(np.float64)
        low, high = groups.min(2).clip(max=0), groups.max(2).clip(min=0)
        step = torch.tensor((high - low) / (2**bits - 1)).bfloat16().double().numpy()
        zero = np.round(-low / step).clip(0, 2**bits - 1)[..., None]
        codes = (np.round(groups / step[..., None]) + zero).clip(0, 2**bits - 1)
        expected = torch.tensor((codes - zero) * step[..., None]).reshape(rows.shape)
        got = opened.get_submodule(name).weight.double()
        # A weight in the middle between two points may go either way in float32.
        is_same = (got - expected).abs() <= 2**-7 * expected.abs()
        assert float(is_same.double().mean()) > 0.998, name


def test_bytes_are_those_of_the_advice_and_bits_their_mean(tiny_model_directory, small):
    metrics = open_artifact(small, "model").metrics
    model, _ = load_causal_lm(tiny_model_directory)
    layers = linear_layers(model)
    assert metrics["total_bytes"] == Shape.of(model, layers).count_bytes(BITS, 32)
    stored = load_file(small / "model.safetensors")
    assert metrics["total_bytes"] == sum(each.nbytes for each in stored.values())
    num_codes = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    num_bits = sum(BITS[name] * num_codes[name] for name in NAMES)
    assert metrics["weight_bits"] == pytest.approx(num_bits / sum(num_codes.values()))
    uniform = Shape.of(model, layers).count_bytes(4, 32)
    assert abs(metrics["total_bytes"] - uniform) > 100


def test_groups_and_card_say_the_mix(small):
    quantization = json.loads((small / "config.json").read_text())["quantization_config"]
    groups = quantization["config_groups"].values()
    assert [each["weights"]["num_bits"] for each in groups] == [2, 3, 4, 8]
    assert {
        name: each["weights"]["num_bits"] for each in groups for name in each["targets"]
    } == BITS
    card = (small / "README.md").read_text()
    assert "# Model compressed to 2, 3, 4 and 8 bits" in card
    assert "3 layers in 2 bits, 3 layers in 3 bits, 6 layers in 4 bits, 2 layers in 8 bits" in card
    assert "tags: [compressed-tensors, 2-bit, 3-bit, 4-bit, 8-bit]" in card
    assert open_artifact(small).recipe["compress"]["layer_bits"] == MIX


def test_the_same_bits_for_all_are_one_group(tiny_model_directory, tmp_path):
    config = CompressConfig(bits=4, layer_bits=dict.fromkeys(NAMES, 3))
    metrics = compress_model(tiny_model_directory, tmp_path / "named", config)
    compress_model(tiny_model_directory, tmp_path / "plain", CompressConfig(bits=3))
    assert metrics["weight_bits"] == 3
    for name in ("config.json", "README.md"):
        named, plain = (tmp_path / folder / name for folder in ("named", "plain"))
        assert named.read_text() == plain.read_text()
    named, plain = (load_file(tmp_path / f / "model.safetensors") for f in ("named", "plain"))
    assert all(torch.equal(named[name], plain[name]) for name in plain)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq,gptq"])
def test_methods_that_look_at_text_follow_the_bits(tiny_model_directory, tmp_path, text, method):
    out = tmp_path / "small"
    config = CompressConfig(method=method, bits=4, layer_bits=MIX)
    metrics = compress_model(tiny_model_directory, out, config, text=text, text_config=TEXT)
    assert metrics["heldout.divergence"] > 0
    stored = load_file(out / "model.safetensors")
    for name, bits in BITS.items():
        shape = stored[f"{name}.weight_shape"].tolist()
        packed = stored[f"{name}.weight_packed"]
        assert tuple(packed.shape) == (shape[0], math.ceil(shape[1] * bits / 32))
        codes = unpack_codes(packed, bits, shape[1])
        assert len(codes.unique()) > 2**bits * 0.75  # all of its grid is in use


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_block_does_not_see_the_bits_of_later_ones(tiny_model_directory, method):
    ids = torch.randint(5, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    runs = []
    for bits in (3, {name: 3 if "layers.0" in name else 8 for name in NAMES}):
        model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
        runs.append(round_by_blocks(model.requires_grad_(False), method, bits, 32, ids))
    for name in NAMES:
        first, second = (run[name] for run in runs)
        assert torch.equal(first.codes, second.codes) == ("layers.0" in name), name


def test_awq_searches_with_each_layers_bits():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 32, generator=generator) * torch.randn(32, generator=generator).exp()
    weights = [torch.randn(rows, 32, generator=generator) for rows in (8, 12)]
    gram = x.T @ x / len(x)

    def expected(widths):
        loudness = x.double().square().mean(0).sqrt()
        found = []
        for step in range(20):
            scale = (loudness / loudness.max()) ** (step / 20)
            scale = scale / (scale.max() * scale.min()).sqrt()
            change = 0.0
            for weight, bits in zip(weights, widths, strict=True):
                scaled = quantize_weight((weight * scale).float(), bits, 16).expand().double()
                change += float(((scaled / scale - weight) @ x.double().T).square().sum())
            found.append((change, scale))
        return min(found, key=lambda each: each[0])[1]

    for widths in ([2, 8], [8, 2]):
        got = best_scale(weights, gram, widths, 16).double()
        torch.testing.assert_close(got, expected(widths), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected([2, 8]), expected([8, 2]))


def test_a_mix_becomes_a_gguf_file(tiny_model_directory, tmp_path):
    few = {name: bits for name, bits in MIX.items() if bits < 8}
    compress_model(tiny_model_directory, tmp_path / "few", CompressConfig(layer_bits=few))
    with pytest.raises(FormatError, match=r"codes of 2 bits .* export with --type q4_1 or q8_0"):
        export_model(tmp_path / "few", tmp_path / "out", ExportConfig())
    planned = plan_gguf(tmp_path / "few", "q4_1").tensors
    kept = [each for each in planned if each.change is Change.CODES]
    assert len(kept) == 14
    assert {each.type_name for each in kept} == {"Q4_1"}
    done = export_model(
        tmp_path / "few",
        tmp_path / "out",
        ExportConfig(weight_type="q4_1"),
        read_logits=engine_logits,
    )
    assert done.parity.mean_kl_nats < 2e-3  # the embedding is in Q8_0


def test_a_type_that_would_round_some_of_a_mix_is_not_proposed(small, tmp_path):
    with pytest.raises(FormatError, match=r"codes of 2 bits") as caught:
        export_model(small, tmp_path / "out", ExportConfig())
    assert "q4_1" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_bits": {"a": 5}}, r"layer_bits\.a=5 is not supported \(expected one of 2, 3, 4"),
        ({"method": "fp8", "layer_bits": {"a": 4}}, "layer_bits is not for compress.method=fp8"),
        ({"method": "svd", "layer_bits": {"a": 4}}, "layer_bits is not for compress.method=svd"),
        ({"method": "qat,rtn", "layer_bits": {"a": 3}}, "qat trains for the same bits in all"),
    ],
)
def test_bits_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        CompressConfig(**settings)


def test_names_of_no_layer_are_refused(tiny_model_directory, tmp_path):
    for names in (["lm_head"], ["model.layers.2.mlp.up_proj", "model.norm"]):
        config = CompressConfig(layer_bits=dict.fromkeys(names, 3))
        message = rf"names {names[0]}.*no linear layer .* such as model\.layers\.0\.self_attn\.q"
        with pytest.raises(InputError, match=message):
            compress_model(tiny_model_directory, tmp_path / "small", config)
    assert not (tmp_path / "small").exists()


def test_blocks_that_share_weights_share_their_bits(tiny_model_directory, tmp_path):
    names = NAMES[6], NAMES[13]
    config = CompressConfig(method="share,rtn", layer_bits={names[1]: 3})
    with pytest.raises(InputError, match=rf"4 bits for {names[0]} and 3 for {names[1]}, which sh"):
        compress_model(tiny_model_directory, tmp_path / "small", config)
    assert list(tmp_path.iterdir()) == []
    config = CompressConfig(method="share,rtn", layer_bits=dict.fromkeys(names, 3))
    compress_model(tiny_model_directory, tmp_path / "small", config)
    first, second = (load_packed(tmp_path / "small")[0].get_submodule(name) for name in names)
    assert torch.equal(first.weight, second.weight)


def _advice(folder, **changes):
    mix = {"bits": BITS, "group_size": 16, "uniform_bits": 4, "is_better": True, **changes}
    with write_artifact(folder, "advice") as writer:
        (writer.path / "advice.json").write_text(json.dumps({"mix": mix}))
    return folder


def _compress(model, out, *options):
    command = ["compress", str(model), "--out", str(out), "--json", *map(str, options)]
    return CliRunner().invoke(app, command)


def test_the_command_takes_the_bits_of_an_advice(tiny_model_directory, tmp_path):
    advice = _advice(tmp_path / "advice")
    for index, path in enumerate((advice, advice / "advice.json")):
        out = tmp_path / f"small{index}"
        result = _compress(tiny_model_directory, out, "--bits-from", path, "--group-size", 16)
        assert result.exit_code == 0, result.output
        recipe = open_artifact(out).recipe["compress"]
        assert recipe == {"method": "rtn", "bits": 4, "group_size": 16, "layer_bits": BITS}
        assert json.loads(result.stdout)["weight_bits"] == pytest.approx(4.0, abs=2)


def test_options_that_contradict_an_advice_are_refused(tiny_model_directory, tmp_path):
    advice = _advice(tmp_path / "advice")
    for options, message in (
        (("--group-size", 32), "the mix of .* is for groups of 16"),
        (("--bits", 4), "--bits=4 and --bits-from=.* were given"),
        (("--method", "fp8"), "bits=4 is not for compress.method=fp8"),
    ):
        result = _compress(tiny_model_directory, tmp_path / "s", "--bits-from", advice, *options)
        assert isinstance(result.exception, MutiraoError), result.output
        with pytest.raises(MutiraoError, match=message):
            raise result.exception
    assert not (tmp_path / "s").exists()


def test_what_is_no_mix_is_refused(tiny_model_directory, tmp_path, caplog):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_mix(tmp_path / "nowhere")
    path = tmp_path / "advice.json"
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "is no advice"),
        ('{"bits": 3}', "is no advice"),
        ('{"mix": null}', "has no mix of bits"),
        ('{"mix": 3}', "is damaged"),
        ('{"mix": {"bits": {"a": 3.5}, "group_size": 32, "uniform_bits": 4}}', "is damaged"),
        ('{"mix": {"bits": {"a": 3}, "group_size": null, "uniform_bits": 4}}', "is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_mix(path)
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        read_mix(tiny_model_directory)
    assert not caplog.records
    assert read_mix(_advice(tmp_path / "advice", is_better=False)).bits == BITS
    assert "not to be worth it" in caplog.text
    altered = shutil.copytree(tmp_path / "advice", tmp_path / "altered")
    (altered / "advice.json").write_text('{"mix": null}')
    with pytest.raises(ArtifactError, match=r"damaged|altered"):
        read_mix(altered)
