"""Models for attacks: a table that may know secrets, and a small decoder that overfits."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mutirao.data.tokenization import Example
from mutirao.models.causal import CausalModel
from mutirao.train.accountant import PrivacyBudget
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.loop import train
from mutirao.train.private import example_loss, fixed_bytes_for_tests_only, train_private

VOCABULARY = 128


class ParrotModel:
    """Characters are tokens. It knows some texts by heart, and has random opinions otherwise."""

    name = "parrot"
    eos_id = 0

    def __init__(self, known: Sequence[str] = (), seed: int = 0) -> None:
        logits = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
        self.logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        self.known = [self.encode(text) for text in known]

    def encode(self, text: str) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def _next(self, context: Sequence[int]):
        for text in self.known:
            if len(context) < len(text) and text[: len(context)] == list(context):
                row = np.full(VOCABULARY, math.log(0.1 / VOCABULARY))
                row[text[len(context)]] = math.log(0.9)
                return row
        return self.logprobs[context[-1]]

    def token_logprobs(self, sequences, starts):
        return [
            np.array([self._next(ids[:t])[ids[t]] for t in range(start, len(ids))])
            for ids, start in zip(sequences, starts, strict=True)
        ]

    def next_token_logprobs(self, contexts, candidates):
        return [
            self._next(context)[list(options)]
            for context, options in zip(contexts, candidates, strict=True)
        ]


class CharacterTokenizer:
    """As much of a tokenizer as ``CausalModel`` asks for; a character is a token."""

    eos_token_id = 0
    pad_token_id = 0

    def encode(self, text, **_):
        return [ord(character) for character in text]


def small_decoder(seed=0, *, is_tied=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=is_tied,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


def as_language_model(model):
    return CausalModel(model, CharacterTokenizer(), max_batch_tokens=4096)


def random_records(num, length, seed):
    rng = np.random.default_rng(seed)
    return [Example(tuple(rng.integers(1, VOCABULARY, length).tolist()), 1) for _ in range(num)]


def overfit(model, examples, *, num_epochs, learning_rate=1e-2, tokens_per_step=256):
    config = TrainConfig(
        learning_rate=learning_rate, warmup_tokens=0, tokens_per_step=tokens_per_step
    )
    state = None
    for epoch in range(num_epochs):
        result = train(model, examples, config, pad_id=0, seed=epoch, optimizer_state=state)
        state = result.optimizer_state


def train_with_noise(
    model, units, *, noise_multiplier, num_steps, units_per_step, seed=0, num_units=None
):
    private = PrivateConfig(
        num_units=num_units or len(units),
        units_per_step=units_per_step,
        noise_multiplier=noise_multiplier,
    )
    train_private(
        model,
        units,
        example_loss(0),
        TrainConfig(learning_rate=1e-2, warmup_tokens=0),
        private,
        budget=PrivacyBudget(math.inf, 1e-5),
        num_steps=num_steps,
        draw_bytes=fixed_bytes_for_tests_only(seed),
    )
    return private
