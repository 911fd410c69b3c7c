"""Text, tokenizer, model and sites of the privacy benchmark, with what is hidden in them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np
import torch
from privacy_settings import DATA, PUBLIC, SITES, TEMPLATE, Sizes, State
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mutirao.data.tokenization import Example
from mutirao.evaluate.privacy.canaries import Canary, canary_example, make_canaries
from mutirao.models.causal import CausalModel
from mutirao.train.config import TrainConfig
from mutirao.train.loop import train


@dataclass(frozen=True)
class Site:
    """A site's text and what was hidden in it."""

    members: list[Example]
    others: list[Example]
    """Of the same institute, never trained on."""
    canaries: list[Canary]
    audit: list[Example]
    """Sequences of random tokens, in or out by a fair coin."""
    is_included: list[bool]
    units: list[tuple[Example, ...]]
    """All that is trained on; a canary's repetitions are one unit."""


def read_answers(name: str) -> list[str]:
    """Answers of one institute, those that begin alike left out, in a shuffled order."""
    rows = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {}
    for row in rows:
        answer = " ".join(json.loads(row)["answer"].split())
        answers.setdefault(answer[:60], answer)
    texts = [answer for answer in answers.values() if len(answer) > 200]
    random.Random(name).shuffle(texts)
    return texts


def make_tokenizer(sizes: Sizes) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the public text; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for name in PUBLIC for text in read_answers(name)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def make_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden * 11 // 4,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def train_base(model: nn.Module, scorer: CausalModel, sizes: Sizes) -> State:
    """Train from nothing on public text, and on the canaries' sentence with other numbers."""
    examples, num_tokens = [], 0
    for text in (text for name in PUBLIC for text in read_answers(name)):
        ids = scorer.encode(text)
        for start in range(0, len(ids) - 8, sizes.max_tokens):
            examples.append(Example(tuple(ids[start : start + sizes.max_tokens]), 1))
            num_tokens += len(examples[-1].ids)
        if num_tokens >= sizes.base_tokens:
            break
    known = make_canaries(TEMPLATE, [1], num_each=max(4, len(examples) // 50), seed=10_000)
    examples += [canary_example(scorer, canary) for canary in known]
    config = TrainConfig(learning_rate=sizes.base_learning_rate, tokens_per_step=1024)
    train(model, examples, config, pad_id=0, seed=0)
    return state_of(model)


def make_site(number: int, scorer: CausalModel, sizes: Sizes) -> Site:
    rng = np.random.default_rng([7, number])
    texts = read_answers(SITES[number])[: sizes.num_members + sizes.num_others]
    examples = [Example(tuple(scorer.encode(text)[: sizes.max_tokens]), 1) for text in texts]
    canaries = make_canaries(TEMPLATE, sizes.repetitions, num_each=sizes.num_each, seed=number)
    audit = [
        Example(tuple(rng.integers(1, sizes.vocabulary, sizes.max_tokens).tolist()), 1)
        for _ in range(sizes.num_audit)
    ]
    is_included = [bool(coin) for coin in rng.integers(0, 2, sizes.num_audit)]
    members = examples[: sizes.num_members]
    units = [(example,) for example in members]
    units += [
        (canary_example(scorer, canary),) * canary.num_repetitions
        for canary in canaries
        if canary.num_repetitions
    ]
    units += [(example,) for example, is_in in zip(audit, is_included, strict=True) if is_in]
    return Site(members, examples[sizes.num_members :], canaries, audit, is_included, units)


def state_of(model: nn.Module) -> State:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
