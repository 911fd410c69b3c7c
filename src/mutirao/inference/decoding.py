"""Tokens out of a backend, one after the other: prefill, drafts, checks, and the KV cache.

The decoder remembers which tokens' keys and values the backend holds, so that a conversation's
next turn runs only what is new. With speculation it yields exactly the tokens that it would
yield without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InferenceError
from mutirao.inference.native.backend import Mode, Wanted
from mutirao.inference.sampling import (
    Probabilities,
    Sampling,
    draw,
    greedy,
    probabilities,
    verify_greedy,
    verify_sampled,
)
from mutirao.inference.speculation import Confidence, PassTimes, PromptLookup

Floats = NDArray[np.float32]

LOOKUP_RATE = 0.5
"""Share of looked-up tokens expected to be kept, before any was checked (assumption)."""


class Backend(Protocol):
    """What runs a program: the native engine, or the oracle in PyTorch."""

    def run(
        self, tokens: Sequence[int], position: int, *, logits: Wanted = ..., mode: Mode = ...
    ) -> Floats:
        """See ``NativeBackend.run``."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...

    @property
    def kernels(self) -> str:
        """The kernels in use, such as 'avx512'."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes of weights streamed so far."""
        ...

    @property
    def wait_s(self) -> float:
        """Time that computing waited for weights, in seconds."""
        ...

    def op_seconds(self) -> dict[str, float]:
        """Return the time spent in each kind of op, in seconds."""
        ...


@dataclass
class Counts:
    """What generation cost and brought; times in seconds."""

    num_tokens: int = 0
    num_passes: int = 0
    num_drafted: int = 0
    num_kept: int = 0
    draft_s: float = 0.0
    check_s: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were kept; None where none was drafted."""
        return self.num_kept / self.num_drafted if self.num_drafted else None


@dataclass
class _Draft:
    tokens: list[int] = field(default_factory=list)
    probs: list[Probabilities | None] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    is_lookup: bool = False


class Decoder:
    """One sequence of tokens on one backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        times: PassTimes,
        max_draft: int = 0,
        has_draft: bool = False,
    ) -> None:
        """Start with an empty cache.

        Args:
            backend: runs the passes; it keeps keys and values.
            times: first guesses of what passes take; learnt from then on.
            max_draft: most tokens drafted at a time; 0 switches speculation off.
            has_draft: the backend's resident planes are a draft of the model.
        """
        self.backend, self.times = backend, times
        self.max_draft, self.has_draft = max_draft, has_draft
        self.confidence, self.lookup_confidence = Confidence(), Confidence()
        self.lookup_confidence.kept = [LOOKUP_RATE * seen for seen in self.lookup_confidence.seen]
        self.cached: list[int] = []
        """Tokens whose keys and values the backend holds."""

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, counts: Counts
    ) -> Iterator[int]:
        """Yield tokens that go on from a prompt; the caller ends it by closing.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens to yield at most.
            sampling: how they are chosen.
            counts: added to as tokens come.
        """
        rng = sampling.randomness()
        common = _common_length(self.cached, prompt[:-1])
        self.cached = list(prompt[:common])
        row = _numbers(self.backend.run(prompt[common:], common))[-1]
        self.cached += prompt[common:]
        tokens, lookup = list(prompt), PromptLookup()
        new = [greedy(row) if sampling.is_greedy else draw(probabilities(row, sampling), rng)]
        num_left = max_new_tokens
        while True:
            for token in new[:num_left]:
                tokens.append(token)
                counts.num_tokens += 1
                yield token
            num_left -= len(new)
            if num_left <= 0:
                return
            drafted = self._draft(tokens, min(self.max_draft, num_left - 1), sampling, rng, lookup)
            new = self._check(tokens, drafted, sampling, rng, counts)

    def _draft(
        self,
        tokens: Sequence[int],
        most: int,
        sampling: Sampling,
        rng: object,
        lookup: PromptLookup,
    ) -> _Draft:
        if most <= 0:
            return _Draft()
        found = self._look_up(tokens, most, lookup)
        if found.tokens or not self.has_draft:
            return found
        return self._run_draft(tokens, most, sampling, rng)

    def _look_up(self, tokens: Sequence[int], most: int, lookup: PromptLookup) -> _Draft:
        """Take as much of a repetition as is worth checking."""
        rate, expected = 1.0, 1.0
        found = lookup.find(tokens, most)
        each = self.lookup_confidence.rate(0.5)
        costs = PassTimes(0.0, self.times.check_s, self.times.per_row_s)
        num = 0
        while num < len(found) and costs.goes_on(num, expected, rate * each):
            rate *= each
            expected += rate
            num += 1
        return _Draft(found[:num], [None] * num, [0.5] * num, is_lookup=True)

    def _run_draft(
        self, tokens: Sequence[int], most: int, sampling: Sampling, rng: object
    ) -> _Draft:
        drafted = _Draft()
        position = len(tokens) - 1
        rate, expected, token = 1.0, 1.0, tokens[-1]
        typical = self.confidence.rate(0.99)
        while len(drafted.tokens) < most and self.times.goes_on(
            len(drafted.tokens), expected, rate * typical
        ):
            begin = time.perf_counter()
            row = self.backend.run([token], position + len(drafted.tokens), mode="draft")[0]
            if not np.isfinite(row.max()):
                break  # where the model's own are no better, the check says so
            if sampling.is_greedy:
                token, probs = greedy(row), None
                top = 1.0 / float(np.exp(row - row[token]).sum())
            else:
                probs = probabilities(row, sampling)
                token = draw(probs, rng)  # type: ignore[arg-type]
                top = float(probs[token])
            self.times.saw_draft(time.perf_counter() - begin)
            drafted.tokens.append(token)
            drafted.probs.append(probs)
            drafted.confidences.append(top)
            rate *= self.confidence.rate(top)
            expected += rate
        return drafted

    def _check(
        self,
        tokens: Sequence[int],
        drafted: _Draft,
        sampling: Sampling,
        rng: object,
        counts: Counts,
    ) -> list[int]:
        """Run the last token and those drafted; return between one and all of them plus one."""
        position = len(tokens) - 1
        begin = time.perf_counter()
        rows = _numbers(self.backend.run([tokens[-1], *drafted.tokens], position, logits="all"))
        if sampling.is_greedy:
            new = verify_greedy(drafted.tokens, rows)
        else:
            full = (probabilities(row, sampling) for row in rows)
            new = verify_sampled(drafted.tokens, drafted.probs, full, rng)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begin
        self.times.saw_check(len(rows), seconds)
        self.cached = [*tokens, *new[:-1]]
        num_kept = len(new) - 1
        learner = self.lookup_confidence if drafted.is_lookup else self.confidence
        for index, confidence in enumerate(drafted.confidences[: num_kept + 1]):
            learner.learn(confidence, index < num_kept)
        counts.num_passes += 1
        counts.num_drafted += len(drafted.tokens)
        counts.num_kept += num_kept
        counts.check_s += seconds
        return new


def _numbers(rows: Floats) -> Floats:
    """Return logits as they are, or refuse what no token can be chosen from.

    Raises:
        InferenceError: they are not numbers.
    """
    if not np.isfinite(rows.max()):
        raise InferenceError(
            "the model's logits are not numbers; its weights are damaged, or too large to compute "
            "with: download or convert the model again"
        )
    return rows


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
