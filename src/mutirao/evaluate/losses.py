"""The loss of a text, record by record, and the difference between two models on it.

Losses are kept per record because records, not tokens, are independent: standard errors
cluster by record, and a difference is taken on the same records, so that what makes a
record hard cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mutirao.config import Config
from mutirao.data.records import Record
from mutirao.data.tokenization import Example, encode_record
from mutirao.errors import DataError
from mutirao.models.protocol import LanguageModel


class TextResult(Config):
    """How well a model predicts the learned part of some records."""

    loss: float
    """Mean loss over all scored tokens, in nats per token."""
    num_tokens: int
    """Scored tokens."""
    record_losses: tuple[float, ...]
    """Summed loss of each record, in nats."""
    record_tokens: tuple[int, ...]
    """Scored tokens of each record."""


@dataclass(frozen=True)
class Difference:
    """Loss of one model minus that of another, on the same records."""

    mean: float
    """In nats per token; negative where the first model is better."""
    standard_error: float
    """Of the mean, clustered by record, in nats per token; infinite for a single record."""


def evaluate_text(
    model: LanguageModel, items: Iterable[Record | Example], *, max_tokens: int = 256
) -> TextResult:
    """Score the learned part of each record, in windows of at most ``max_tokens`` tokens.

    Args:
        model: the model.
        items: what to score: records, or examples that the model's tokenizer encoded, each
            standing for a record. Of what has a given part, only the rest counts. Records
            without tokens are left out.
        max_tokens: longest sequence made of a record, in tokens.

    Raises:
        DataError: nothing is left to score.
    """
    groups = [
        [item]
        if isinstance(item, Example)
        else encode_record(item, model.encode, model.eos_id, max_tokens)
        for item in items
    ]
    return evaluate_examples(model, groups)


def evaluate_examples(model: LanguageModel, groups: Sequence[Sequence[Example]]) -> TextResult:
    """Score examples that are encoded already.

    Args:
        model: the model whose tokenizer encoded them.
        groups: per record, its examples; empty ones are left out.

    Raises:
        DataError: nothing is left to score.
    """
    kept = [group for group in groups if group]
    if not kept:
        raise DataError("no record has a token to score; give some with text to evaluate")
    examples = [example for group in kept for example in group]
    scores = model.token_logprobs(
        [example.ids for example in examples], [example.num_context for example in examples]
    )
    remaining = iter(scores)
    per_record = [np.concatenate([next(remaining) for _ in group]) for group in kept]
    record_losses = tuple(-float(logprobs.sum()) for logprobs in per_record)
    record_tokens = tuple(len(logprobs) for logprobs in per_record)
    num_tokens = sum(record_tokens)
    return TextResult(
        loss=math.fsum(record_losses) / num_tokens,
        num_tokens=num_tokens,
        record_losses=record_losses,
        record_tokens=record_tokens,
    )


def paired_difference(first: TextResult, second: TextResult) -> Difference:
    """Compare two models on the same records: loss of ``first`` minus loss of ``second``.

    The mean is a ratio of sums (nats over tokens); its standard error is the delta
    method's, with records as the independent units.

    Raises:
        DataError: the results are not of the same records and tokens.

    References:
        Cochran 1977, Sampling Techniques, 3rd edition, section 6.3 (the ratio estimator).
    """
    if first.record_tokens != second.record_tokens:
        raise DataError(
            f"results over {len(first.record_tokens)} and {len(second.record_tokens)} records "
            "cannot be paired (expected the same records, encoded by the same tokenizer); "
            "evaluate both models on the same data"
        )
    tokens = np.asarray(first.record_tokens, dtype=np.float64)
    gaps = np.asarray(first.record_losses) - np.asarray(second.record_losses)
    mean = float(gaps.sum() / tokens.sum())
    num_records = len(tokens)
    if num_records < 2:
        return Difference(mean, math.inf)
    residuals = gaps - mean * tokens
    variance = num_records / (num_records - 1) * float((residuals**2).sum())
    return Difference(mean, math.sqrt(variance) / float(tokens.sum()))
