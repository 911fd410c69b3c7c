"""Scales that learn after rounding: only they move, by the loss's own gradient, and it helps."""

from __future__ import annotations

import pytest
import torch
from learned_chain import learn, load, make_windows
from torch.nn import functional

from mutirao.compress.blocks import linear_layers
from mutirao.compress.compression import compress_model
from mutirao.compress.config import CompressConfig, TextConfig, TuneConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.compress.training.tuning import _GridLinear, tune_grids
from mutirao.errors import DataError
from mutirao.formats.compressed_tensors import load_packed

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def trained():
    """The weights of a model that has learned what can be learned of the text."""
    return learn()


@pytest.fixture
def rounded(trained):
    """A model rounded to nearest, 2 bits in groups of 24, and its codes: much is left to gain."""
    model = load(trained)
    codes = {}
    for name, layer in linear_layers(model).items():
        codes[name] = quantize_weight(layer.weight.detach(), 2, 24)
        layer.weight.data.copy_(codes[name].expand())
    return model, codes


def test_predictions_get_closer_on_text_that_was_not_seen(trained, rounded):
    model, codes = rounded
    original, heldout = load(trained), make_windows(64, seed=1)
    before = measure_loss(original, model, heldout)
    tune_grids(model, codes, load(trained), make_windows(64, seed=2), TuneConfig(steps=40))
    after = measure_loss(original, model, heldout)
    assert before.rise > 3 * before.standard_error
    assert after.rise < 0.7 * before.rise
    assert after.divergence < 0.7 * before.divergence


def test_only_scales_move(trained, rounded):
    model, codes = rounded
    others = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" not in name
    }
    teacher, layers = load(trained), linear_layers(model)
    tuned = tune_grids(model, codes, teacher, make_windows(16), TuneConfig(steps=4))
    assert linear_layers(model) == layers
    assert all(torch.equal(model.state_dict()[name], each) for name, each in others.items())
    assert all(torch.equal(teacher.state_dict()[name], each) for name, each in trained.items())
    assert tuned.keys() == codes.keys()
    for name, after in tuned.items():
        assert torch.equal(after.codes, codes[name].codes)
        assert torch.equal(after.zero, codes[name].zero)
        assert after.scale.dtype == torch.bfloat16
        assert not torch.equal(after.scale, codes[name].scale)
        assert torch.equal(layers[name].weight, after.expand())


def test_the_first_step_goes_down_the_slope(trained, rounded):
    """AdamW's first step is the rate, against the sign of the gradient: here of differences."""
    model, codes = rounded
    teacher, ids = load(trained), make_windows(4)
    name = "model.layers.0.mlp.up_proj"
    layer, own = linear_layers(model)[name], codes[name]

    @torch.no_grad()
    def divergence(scale_OG):
        layer.weight.copy_(own._replace(scale=scale_OG).expand())
        first, second = (
            each(ids[:, :-1]).logits.double().log_softmax(2) for each in (teacher, model)
        )
        return float(functional.kl_div(second, first, log_target=True, reduction="sum"))

    slopes = {}
    for o in range(0, 96, 6):
        for g in range(2):
            sides = []
            for sign in (1, -1):
                scale_OG = own.scale.float().clone()
                scale_OG[o, g] *= 1 + sign * 1e-2
                sides.append(divergence(scale_OG))
            slopes[o, g] = sides[0] - sides[1]
    layer.weight.data.copy_(own.expand())
    config = TuneConfig(steps=1, windows_per_step=4, learning_rate=0.05)
    tuned = tune_grids(model, codes, teacher, ids, config)
    moved_OG = tuned[name].scale.float() / own.scale.float() - 1
    steep = [place for place in slopes if abs(slopes[place]) > 1e-3]
    assert len(steep) >= 8
    for place in steep:
        assert float(moved_OG[place]) == pytest.approx(
            -0.05 if slopes[place] > 0 else 0.05, abs=0.01
        )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_product_with_codes_has_the_gradients_of_a_plain_one(dtype):
    generator = torch.Generator().manual_seed(0)
    codes = quantize_weight(torch.randn(6, 24, generator=generator), 3, 8)
    given = torch.randn(2, 5, 24, generator=generator)
    bias, wanted = torch.randn(6, generator=generator), torch.randn(2, 5, 6, generator=generator)
    results = []
    for is_plain in (False, True):
        x, factor = given.clone().requires_grad_(), torch.nn.Parameter(torch.full((6, 3), 0.9))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if is_plain:
                scale = codes.scale.float() * factor
                steps = codes.codes.reshape(6, 3, 8).float() - codes.zero.float()[..., None]
                y = functional.linear(x, (steps * scale[..., None]).flatten(1), bias)
            else:
                y = _GridLinear(codes, bias, factor)(x)
        (y.float() - wanted).square().sum().backward()
        results.append((y.float().detach(), x.grad, factor.grad))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.05, "atol": 0.5}
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **tolerance)


def test_layers_that_share_a_weight_share_it_afterwards(trained):
    model = load(trained)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    codes = round_by_blocks(model, "gptq", 3, 24, make_windows(16))
    tuned = tune_grids(model, codes, load(trained), make_windows(16), TuneConfig(steps=4))
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    assert torch.equal(tuned[names[0]].scale, tuned[names[1]].scale)
    assert torch.equal(first.mlp.up_proj.weight, tuned[names[0]].expand())


def test_a_failure_leaves_plain_layers(trained, rounded):
    model, codes = rounded
    layers = linear_layers(model)
    teacher = load(trained)
    teacher.lm_head.weight.data[:] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        tune_grids(model, codes, teacher, make_windows(16), TuneConfig(steps=4))
    assert linear_layers(model) == layers


@pytest.mark.parametrize("method", ["rtn,tune", "awq,gptq,tune", "share,gptq,tune"])
def test_what_was_tuned_opens_from_disk(tiny_model_directory, tmp_path, method):
    (tmp_path / "text.txt").write_text("The patient sleeps well and takes the tablets. " * 120)
    out = tmp_path / "small"
    config = CompressConfig(method=method, bits=3, group_size=16, tuning={"steps": 2})
    text_config = TextConfig(window_tokens=32, calibration_windows=8, heldout_windows=4)
    metrics = compress_model(
        tiny_model_directory, out, config, text=tmp_path / "text.txt", text_config=text_config
    )
    plain = compress_model(
        tiny_model_directory,
        tmp_path / "plain",
        CompressConfig(method=method.removesuffix(",tune"), bits=3, group_size=16),
        text=tmp_path / "text.txt",
        text_config=text_config,
    )
    assert metrics["total_bytes"] == plain["total_bytes"]
    assert metrics["heldout.compressed"] != plain["heldout.compressed"]
    assert "Scales were then trained" in (out / "README.md").read_text()
    before = linear_layers(load_packed(tmp_path / "plain")[0])
    for name, layer in linear_layers(load_packed(out)[0]).items():
        assert torch.equal(layer.weight == 0, before[name].weight == 0)
