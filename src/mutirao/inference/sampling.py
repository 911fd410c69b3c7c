"""Choose tokens from logits: greedily, by drawing, and while checking drafted ones.

Checking follows speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1;
Chen et al. 2023, arXiv:2302.01318): whatever the draft, greedy tokens are those of the full
model, and drawn ones have its distribution. A row of probabilities is float64, so that sums
over a vocabulary keep their meaning. Penalties and grammars are left out.

V: vocabulary; K: drafted tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError

Logits = NDArray[np.floating]
Probabilities = NDArray[np.float64]

MAX_TEMPERATURE = 100.0
"""As in the first version of ``mutirao run``; far past the point where all tokens are equal."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 0.0
    """0 takes the most probable token; above, logits are divided by it."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability."""
    top_k: int = 0
    """Draw among this many most probable tokens (and their equals); 0 means all."""
    seed: int = 0
    """Of the draws; a request with the same seed draws the same."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: one is out of range.
        """
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise InputError(f"temperature={self.temperature} is not accepted (expected 0 to 100)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is not accepted (expected above 0, to 1)")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k} is not accepted (expected 0, or more)")

    @property
    def is_greedy(self) -> bool:
        """Say whether nothing is drawn."""
        return self.temperature == 0

    def randomness(self) -> random.Random:
        """Return the source of this request's draws."""
        return random.Random(self.seed)


def greedy(logits_V: Logits) -> int:
    """Return the token with the highest logit; of equal ones the lowest id."""
    return int(np.argmax(logits_V))


def probabilities(logits_V: Logits, sampling: Sampling) -> Probabilities:
    """Return what tokens are drawn with: softmax of logits / temperature, cut, summing to 1.

    Cut first by ``top_k``, then by ``top_p``, as transformers does.

    Args:
        logits_V: (V,) any floating type.
        sampling: the request's; at temperature 0 all probability is on the greedy token.
    """
    if sampling.is_greedy:
        only_V = np.zeros(len(logits_V))
        only_V[greedy(logits_V)] = 1.0
        return only_V
    scaled_V = np.asarray(logits_V, np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled_V):
        scaled_V[scaled_V < np.partition(scaled_V, -sampling.top_k)[-sampling.top_k]] = -np.inf
    scaled_V -= scaled_V.max()
    probs_V: Probabilities = np.exp(scaled_V)
    probs_V /= probs_V.sum()
    return _nucleus(probs_V, sampling.top_p) if sampling.top_p < 1 else probs_V


def draw(probs_V: Probabilities, rng: random.Random) -> int:
    """Return a token with its probability.

    Args:
        probs_V: (V,) not negative; need not sum to 1, but to more than 0.
        rng: source of the one number that is drawn.
    """
    cumulative_V = np.cumsum(probs_V)
    index = int(cumulative_V.searchsorted(rng.random() * cumulative_V[-1], side="right"))
    # Rounding may lead past the last token that can be drawn at all.
    return min(index, int(np.flatnonzero(probs_V)[-1]))


def verify_greedy(draft_tokens: Sequence[int], logits: Iterable[Logits]) -> list[int]:
    """Return the tokens that greedy decoding yields, as far as the draft foresaw them, and one.

    Args:
        draft_tokens: K drafted tokens.
        logits: K + 1 rows of (V,) of the full model, after the context, after the first drafted
            token, and so on; rows are taken only as far as they are needed.

    Returns:
        Between 1 and K + 1 tokens: those drafted rightly, then what the model says instead of
        the first wrong one, or after the last.
    """
    rows = iter(logits)
    tokens: list[int] = []
    for drafted in draft_tokens:
        tokens.append(greedy(next(rows)))
        if tokens[-1] != drafted:
            return tokens
    return [*tokens, greedy(next(rows))]


def verify_sampled(
    draft_tokens: Sequence[int],
    draft_probs: Iterable[Probabilities | None],
    full_probs: Iterable[Probabilities],
    rng: random.Random,
) -> list[int]:
    """Return tokens with the full model's distribution, most of them drafted ones.

    A drafted token x is kept with probability min(1, p(x) / q(x)); the first that is not is
    replaced by a draw from max(0, p - q).

    Args:
        draft_tokens: K drafted tokens, each drawn from its row of ``draft_probs``.
        draft_probs: q, K rows of (V,); None where the draft was certain of its token, such as
            one looked up in the prompt.
        full_probs: p, K + 1 rows of (V,), cut as ``probabilities`` cuts them; rows are taken
            only as far as they are needed.
        rng: source of the draws; not the one that drew the draft in the same state.

    Returns:
        Between 1 and K + 1 tokens: the kept ones, then the replacement, or one more token
        where all were kept.
    """
    rows = iter(full_probs)
    tokens: list[int] = []
    for drafted, draft_V in zip(draft_tokens, draft_probs, strict=True):
        full_V = next(rows)
        likelihood = 1.0 if draft_V is None else float(draft_V[drafted])
        assert likelihood > 0, "a token was drafted that the draft could not draw"
        if rng.random() * likelihood < full_V[drafted]:
            tokens.append(drafted)
            continue
        return [*tokens, draw(_residual(full_V, draft_V, drafted), rng)]
    return [*tokens, draw(next(rows), rng)]


def _nucleus(probs_V: Probabilities, top_p: float) -> Probabilities:
    # All tokens below this together have less than 1 - top_p, so that they need no sorting.
    candidates = np.flatnonzero(probs_V >= (1 - top_p) / len(probs_V))
    order = candidates[np.argsort(-probs_V[candidates], kind="stable")]
    before = np.cumsum(probs_V[order]) - probs_V[order]
    kept = order[before < top_p]
    nucleus_V = np.zeros_like(probs_V)
    nucleus_V[kept] = probs_V[kept] / probs_V[kept].sum()
    return nucleus_V


def _residual(full_V: Probabilities, draft_V: Probabilities | None, drafted: int) -> Probabilities:
    if draft_V is None:
        rest_V = full_V.copy()
        rest_V[drafted] = 0.0
    else:
        rest_V = np.maximum(full_V - draft_V, 0.0)
    # Only rounding can leave nothing: q over p for one token means p over q for another.
    return rest_V if rest_V.any() else full_V
