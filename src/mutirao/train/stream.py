"""Which examples come next: endless shuffled streams, cut into stretches that join up.

A stretch is a pure function of its arguments, so that a run that is resumed at any
position sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mutirao.data.tokenization import Example
from mutirao.errors import DataError


def take_mixed(
    text: Sequence[Example],
    outcomes: Sequence[Example],
    *,
    outcome_share: float,
    seed: int,
    skip_tokens: int,
    num_tokens: int,
) -> list[Example]:
    """Return the next stretch of two streams that run side by side.

    Args:
        text: examples of text and questions.
        outcomes: examples of outcomes; they are short, and few of their tokens are learned.
        outcome_share: share of the tokens that outcomes get, where both kinds are there.
        seed: of the shuffles.
        skip_tokens: tokens already used of both streams together.
        num_tokens: length of the stretch, in tokens.

    Raises:
        DataError: there are no examples.
    """
    if not text or not outcomes:
        only = text or outcomes
        return take_tokens(only, seed=seed, skip_tokens=skip_tokens, num_tokens=num_tokens)
    stretch: list[Example] = []
    for examples, share in ((text, 1 - outcome_share), (outcomes, outcome_share)):
        first = round(skip_tokens * share)
        last = round((skip_tokens + num_tokens) * share)
        stretch += take_tokens(examples, seed=seed, skip_tokens=first, num_tokens=last - first)
    return stretch


def take_tokens(
    examples: Sequence[Example], *, seed: int, skip_tokens: int, num_tokens: int
) -> list[Example]:
    """Return the next stretch of an endless, shuffled stream of examples.

    Args:
        examples: what the stream is made of; every pass over them is shuffled anew.
        seed: of the shuffles.
        skip_tokens: tokens of the stream already used.
        num_tokens: the examples that begin within the next so many tokens are returned, so
            that stretches that join up neither repeat nor lose one.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("there is no training example; prepare the silo's data first")
    taken: list[Example] = []
    position = 0
    for example in _endless(examples, seed):
        if position >= skip_tokens + num_tokens:
            return taken
        if position >= skip_tokens:
            taken.append(example)
        position += len(example.ids)
    raise AssertionError("an endless stream ended")


def _endless(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    epoch = 0
    while True:
        order = list(range(len(examples)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        yield from (examples[index] for index in order)
        epoch += 1
