"""Weights that were trained for their grid lose less when they are moved to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from learned_chain import learn, load, make_windows

from mutirao.compress.blocks import linear_layers
from mutirao.compress.loss import measure_loss
from mutirao.compress.rounding.grid import quantize_weight
from mutirao.compress.training import quantized_training
from mutirao.compress.training.fake_rounding import GridFakeQuantizer, rounded_layers
from mutirao.compress.training.quantized_training import train_quantized
from mutirao.errors import DataError, InputError, ShapeError


def make_config(**changes):
    values = {"bits": 2, "group_size": 48, "steps": 40, "learning_rate": 1e-3}
    return SimpleNamespace(**values | changes)


@pytest.fixture(scope="module")
def trained():
    """The weights of a model that has learned what can be learned of the text."""
    return learn()


@torch.no_grad()
def rounded(model, bits, group_size):
    for layer in linear_layers(model).values():
        layer.weight.copy_(quantize_weight(layer.weight, bits, group_size).expand())
    return model


@pytest.mark.parametrize(("bits", "factor"), [(2, 0.5), (3, 0.6)])
def test_rounding_costs_less_after_training_for_it(trained, bits, factor):
    original, heldout = load(trained), make_windows(64, seed=1)
    learned = load(trained)
    train_quantized(learned, make_windows(128, seed=2), make_config(bits=bits))
    plain = measure_loss(original, rounded(load(trained), bits, 48), heldout)
    better = measure_loss(original, rounded(learned, bits, 48), heldout)
    assert plain.rise > 3 * plain.standard_error
    assert better.rise < factor * plain.rise
    assert better.divergence < factor * plain.divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_plain_again(trained, dtype):
    model = load(trained).to(dtype)
    layers = linear_layers(model)
    parameters = dict(model.named_parameters())
    train_quantized(model, make_windows(8), make_config(steps=2))
    assert all(type(each).__module__.partition(".")[0] != "torchao" for each in model.modules())
    assert linear_layers(model) == layers
    assert list(model.state_dict()) == list(trained)
    assert {id(each) for each in model.parameters()} == {id(each) for each in parameters.values()}
    assert {each.dtype for each in model.parameters()} == {dtype}
    changed = model.state_dict()
    matrices = [name for name, each in parameters.items() if each.dim() == 2]
    assert all(not torch.equal(changed[name], trained[name].to(dtype)) for name in matrices)
    layer = next(iter(layers.values()))
    assert not torch.equal(layer.weight, quantize_weight(layer.weight, 2, 48).expand().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_is_that_of_rounding_to_the_nearest(bits):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :16] = 0  # a group without a range
    weight[1, :16] += 5  # one that does not reach zero by itself
    weight.requires_grad_(True)
    got = GridFakeQuantizer(bits, 16)(weight)
    want = quantize_weight(weight.detach(), bits, 16).expand()
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-6)
    got.sum().backward()
    # Straight through, but for what lies outside of the grid: its ends are rounded too.
    is_inside = (weight.grad - 1).abs() < 1e-5
    is_outside = weight.grad == 0
    assert bool((is_inside | is_outside).all())
    assert float(is_inside.float().mean()) > 0.9


def test_shared_layers_stay_shared(trained):
    model = load(trained)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    train_quantized(model, make_windows(8), make_config(steps=1))
    assert second.mlp.up_proj.weight is first.mlp.up_proj.weight


def test_layers_see_rounded_weights_only_inside(trained):
    model, ids = load(trained), make_windows(2)
    with torch.inference_mode():
        want_plain = model(ids).logits
        want_rounded = rounded(load(trained), 3, 16)(ids).logits
        with rounded_layers(model, linear_layers(model), 3, 16):
            torch.testing.assert_close(model(ids).logits, want_rounded, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, want_plain)


def test_a_failure_gives_the_weights_back(trained, monkeypatch):
    model = load(trained).bfloat16()
    layers = linear_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(student, *_, **__):
        with torch.no_grad():
            student.lm_head.weight.zero_()
            student.model.layers[0].mlp.up_proj.weight.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_training, "follow_teacher", fail)
    with pytest.raises(KeyboardInterrupt):
        train_quantized(model, make_windows(8), make_config())
    assert linear_layers(model) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "num_windows", "error", "sentence"),
    [
        ({"bits": 5}, 8, InputError, "bits=5 is not supported .expected one of 2, 3, 4, 8"),
        ({"steps": 0}, 8, InputError, "steps=0 with windows_per_step=8 trains nothing"),
        ({"group_size": 32}, 8, ShapeError, "group_size=32 does not divide the 48 inputs of model"),
        ({}, 0, DataError, "too few to train on"),
    ],
)
def test_refuses_in_a_sentence(trained, changes, num_windows, error, sentence):
    model = load(trained)
    with pytest.raises(error, match=sentence):
        train_quantized(model, make_windows(num_windows), make_config(**changes))
    assert all(torch.equal(each, trained[name]) for name, each in model.state_dict().items())


def test_without_torchao_says_what_to_install(trained, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "torchao.quantization.qat", None)
    monkeypatch.delitem(modules, "mutirao.compress.training.fake_rounding", raising=False)
    with pytest.raises(InputError, match=r"pip install \"mutirao\[compress\]\""):
        train_quantized(load(trained), make_windows(8), make_config())
