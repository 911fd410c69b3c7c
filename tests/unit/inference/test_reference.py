"""The oracle's operations against sums written out, and its backend's use of store and cache."""

import itertools
import math

import numpy as np
import pytest
import torch

from mutirao.errors import InputError, ShapeError
from mutirao.inference.reference import (
    ReferenceBackend,
    activation,
    attention,
    layer_norm,
    matmul,
    quantize_activations,
    rms_norm,
    rope,
)
from mutirao.inference.store.weight_store import WeightStore


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_activations_are_rounded_by_blocks_halves_to_even():
    x = torch.zeros(2, 64)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, -2.5, -126.6, 3.2])
    x[1, 32] = -2.0
    codes, scales = quantize_activations(x)
    assert codes.dtype == torch.int8
    assert codes[0, :6].tolist() == [127, 0, 2, -2, -127, 3]
    assert (codes[1, 32], codes.count_nonzero()) == (-127, 6)
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.0], [0.0, 2 / 127]]))
    assert not quantize_activations(torch.full((1, 32), 1e-39))[0].any()
    with pytest.raises(ShapeError, match="33 columns"):
        quantize_activations(torch.zeros(1, 33))
    assert quantize_activations(torch.zeros(0, 64))[1].shape == (0, 2)


def test_a_product_with_rounded_activations():
    x, weight, bias = _random(3, 64), _random(5, 64, seed=1), _random(5, seed=2)
    codes, scales = quantize_activations(x)
    expected = np.zeros((3, 5))
    for row in range(3):
        for out in range(5):
            for column in range(64):
                a = float(codes[row, column]) * float(scales[row, column // 32])
                expected[row, out] += a * float(weight[out, column])
    got = matmul(x, weight, bias, quantize=True) - bias
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (got - x @ weight.T).abs().max() > 1e-3
    torch.testing.assert_close(matmul(x, weight), x @ weight.T)
    assert matmul(x[:0], weight, bias, quantize=True).shape == (0, 5)


def test_norms():
    x, weight, bias = _random(3, 12), _random(12, seed=1), _random(12, seed=2)
    got = layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(got, torch.nn.functional.layer_norm(x, (12,), weight, bias, 1e-5))
    got = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, (12,), weight, 1e-5))
    groups = torch.cat([rms_norm(part, weight[:4], 0.5) for part in x.split(4, -1)], -1)
    torch.testing.assert_close(rms_norm(x, weight[:4], 0.5, 3), groups)
    assert rms_norm(x[:0], weight[:4], 0.5, 3).shape == (0, 12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_and_leaves_the_rest(interleaved):
    x, positions = _random(2, 2 * 6), torch.tensor([0, 5])
    frequencies = torch.tensor([1.0, 0.1])
    kwargs = {"num_heads": 2, "interleaved": interleaved, "factor": 2.0}
    got = rope(x, positions, frequencies, **kwargs)
    expected = x.clone()
    for row, position in enumerate(positions.tolist()):
        for head in (0, 6):
            for pair in range(2):
                i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 2)
                turn = 2 * np.exp(1j * position * float(frequencies[pair]))
                z = complex(x[row, head + i], x[row, head + j]) * turn
                expected[row, head + i], expected[row, head + j] = z.real, z.imag
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got[:, 4:6], x[:, 4:6])


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_attention_sees_what_it_may(window):
    num_tokens, num_positions, dim = 2, 7, 4
    query, keys = _random(num_tokens, 4 * dim), _random(num_positions, 2 * dim, seed=1)
    values = _random(num_positions, 2 * dim, seed=2)
    got = attention(query, keys, values, num_heads=4, num_kv_heads=2, scale=0.7, window=window)
    for token in range(num_tokens):
        position = num_positions - num_tokens + token
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(4):
            q = query[token, head * dim :][:dim]
            kv = slice(head // 2 * dim, head // 2 * dim + dim)
            scores = [0.7 * float(q @ keys[s, kv]) for s in range(first, position + 1)]
            weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            expected = sum(
                w * values[s, kv] for w, s in zip(weights, range(first, position + 1), strict=True)
            )
            torch.testing.assert_close(got[token, head * dim :][:dim], expected)


def test_activations():
    values = [-2.0, -0.5, 0.0, 1.0, 3.0]
    x = torch.tensor([values])
    by_hand = {
        "silu": [v / (1 + math.exp(-v)) for v in values],
        "gelu": [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in values],
        "gelu_tanh": [
            v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2 for v in values
        ],
        "relu": [max(v, 0.0) for v in values],
    }
    for name, expected in by_hand.items():
        torch.testing.assert_close(activation(x, name), torch.tensor([expected]))
        torch.testing.assert_close(activation(x, name, x), torch.tensor([expected]) * x)


@pytest.fixture(scope="module")
def store(tiny_model_directory, tmp_path_factory):
    """The tiny model, bfloat16; 64 wide, context of 128, vocabulary of 320."""
    folder = tmp_path_factory.mktemp("stores") / "tiny"
    return WeightStore.build(tiny_model_directory, folder, lambda done, total: None)


def test_logits_of_the_last_of_all_and_of_none(store):
    every = ReferenceBackend(store).run([5, 6, 7], 0, logits="all")
    assert (every.shape, every.dtype) == ((3, 320), np.float32)
    backend = ReferenceBackend(store)
    assert backend.run([5, 6], 0, logits="none").shape == (0, 320)
    assert backend.num_cached == 2
    last = backend.run([7], 2)
    np.testing.assert_allclose(last[0], every[2], atol=1e-4)
    assert backend.run([], 3).shape == (0, 320)
    assert backend.num_cached == 3


def test_tokens_run_again_replace_those_that_lay_there(store):
    backend = ReferenceBackend(store)
    expected = backend.run([5, 6, 7], 0)
    backend.run([5, 9, 9, 9], 0)
    np.testing.assert_allclose(backend.run([6, 7], 1), expected, atol=1e-4)
    assert backend.num_cached == 3
    with pytest.raises(InputError, match="expected 0 to 3"):
        backend.run([1], 4)


@pytest.mark.parametrize(
    ("tokens", "position", "options", "message"),
    [
        ([320], 0, {}, "expected 0 to 319"),
        ([0, -1], 0, {}, "expected 0 to 319"),
        ([1], 1, {}, "expected 0 to 0"),
        ([1], -1, {}, "expected 0 to 0"),
        ([1] * 129, 0, {}, "context of 128"),
        ([1], 0, {"logits": "first"}, "expected last, all or none"),
        ([1], 0, {"mode": "fast"}, "full or draft"),
    ],
)
def test_what_cannot_be_run_is_refused(store, tokens, position, options, message):
    backend = ReferenceBackend(store)
    with pytest.raises(InputError, match=message):
        backend.run(tokens, position, **options)
    assert backend.num_cached == 0


@pytest.mark.parametrize("planes", [{"blk.0.attn_q": 0}, {"blk.0.attn_q": 6}, {"blk.9.attn_q": 1}])
def test_a_draft_of_planes_that_are_not_there_is_refused(store, planes):
    with pytest.raises(InputError, match="draft_planes"):
        ReferenceBackend(store, draft_planes=planes)


def test_a_pass_can_be_run_in_parts(store):
    whole = ReferenceBackend(store).run([5, 6, 7], 0)
    backend, ops = ReferenceBackend(store), []
    state = backend.begin([5, 6, 7], 0)
    starts = (0, *backend.program.layer_starts, len(backend.program.ops))
    for begin, end in itertools.pairwise(starts):
        hidden = state.buffers.get("hidden")
        state.buffers = {} if hidden is None else {"hidden": hidden}
        for op in backend.program.ops[begin:end]:
            backend.execute(op, state)
            ops.append(op)
    assert tuple(ops) == backend.program.ops
    np.testing.assert_array_equal(state.buffers["logits"].numpy(), whole)
