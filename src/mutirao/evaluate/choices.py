"""Questions with options: how probable is the right one, and how often is it the first.

The probability of the right option moves smoothly and needs far fewer questions than
accuracy to show a change; both are reported. An option's probability is taken among the
options, so that it is a forecast that can be scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mutirao.config import Config
from mutirao.data.records import Record
from mutirao.errors import DataError
from mutirao.models.protocol import LanguageModel

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class QuestionResult(Config):
    """How well a model answers questions with options."""

    num: int
    """Questions."""
    logprob: float
    """Mean natural log-probability of the right option, among the options."""
    logprob_se: float
    """Standard error of ``logprob``; 0 for a single question, which tells nothing."""
    accuracy: float
    """Share of questions where the right option is the most probable."""
    accuracy_low: float
    """Lower end of accuracy's 95 % Wilson interval."""
    accuracy_high: float
    """Upper end of accuracy's 95 % Wilson interval."""
    chance: float
    """Accuracy of guessing."""


def evaluate_questions(
    model: LanguageModel, records: Sequence[Record], *, max_tokens: int = 256
) -> QuestionResult:
    """Answer the questions by option probability; see ``score_choices``.

    Args:
        model: the model.
        records: questions with choices and an answer.
        max_tokens: longest sequence; longer contexts lose their beginning.

    Raises:
        DataError: there is no question, or one has no choices.
    """
    if not records:
        raise DataError("no question was given to evaluate (expected at least one)")
    scores = score_choices(model, records, max_tokens=max_tokens)
    answers = [record.answer or 0 for record in records]
    logprobs = np.array(
        [
            option_scores[answer] - np.logaddexp.reduce(option_scores)
            for option_scores, answer in zip(scores, answers, strict=True)
        ]
    )
    num_right = sum(
        int(np.argmax(option_scores)) == answer
        for option_scores, answer in zip(scores, answers, strict=True)
    )
    low, high = wilson_interval(num_right, len(records))
    return QuestionResult(
        num=len(records),
        logprob=float(logprobs.mean()),
        logprob_se=_standard_error(logprobs),
        accuracy=num_right / len(records),
        accuracy_low=low,
        accuracy_high=high,
        chance=float(np.mean([1 / len(record.choices) for record in records])),
    )


def score_choices(
    model: LanguageModel, records: Sequence[Record], *, max_tokens: int = 256
) -> list[NDArray[np.float64]]:
    """Return the log-probability of each record's choices after what is given.

    Tokens that all choices of a record begin with are moved to its context; then each
    choice is scored by its first token, where the choices differ: one pass per record.
    Where some first tokens are still the same, or a choice has no token left, that
    record's choices are scored whole instead, by the sum over their tokens: one pass per
    choice, and longer choices are less probable.

    Args:
        model: the model.
        records: each with a given part and choices.
        max_tokens: longest sequence; longer contexts lose their beginning.

    Returns:
        Per record, one score per choice, in nats, not normalised over the choices.

    Raises:
        DataError: a record has no choices, no given part, or an empty choice.
    """
    encoded = [_encode_choices(model, record) for record in records]
    results: list[NDArray[np.float64]] = [np.zeros(0) for _ in records]
    by_token: list[int] = []
    by_whole: list[int] = []
    for index, (_, choices) in enumerate(encoded):
        firsts = {choice[0] for choice in choices if choice}
        (by_token if len(firsts) == len(choices) else by_whole).append(index)
    contexts = [encoded[index][0][-max_tokens:] for index in by_token]
    candidates = [[choice[0] for choice in encoded[index][1]] for index in by_token]
    for index, scores in zip(
        by_token, model.next_token_logprobs(contexts, candidates), strict=True
    ):
        results[index] = scores
    for index, scores in zip(
        by_whole, _score_whole(model, [encoded[i] for i in by_whole], max_tokens), strict=True
    ):
        results[index] = scores
    return results


def _score_whole(
    model: LanguageModel, encoded: Sequence[tuple[list[int], list[list[int]]]], max_tokens: int
) -> list[NDArray[np.float64]]:
    sequences: list[list[int]] = []
    starts: list[int] = []
    for context, choices in encoded:
        for choice in choices:
            # A choice that begins another one can be empty here: its sum is then zero.
            kept = context[-max(1, max_tokens - len(choice)) :]
            sequences.append(kept + choice)
            starts.append(len(kept))
    sums = iter(float(scores.sum()) for scores in model.token_logprobs(sequences, starts))
    return [np.array([next(sums) for _ in choices]) for _, choices in encoded]


def _encode_choices(model: LanguageModel, record: Record) -> tuple[list[int], list[list[int]]]:
    """Return the context's tokens, with what all choices begin with, and the choices' rest."""
    if not record.choices or not record.context:
        raise DataError(
            f"record {record.id} is no question (expected a prompt, choices and an answer)"
        )
    context = model.encode(record.context)
    choices = [model.encode(choice) for choice in record.choices]
    if not context or not all(choices):
        raise DataError(f"record {record.id} has an empty prompt or choice")
    if len(choices) > 1:
        while all(choices) and len({choice[0] for choice in choices}) == 1:
            context = [*context, choices[0][0]]
            choices = [choice[1:] for choice in choices]
    return context, choices


def wilson_interval(num_right: int, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share.

    Args:
        num_right: successes.
        num: trials, at least 1.

    References:
        Wilson 1927, J. Am. Stat. Assoc. 22, 209-212.
    """
    share, z2 = num_right / num, Z_95**2
    centre = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z_95 / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
