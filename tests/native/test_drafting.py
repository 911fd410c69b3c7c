"""Decoding with a draft made of a model's own resident planes, and with look-ups, by the engine."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from small_stores import SPECS, make_store, mixed_formats, small_spec
from tiny_gguf import QUANTIZED, SPLITS

from mutirao.inference.decoding import Counts, Decoder
from mutirao.inference.native.backend import NOTHING, NativeBackend, Placement
from mutirao.inference.sampling import Sampling, probabilities
from mutirao.inference.speculation import PassTimes

ACCEPTED, REFUSED = 1e-3, 1e-9
"""p-values of a right and of a wrong rule; seeds are fixed."""


class Always(PassTimes):
    """Goes on drafting, whatever it costs."""

    def goes_on(self, num_drafted, expected, rate):
        return True


def placement(resident, **changes):
    small = {"context": 128, "max_logit_rows": 16, "num_readers": 2, "ring_bytes": 4 << 20}
    return Placement(resident, **small | changes)


def upper_planes(store, fewer=1):
    """All but the last planes of every matrix that has several."""
    resident = {name: max(1, len(t.planes) - fewer) for name, t in store.tensors.items()}
    return resident | ({"token_embd": NOTHING} if "output" in store.tensors else {})


def generate(backend, prompt, num, *, max_draft, sampling=None, has_draft=True, times=None):
    times, counts = times or Always(0.0, 1.0, 0.0), Counts()
    decoder = Decoder(backend, times=times, max_draft=max_draft, has_draft=has_draft)
    return list(decoder.generate(prompt, num, sampling or Sampling(), counts)), counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("fewer", [1, 2])
@pytest.mark.parametrize("formats", ["mixed", *SPLITS])
def test_greedy_tokens_are_those_without_drafts(architecture, fewer, formats, tmp_path):
    spec = dataclasses.replace(SPECS[architecture], tied_head=False)
    formats = mixed_formats(spec) if formats == "mixed" else formats
    store = make_store(tmp_path, spec, formats, spread=0.12)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (1, 2, 9)] + [[5, 6, 7, 8] * 6]
    with NativeBackend(store, placement({}, num_threads=1)) as whole:
        expected = [generate(whole, prompt, 30, max_draft=0)[0] for prompt in prompts]
    assert len({tuple(each) for each in expected}) == len(prompts)
    drafted = kept = 0
    for num_threads, max_draft in ((1, 15), (2, 4)):
        resident = upper_planes(store, fewer)
        with NativeBackend(store, placement(resident, num_threads=num_threads)) as backend:
            for prompt, right in zip(prompts, expected, strict=True):
                tokens, counts = generate(backend, prompt, 30, max_draft=max_draft)
                assert tokens == right
                drafted, kept = drafted + counts.num_drafted, kept + counts.num_kept
            measured = PassTimes(1e-4, 1e-3, 1e-5)
            tokens, _ = generate(backend, prompts[2], 30, max_draft=15, times=measured)
            assert tokens == expected[2]
    assert 0 < kept < drafted


def test_looked_up_tokens_are_checked_too(tmp_path):
    """A greedy random model runs in circles sooner or later; then look-ups are right."""
    store = make_store(tmp_path, small_spec(vocab_size=12), "Q8_0", spread=0.3)
    with NativeBackend(store, placement({})) as backend:
        expected, _ = generate(backend, [1, 2, 3], 120, max_draft=0)
        tokens, counts = generate(backend, [1, 2, 3], 120, max_draft=15, has_draft=False)
        assert tokens == expected
        assert counts.num_kept > 20


def joint(backend, prompt, num, vocab, sampling, mode="full"):
    """The probability of every sequence of so many tokens, one pass for each beginning."""
    probs = {}
    for beginning in itertools.product(range(vocab), repeat=num - 1):
        backend.run([*prompt, *beginning], 0, logits="none")
        rows = backend.run([prompt[-1], *beginning], len(prompt) - 1, logits="all", mode=mode)
        shares = [probabilities(row, sampling) for row in rows]
        first = np.prod([shares[i][token] for i, token in enumerate(beginning)])
        probs |= {(*beginning, last): first * shares[-1][last] for last in range(vocab)}
    return probs


def p_value(counts, probs):
    total = sum(counts.values())
    kept = [sequence for sequence in probs if probs[sequence] * total >= 5]
    expected = np.array([probs[sequence] for sequence in kept] + [0.0]) * total
    came = np.array([counts[sequence] for sequence in kept] + [0.0])
    expected[-1], came[-1] = total - expected.sum(), total - came.sum()
    return stats.chisquare(came, expected * came.sum() / expected.sum()).pvalue


def test_drawn_tokens_have_the_models_distribution(tmp_path):
    store = make_store(tmp_path, small_spec(vocab_size=4), "Q4_1", seed=3, spread=0.4)
    sampling, prompt, counts = Sampling(temperature=1.5), [1, 3], Counter()
    drafted = kept = 0
    with NativeBackend(store, placement(upper_planes(store, 2), num_threads=1)) as backend:
        for seed in range(2000):
            one = Sampling(temperature=1.5, seed=seed)
            tokens, cost = generate(backend, prompt, 4, max_draft=2, sampling=one)
            counts[tuple(tokens[:3])] += 1
            drafted, kept = drafted + cost.num_drafted, kept + cost.num_kept
        assert 0.3 < kept / drafted < 0.99
        assert p_value(counts, joint(backend, prompt, 3, 4, sampling)) > ACCEPTED
        assert p_value(counts, joint(backend, prompt, 3, 4, sampling, "draft")) < REFUSED


@pytest.mark.parametrize("name", [*QUANTIZED, *SPLITS])
def test_a_conversation_goes_on_as_on_a_fresh_cache(name, tmp_path):
    store = make_store(tmp_path, SPECS["llama"], name, spread=0.12)
    with NativeBackend(store, placement(upper_planes(store))) as backend:
        decoder = Decoder(backend, times=Always(0, 1, 0), max_draft=5, has_draft=True)
        text = [1, 2, 3]
        for turn in range(3):
            answer = list(decoder.generate(text, 11, Sampling(), Counts()))
            with NativeBackend(store, placement({})) as other:
                assert answer == generate(other, text, 11, max_draft=0)[0]
            text = [*text, *answer, turn, 9]
