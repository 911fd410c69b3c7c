"""Decoding with speculation is decoding without it, and the KV cache is never believed wrongly.

The backend here is a table: logits follow from the last two tokens. It remembers who wrote each
position of its cache, and in which mode, so a pass over keys that a draft left behind, or that
belong to other tokens, fails at once.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from mutirao.errors import InferenceError
from mutirao.inference.decoding import Counts, Decoder
from mutirao.inference.sampling import Sampling, probabilities
from mutirao.inference.speculation import PassTimes

VOCAB = 5
CONTEXT = 100
ACCEPTED = 1e-3
"""Least p-value of a right rule; seeds are fixed."""
REFUSED = 1e-9
"""Greatest p-value of a wrong one."""


class TableModel:
    """A model whose logits depend on the last two tokens, and a draft that is near it."""

    def __init__(self, vocab=VOCAB, seed=0, error=0.5, scale=1.5):
        rng = np.random.default_rng(seed)
        self.tables = {"full": rng.normal(scale=scale, size=(vocab + 1, vocab, vocab))}
        noise = rng.normal(scale=scale, size=(vocab + 1, vocab, vocab))
        self.tables["draft"] = (1 - error) * self.tables["full"] + error * noise
        self.cache = []
        self.runs = []
        self.fails_at = None

    def logits(self, tokens, mode="full"):
        before = tokens[-2] if len(tokens) > 1 else len(self.tables["full"]) - 1
        return self.tables[mode][before, tokens[-1]].astype(np.float32)

    def run(self, tokens, position, *, logits="last", mode="full"):
        self.runs.append((mode, position, list(tokens)))
        if self.fails_at == len(self.runs):
            raise KeyboardInterrupt
        assert tokens
        assert position + len(tokens) <= CONTEXT
        assert 0 <= position <= len(self.cache)
        if mode == "full":
            assert all(writer == "full" for _, writer in self.cache[:position])
        self.cache = self.cache[:position] + [(token, mode) for token in tokens]
        text = [token for token, _ in self.cache]
        ends = range(position + 1, len(text) + 1) if logits == "all" else [len(text)]
        return np.array([self.logits(text[:end], mode) for end in ends])

    def greedy(self, prompt, num):
        tokens = list(prompt)
        for _ in range(num):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]


class Always(PassTimes):
    """Goes on drafting, whatever it costs."""

    def goes_on(self, num_drafted, expected, rate):
        return True


def decoder_of(model, *, max_draft=7, has_draft=True, times=None):
    times = times or Always(0.0, 1.0, 0.0)
    return Decoder(model, times=times, max_draft=max_draft, has_draft=has_draft)


def generate(decoder, prompt, num, sampling=None, counts=None):
    tokens = decoder.generate(prompt, num, sampling or Sampling(), counts or Counts())
    return list(tokens)


PROMPTS = ([0], [1, 2], [3, 1, 4, 1, 0, 2, 3, 1, 4, 1], [2] * 20)


@pytest.mark.parametrize("error", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_draft", [0, 1, 2, 7, 15])
@pytest.mark.parametrize("has_draft", [False, True])
def test_greedy_tokens_are_those_of_the_model(error, max_draft, has_draft):
    for seed, prompt in itertools.product(range(6), PROMPTS):
        model = TableModel(seed=seed, error=error)
        decoder = decoder_of(model, max_draft=max_draft, has_draft=has_draft)
        assert generate(decoder, prompt, 40) == model.greedy(prompt, 40)


def test_greedy_tokens_with_times_that_are_learnt():
    for seed in range(10):
        model = TableModel(vocab=50, seed=seed, error=0.2)
        decoder = decoder_of(model, times=PassTimes(1e-5, 1e-4, 1e-6))
        for prompt in PROMPTS:
            assert generate(decoder, prompt, 60) == model.greedy(prompt, 60)


@pytest.mark.parametrize("num", [1, 2, 3, 10])
@pytest.mark.parametrize("max_draft", [0, 7])
def test_no_more_tokens_than_asked_for_and_none_run_past_them(num, max_draft):
    model = TableModel(error=0.0)
    counts, decoder = Counts(), decoder_of(model, max_draft=max_draft)
    assert len(generate(decoder, [1, 2, 3], num, None, counts)) == num
    assert counts.num_tokens == num
    assert max(position + len(tokens) for _, position, tokens in model.runs) <= 3 + num
    assert generate(decoder_of(TableModel()), [1], 0) == []


def test_a_right_draft_saves_passes_and_a_wrong_one_costs_none():
    counts = Counts()
    model = TableModel(vocab=60, error=0.0)
    generate(decoder_of(model, max_draft=7), [1, 2], 41, None, counts)
    assert counts.acceptance == 1.0
    assert (counts.num_passes, counts.num_drafted) == (5, 35)
    wrong, model = Counts(), TableModel(vocab=60, error=1.0)
    generate(decoder_of(model, max_draft=7), [1, 2], 41, None, wrong)
    assert wrong.acceptance < 0.3
    assert wrong.num_passes <= 40
    full = [len(tokens) for mode, _, tokens in model.runs if mode == "full"]
    assert max(full[1:]) == 8
    none = Counts()
    generate(decoder_of(TableModel(), max_draft=0), [1, 2], 41, None, none)
    assert (none.acceptance, none.num_passes, none.num_drafted) == (None, 40, 0)


def test_repetitions_are_looked_up_in_the_text():
    """A greedy table of few tokens runs in circles."""
    model, counts = TableModel(), Counts()
    decoder = decoder_of(model, has_draft=False, times=PassTimes(1.0, 0.1, 0.001))
    prompt = [*model.greedy([1, 2], 30)]
    assert generate(decoder, prompt, 60, None, counts) == model.greedy(prompt, 60)
    assert counts.num_kept > 40
    assert counts.num_passes < 20
    assert not any(mode == "draft" for mode, _, _ in model.runs)


def joint(model, prompt, num, sampling, mode="full"):
    """Return the probability of every sequence of so many tokens."""
    probs = {}
    for sequence in itertools.product(range(VOCAB), repeat=num):
        probs[sequence] = 1.0
        for index in range(num):
            logits = model.logits([*prompt, *sequence[:index]], mode)
            probs[sequence] *= probabilities(logits, sampling)[sequence[index]]
    return probs


def p_value(counts, probs):
    total = sum(counts.values())
    if any(probs[sequence] == 0 for sequence in counts):
        return 0.0
    expected = np.array([probs[s] * total for s in probs if probs[s] * total >= 5])
    came = np.array([counts[s] for s in probs if probs[s] * total >= 5], float)
    rest_expected, rest_came = total - expected.sum(), total - came.sum()
    if rest_expected >= 5:
        expected, came = np.append(expected, rest_expected), np.append(came, rest_came)
    else:
        expected *= came.sum() / expected.sum()
    return stats.chisquare(came, expected).pvalue


@pytest.mark.parametrize("kind", ["drafts", "lookups", "none"])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_drawn_tokens_have_the_models_distribution(kind, settings):
    model = TableModel(error=0.6)
    prompt = [1, 2, 0, 3, 1, 2, 0] if kind == "lookups" else [3, 1]
    for two, then in (((2, 0), 3), ((0, 3), 1), ((3, 1), 2)):
        model.tables["full"][(*two, then)] = 1.5
    decoder = decoder_of(model, max_draft=3, has_draft=kind == "drafts")
    if kind == "none":
        decoder.max_draft = 0
    counts, total = Counter(), Counts()
    for seed in range(6000):
        sampling = Sampling(**settings, seed=seed)
        counts[tuple(generate(decoder, prompt, 4, sampling, total)[:3])] += 1
    if kind != "none":
        assert total.num_drafted > 1000
        assert 0.05 < total.acceptance < 0.9
    sampling = Sampling(**settings)
    assert p_value(counts, joint(model, prompt, 3, sampling)) > ACCEPTED
    assert p_value(counts, joint(model, prompt, 3, sampling, "draft")) < REFUSED


def test_seeds_decide():
    model = TableModel(vocab=40)
    first, again, other = (
        generate(decoder_of(model), [1, 2], 30, Sampling(temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_conversation_runs_only_what_is_new():
    model = TableModel(vocab=30, error=0.3)
    decoder = decoder_of(model)
    text = [1, 2, 3]
    for turn in range(4):
        begin = len(model.runs)
        answer = generate(decoder, text, 9)
        assert answer == model.greedy(text, 9)
        mode, position, tokens = model.runs[begin]
        assert mode == "full"
        assert position + len(tokens) == len(text)
        # All of the last turn is there, but perhaps its last token.
        assert len(tokens) <= (3 if turn == 0 else 5)
        text = [*text, *answer, 4, 5, turn]


@pytest.mark.parametrize(
    "then", [[1, 2, 3], [1, 2], [1], [2, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [9] * 50]
)
def test_any_prompt_after_any_other_is_as_on_a_fresh_cache(then):
    model = TableModel(vocab=30, error=0.3)
    decoder = decoder_of(model)
    generate(decoder, [1, 2, 3], 20)
    assert generate(decoder, then, 20) == model.greedy(then, 20)
    assert generate(decoder, then, 20) == model.greedy(then, 20)


def test_generations_that_are_given_up():
    model = TableModel(vocab=30, error=0.3)
    decoder = decoder_of(model)
    for num in (1, 2, 5, 6, 11):
        tokens = decoder.generate([1, 2, 3], 30, Sampling(), Counts())
        assert list(itertools.islice(tokens, num)) == model.greedy([1, 2, 3], 30)[:num]
        tokens.close()
        assert generate(decoder, [1, 2, 3, 4], 10) == model.greedy([1, 2, 3, 4], 10)


def test_interrupts_in_any_pass():
    for at in range(1, 30):
        model = TableModel(vocab=30, error=0.3)
        decoder = decoder_of(model)
        model.fails_at = at
        with pytest.raises(KeyboardInterrupt):
            generate(decoder, [1, 2, 3], 90)
        text = [1, 2, 3, *model.greedy([1, 2, 3], 9)]
        assert generate(decoder, text, 10) == model.greedy(text, 10)


def test_a_prompt_that_is_cached_whole_runs_its_last_token():
    model = TableModel(vocab=30)
    decoder = decoder_of(model)
    generate(decoder, [1, 2, 3], 1)
    assert generate(decoder, [1, 2, 3], 1) == model.greedy([1, 2, 3], 1)
    assert model.runs == [("full", 0, [1, 2, 3]), ("full", 2, [3])]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(wrong, temperature):
    model = TableModel(vocab=30)
    greedy = model.greedy([1, 2], 5)
    model.tables["full"][greedy[2], greedy[3], 7] = wrong
    model.tables["draft"][greedy[2], greedy[3], 7] = wrong
    sampling = Sampling(temperature)
    with pytest.raises(InferenceError, match="logits are not numbers"):
        generate(decoder_of(model), [1, 2, *greedy[:4]], 10, sampling)
    if temperature == 0:
        decoder = decoder_of(model)
        came = []
        with pytest.raises(InferenceError, match="logits are not numbers"):
            came.extend(decoder.generate([1, 2], 10, sampling, Counts()))
        assert decoder.cached[:2] == [1, 2]
    model.tables["full"] = np.nan_to_num(model.tables["full"], nan=0, posinf=0)
    assert generate(decoder_of(model), [1, 2], 10) == model.greedy([1, 2], 10)
