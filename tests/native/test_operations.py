"""Each operation that needs no matrix, by each instruction set, against the oracle's.

float32 on both sides, so tolerances are some units of the last place of the largest numbers
involved; between instruction sets there is none.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import INSTRUCTION_SETS, is_supported, run_ops

from mutirao.inference.architecture.model_spec import RopeSpec
from mutirao.inference.architecture.program import (
    Activation,
    Add,
    Attention,
    LayerNorm,
    RMSNorm,
    Rope,
    Scale,
)
from mutirao.inference.native.backend import Placement
from mutirao.inference.reference import activation, attention, layer_norm, rms_norm, rope

WIDTHS = (1, 5, 16, 31, 64, 100)


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


@pytest.fixture
def run(tmp_path, library):
    """Run an operation by every instruction set; return what all of them gave."""

    def run(ops, inputs, widths=(), vectors=(), **settings):
        results = []
        for name in filter(is_supported, INSTRUCTION_SETS):
            settings["placement"] = Placement(max_tokens=64, kernels=name)
            results.append(run_ops(tmp_path, ops, inputs, dict(widths), dict(vectors), **settings))
        for other in results[1:]:
            for name, content in other.items():
                np.testing.assert_array_equal(content, results[0][name])
        return results[0]

    return run


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width, run):
    x, weight, bias = normal(3, width, scale=5.0), normal(width, seed=1), normal(width, seed=2)
    x[1] += 100.0
    vectors = {"weight": weight, "bias": bias}
    ops = [
        RMSNorm("x", "rms", "weight", 1e-5),
        LayerNorm("x", "layer", "weight", "bias", 1e-5),
        RMSNorm("x", "x", "weight", 0.5),
    ]
    got = run(ops, {"x": x}, {"rms": width, "layer": width}, vectors)
    tensors = [torch.from_numpy(each) for each in (x, weight, bias)]
    expected = rms_norm(*tensors[:2], 1e-5).numpy()
    np.testing.assert_allclose(got["rms"], expected, rtol=1e-5, atol=1e-6)
    # The mean of the second row is taken from numbers a hundred times as large.
    np.testing.assert_allclose(got["layer"], layer_norm(*tensors, 1e-5).numpy(), atol=5e-5)
    expected = rms_norm(*tensors[:2], 0.5).numpy()
    np.testing.assert_allclose(got["x"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_groups", "width"), [(1, 20), (3, 20), (4, 64), (7, 1)])
def test_norms_of_groups(num_groups, width, run):
    x, weight = normal(5, num_groups * width), normal(width, seed=1)
    got = run([RMSNorm("x", "x", "weight", 1e-6, num_groups)], {"x": x}, (), {"weight": weight})
    expected = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-6, num_groups)
    np.testing.assert_allclose(got["x"], expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(function, width, run):
    x, factor = normal(4, width, scale=3.0), normal(4, width, seed=1)
    x[1] = np.resize([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4], width)
    x[2] = np.linspace(-9, 9, width)
    ops = [
        Activation("x", "plain", function),
        Activation("x", "times", function, multiply_by="factor"),
        Activation("x", "factor", function, multiply_by="factor"),
    ]
    inputs = {"x": x, "factor": factor}
    got = run(ops, inputs, {"plain": width, "times": width})
    x, factor = torch.from_numpy(x), torch.from_numpy(factor)
    expected = activation(x, function).numpy()
    np.testing.assert_allclose(got["plain"], expected, rtol=2e-6, atol=2e-6)
    expected = activation(x, function, factor).numpy()
    np.testing.assert_allclose(got["times"], expected, rtol=2e-6, atol=4e-6)
    np.testing.assert_array_equal(got["factor"], got["times"])


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "relu"])
def test_what_is_no_number_stays_none(function, run):
    x = np.zeros((1, 20), np.float32)
    x[0, 3], x[0, 17] = np.nan, np.inf
    got = run([Activation("x", "x", function)], {"x": x})["x"]
    assert np.isnan(got[0, 3])
    assert not np.isfinite(got[0, 17])
    assert np.isfinite(np.delete(got[0], [3, 17])).all()


def test_sums_and_products(run):
    x, y = normal(3, 50), normal(3, 50, seed=1)
    got = run([Scale("x", 0.3), Add("x", "y")], {"x": x, "y": y})
    np.testing.assert_array_equal(got["x"], x * np.float32(0.3))
    np.testing.assert_array_equal(got["y"], y + x * np.float32(0.3))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "factor"), [(16, 16, 1.0), (20, 12, 1.3), (6, 2, 0.5), (64, 64, 1.0)]
)
def test_rope(interleaved, head_dim, rotary_dim, factor, run):
    x = normal(5, 3 * head_dim)
    spec = RopeSpec(10_000.0, rotary_dim)
    half = rotary_dim // 2
    frequencies = (spec.theta ** (-np.arange(half) / half)).astype(np.float32)
    op = Rope("x", 3, head_dim, rotary_dim, interleaved, "frequencies", factor)
    for position in (0, 1000):
        got = run([op], {"x": x}, (), {"frequencies": frequencies}, position=position)
        expected = rope(
            torch.from_numpy(x),
            torch.arange(position, position + 5),
            torch.from_numpy(frequencies),
            num_heads=3,
            interleaved=interleaved,
            factor=factor,
        )
        np.testing.assert_allclose(got["x"], expected.numpy(), rtol=1e-5, atol=2e-6)


SHAPES = {  # heads, key/value heads, width of a head
    "one": (1, 1, 16),
    "groups": (4, 2, 64),
    "all-of-one": (6, 1, 32),
    "narrow": (2, 2, 1),
    "odd": (3, 3, 7),
    "not-of-16": (4, 2, 20),
    "wide": (2, 1, 136),
}


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, window, run):
    """Runs of 1, 21, 16 and 9 tokens, one behind the other, over pages of 16 positions."""
    heads, kv_heads, dim = SHAPES[shape]
    counts, scale = (1, 21, 16, 9), 1.4 * dim**-0.5
    total = sum(counts)
    query = normal(total, heads * dim, scale=2.0)
    key, value = normal(total, kv_heads * dim, seed=1), normal(total, kv_heads * dim, seed=2)
    op = Attention("query", "key", "value", "out", 0, heads, kv_heads, dim, scale, window)
    ends = np.cumsum(counts)
    parts = [
        {"query": query[a:b], "key": key[a:b], "value": value[a:b]}
        for a, b in zip(ends - counts, ends, strict=True)
    ]
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "rope": None}
    for last in range(len(parts)):
        end = ends[last]
        got = run([op], parts[last], {"out": heads * dim}, before=parts[:last], spec_changes=sizes)
        expected = attention(
            torch.from_numpy(parts[last]["query"]),
            torch.from_numpy(key[:end]).half(),
            torch.from_numpy(value[:end]).half(),
            num_heads=heads,
            num_kv_heads=kv_heads,
            scale=scale,
            window=window,
        )
        np.testing.assert_allclose(got["out"], expected.numpy(), rtol=1e-5, atol=5e-6)


def test_attention_to_scores_far_apart(run):
    """Scores up to tens of thousands: all weight on one key, nothing overflows."""
    dim, num = 16, 20
    query, value = np.full((num, dim), 30.0, np.float32), normal(num, dim)
    key = np.linspace(-60, 60, num, dtype=np.float32)[:, None].repeat(dim, 1)
    op = Attention("query", "key", "value", "out", 0, 1, 1, dim, 1.0)
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": dim}
    inputs = {"query": query, "key": key, "value": value}
    got = run([op], inputs, {"out": dim}, spec_changes=sizes)["out"]
    np.testing.assert_array_equal(got, value.astype(np.float16).astype(np.float32))


def test_keys_and_values_are_rounded_to_float16(run):
    """Halves to even, beyond the range to infinity, below it to the subnormal ones."""
    values = [1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 2**-24, 2**-25, 3 * 2**-26, 5e-8]
    values += [-value for value in values]
    value = np.array([values], np.float32)
    op = Attention("query", "key", "value", "out", 0, 1, 1, 16, 1.0)
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16}
    zeros = np.zeros((1, 16), np.float32)
    inputs = {"query": zeros, "key": zeros, "value": value}
    got = run([op], inputs, {"out": 16}, spec_changes=sizes)["out"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, value.astype(np.float16).astype(np.float32))


def test_layers_keep_their_keys_apart(run):
    dim = 16
    first, second = normal(3, dim), normal(3, dim, seed=1)
    ops = [
        Attention("query", "first", "first", "a", 0, 1, 1, dim, 1.0),
        Attention("query", "second", "second", "b", 1, 1, 1, dim, 1.0),
        Attention("query", "second", "first", "c", 0, 1, 1, dim, 1.0),
    ]
    inputs = {"query": normal(3, dim, seed=2), "first": first, "second": second}
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": dim, "num_layers": 2}
    got = run(ops, inputs, {"a": dim, "b": dim, "c": dim}, spec_changes=sizes)
    for out, key, value in (("a", first, first), ("b", second, second), ("c", second, first)):
        expected = attention(
            torch.from_numpy(inputs["query"]),
            torch.from_numpy(key).half(),
            torch.from_numpy(value).half(),
            num_heads=1,
            num_kv_heads=1,
            scale=1.0,
        )
        np.testing.assert_allclose(got[out], expected.numpy(), rtol=1e-5, atol=2e-6)
