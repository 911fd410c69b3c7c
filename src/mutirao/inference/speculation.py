"""Draft tokens cheaply, have the full model check them in one pass, keep what it agrees with.

Two drafts: a continuation looked up in the text so far, where its end has occurred before
(prompt look-up; Saxena 2023), which costs nothing; and the model's own resident planes, run
token by token. How far to draft is decided at every token by what it is expected to bring: the
draft's own probability of its token, corrected by how often such tokens were kept before,
against the time that drafting and checking one more token takes. All of that is measured while
generating, so a draft that does not pay stops being made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NGRAM = 3
"""Tokens at the end of the text that must have occurred before."""
MAX_NGRAM_SEARCH = 4096
"""How far back is looked, in tokens."""
NUM_BINS = 12
PRIOR_WEIGHT = 4.0
SMOOTHING = 0.2
"""Weight of the newest time measured."""


@dataclass
class Confidence:
    """How often a draft's token is kept, by the probability it gave it; learnt as it goes."""

    kept: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with the draft's own probabilities, as if each had been seen a few times."""
        self.kept = [PRIOR_WEIGHT * (index + 0.5) / NUM_BINS for index in range(NUM_BINS)]
        self.seen = [PRIOR_WEIGHT] * NUM_BINS

    def rate(self, probability: float) -> float:
        """Return the expected share of kept tokens."""
        index = _bin(probability)
        return self.kept[index] / self.seen[index]

    def learn(self, probability: float, was_kept: bool) -> None:
        """Count one token that was checked."""
        index = _bin(probability)
        self.seen[index] += 1
        self.kept[index] += was_kept


def _bin(probability: float) -> int:
    return min(int(probability * NUM_BINS), NUM_BINS - 1)


@dataclass
class PassTimes:
    """Seconds that drafting a token, and checking so many at once, take; learnt as it goes."""

    draft_s: float
    check_s: float
    """A full pass over one token."""
    per_row_s: float
    """What each further token adds to a full pass."""

    def saw_draft(self, seconds: float) -> None:
        """Count one drafted token."""
        self.draft_s += SMOOTHING * (seconds - self.draft_s)

    def saw_check(self, num_rows: int, seconds: float) -> None:
        """Count one full pass."""
        error = seconds - (self.check_s + (num_rows - 1) * self.per_row_s)
        self.check_s = max(self.check_s + SMOOTHING * error, 1e-4)

    def goes_on(self, num_drafted: int, expected: float, rate: float) -> bool:
        """Say whether one more drafted token is worth its time.

        Args:
            num_drafted: tokens drafted so far in this pass.
            expected: tokens that the pass is expected to yield so far, the certain one included.
            rate: probability that all drafted so far are kept, the new one too.
        """
        pass_s = self.check_s + num_drafted * (self.draft_s + self.per_row_s)
        return rate * pass_s > expected * (self.draft_s + self.per_row_s)


class PromptLookup:
    """Continuations of the text's last tokens, from where they occurred before."""

    def __init__(self) -> None:
        self._last_seen: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def find(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to ``most`` tokens that came after the last NGRAM ones occurred before."""
        for end in range(max(self._indexed, NGRAM), len(tokens)):
            self._last_seen[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        begin = self._last_seen.get(tuple(tokens[-NGRAM:]))
        if begin is None or len(tokens) - begin > MAX_NGRAM_SEARCH:
            return []
        return list(tokens[begin : begin + most])
