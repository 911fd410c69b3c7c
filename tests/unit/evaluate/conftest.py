"""A language model that is a table: enough for metrics, and exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mutirao.data.records import Record


class TableModel:
    """Characters are tokens; the next one depends only on the last one, through a table."""

    name = "table"
    eos_id = 0

    def __init__(self, seed: int = 0) -> None:
        logits = np.random.default_rng(seed).normal(size=(128, 128))
        self.logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.num_scored = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 128 for character in text]

    def token_logprobs(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]):
        self.num_scored += sum(len(ids) for ids in sequences)
        return [
            np.array([self.logprobs[ids[t - 1], ids[t]] for t in range(start, len(ids))])
            for ids, start in zip(sequences, starts, strict=True)
        ]

    def next_token_logprobs(self, contexts: Sequence[Sequence[int]], candidates):
        return [
            self.logprobs[context[-1], list(options)]
            for context, options in zip(contexts, candidates, strict=True)
        ]


@pytest.fixture
def make_table_model():
    return TableModel


@pytest.fixture
def table_model():
    return TableModel()


@pytest.fixture
def make_record():
    def make(identity, prompt, choices=(), answer=None, task="text", completion=None):
        if choices and completion is None:
            completion = choices[answer]
        return Record(
            id=str(identity),
            source="a.jsonl",
            text=prompt + (completion or ""),
            context_length=len(prompt) if completion else 0,
            choices=choices,
            answer=answer,
            task=task,
        )

    return make
