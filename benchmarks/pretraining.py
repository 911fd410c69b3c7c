"""Pre-training across four institutes against training on their pooled text.

Four institutes' question-and-answer texts (MedQuAD's sources, each with templates and a subject
of its own) are the sites; the start is a small decoder trained from nothing on other, public
text. From it, with the same windows of the same text, seed by seed:

    synchronous    each step takes the mean gradient of the four sites' windows: data parallel,
                   with the same number of steps after one another as a site does
    federated      rounds of ``--steps`` local steps through the simulation, which signs, encodes
                   and journals all that would travel

Tokens and floating-point operations are the same in all rows. Measured is the mean loss on the
four sites' held-out text, of the state that the sites hold at the end, and every byte of every
parcel both ways; the first request, which carries the whole state, is counted apart.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heart_disease import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mutirao.artifact import write_artifact, write_atomic
from mutirao.federated.codec import CodecConfig
from mutirao.federated.coordinator.adapter import write_start
from mutirao.federated.coordinator.journal import CoordinatorJournal, RoundRecord
from mutirao.federated.plan import FederatedConfig, Plan, Site
from mutirao.federated.simulation import simulate
from mutirao.formats.huggingface import load_causal_lm, save_causal_lm
from mutirao.train.config import TrainConfig
from mutirao.train.loop import apply_step, learning_rate_at, make_optimizer
from mutirao.train.packed import (
    backward_windows,
    packed_loss,
    read_packed,
    take_windows,
    train_packed,
    windows_per_step,
)

DATA = Path(os.environ.get("MUTIRAO_TEST_DATA", ROOT.parent / "shared" / "data"))
SITES = {
    "cancergov": "medquad/cancergov.jsonl",
    "gard": "medquad_rare/gard.jsonl",
    "ghr": "medquad_rare/ghr.jsonl",
    "niddk": "medquad/niddk.jsonl",
}
PUBLIC = ("mplus_health_topics", "cdc", "ninds", "nhlbi", "seniorhealth")
VOCABULARY = 4096
HELDOUT_SHARE = 0.05
HELDOUT_TOKENS = 16_384
"""Scored at each site, at most."""


@dataclass(frozen=True)
class Setup:
    """What all rows of the comparison share."""

    width: int = 256
    layers: int = 6
    window: int = 64
    """Tokens of a training window."""
    windows: int = 1
    """Windows of a step at each site."""
    steps: int = 500
    """Local steps in a round: H."""
    rounds: int = 5
    learning_rate: float = 1e-3
    public_steps: int = 3_000
    """Steps on public text that make the start, of eight windows of 128 tokens."""

    @property
    def train(self) -> TrainConfig:
        """Training at a site."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            final_learning_rate_share=0.1,
            warmup_tokens=50 * self.step_tokens,
            tokens_per_step=self.step_tokens,
            max_tokens_per_example=self.window,
            weight_decay=0.1,
            beta2=0.95,
            compute_dtype="float32",
        )

    @property
    def step_tokens(self) -> int:
        """Tokens of one site's step."""
        return self.window * self.windows


def texts() -> dict[str, list[str]]:
    """Return each site's documents, and the public ones under 'public'."""

    def answers(name: str) -> list[str]:
        rows = map(json.loads, (DATA / name).read_text(encoding="utf-8").splitlines())
        return [f"{row['question']}\n{row['answer']}" for row in rows if row.get("answer")]

    wiki = "".join((DATA / f"wikitext2_valid_test/{n}.txt").read_text() for n in ("valid", "test"))
    public = [part for part in wiki.split("\n = ") if len(part) > 80]
    rows = (DATA / "lambada_openai/lambada_test.jsonl").read_text().splitlines()
    public += [json.loads(row)["text"] for row in rows]
    for name in PUBLIC:
        public += answers(f"medquad/{name}.jsonl")
    return {"public": public, **{site: answers(path) for site, path in SITES.items()}}


def prepare(folder: Path, setup: Setup) -> None:
    """Make tokenizer, packed data of every site, and the start; what is there stays."""
    documents = {name: list(dict.fromkeys(each)) for name, each in texts().items()}
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.exists():
        tokenizer = _train_tokenizer(documents["public"])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for name, each in documents.items():
        if not (folder / "data" / name / "manifest.json").exists():
            _pack(folder / "data" / name, name, each, tokenizer)
    if not (folder / "start" / "manifest.json").exists():
        _make_start(folder, setup)


def _train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _pack(path: Path, name: str, documents: list[str], tokenizer: Tokenizer) -> None:
    order = sorted(documents)
    random.Random(0).shuffle(order)
    num_heldout = max(1, round(len(order) * HELDOUT_SHARE))
    sides = {"heldout": order[:num_heldout], "train": order[num_heldout:]}
    with write_artifact(path, "data", recipe={"packed": True, "source": name}) as writer:
        for side, chosen in sides.items():
            ids = [[*each.ids, 0] for each in tokenizer.encode_batch(chosen)]
            flat = np.fromiter((one for each in ids for one in each), np.uint16)
            np.save(writer.path / f"{side}.npy", flat)
            writer.metrics[f"num_tokens_{side}"] = int(flat.size)


def _make_start(folder: Path, setup: Setup) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setup.width,
        intermediate_size=setup.width * 8 // 3 // 16 * 16,
        num_hidden_layers=setup.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    public = TrainConfig(
        learning_rate=2e-3,
        warmup_tokens=100 * 1024,
        tokens_per_step=1024,
        max_tokens_per_example=128,
        weight_decay=0.1,
        beta2=0.95,
        compute_dtype="float32",
    )
    tokens = read_packed(folder / "data" / "public" / "train.npy")
    result = train_packed(
        model, tokens, public, seed=0, name="public", num_steps=setup.public_steps
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>", pad_token="<eos>"
    )
    with write_artifact(folder / "start", "model", seed=0) as writer:
        writer.metrics["public_loss"] = result.loss
        save_causal_lm(model, tokenizer, writer.path)


def heldout(model: Any, folder: Path, setup: Setup) -> dict[str, float]:
    """Return the loss on each site's held-out text, in nats per token, in windows of 128."""
    config = setup.train.model_copy(update={"max_tokens_per_example": 128})
    return {
        name: packed_loss(
            model,
            read_packed(folder / "data" / name / "heldout.npy"),
            config,
            max_tokens=HELDOUT_TOKENS,
        )[0]
        for name in SITES
    }


def synchronous(folder: Path, setup: Setup, seed: int) -> dict[str, Any]:
    """Train on all sites' text in every step, and measure."""
    config = setup.train
    model = load_causal_lm(folder / "start", dtype="float32")[0]
    model.requires_grad_(True)
    tokens = {name: read_packed(folder / "data" / name / "train.npy") for name in SITES}
    parameters, optimizer = make_optimizer(model, config, fused=True)
    model.train()
    num_steps = setup.rounds * setup.steps
    started, curve = time.process_time(), []
    for step in range(num_steps):
        parts = [
            take_windows(
                tokens[name],
                windows_per_step(config),
                setup.window + 1,
                seed=seed,
                name=name,
                step=step,
            )
            for name in sorted(SITES)
        ]
        ids = torch.cat(parts)
        backward_windows(model, ids, config, num_learned=ids.shape[0] * setup.window)
        rate = learning_rate_at(
            config, (step + 1) * setup.step_tokens, num_steps * setup.step_tokens
        )
        apply_step(parameters, optimizer, rate, config)
        if (step + 1) % setup.steps == 0:
            curve.append(heldout(model, folder, setup))
            model.train()
    seconds = time.process_time() - started
    num_parameters = sum(each.numel() for each in parameters)
    return {
        "curve": curve,
        "cpu_seconds": seconds,
        "bytes_per_site": num_steps * 2 * 2 * num_parameters,
        "num_parameters": num_parameters,
    }


def federated(
    folder: Path, run: Path, setup: Setup, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train by rounds, and measure; goes on where it was interrupted."""
    config = FederatedConfig(
        num_rounds=setup.rounds,
        tokens_per_round=setup.steps * setup.step_tokens,
        monitor_tokens=0,
        round_timeout_s=1e6,
        weighting="equal",
        **settings,
    )
    plan_path = run / "plan.json"
    if not plan_path.exists():
        plan = write_start(folder / "start", run, config, None, setup.train, seed)
        write_atomic(plan_path, plan.model_dump_json())
    plan = Plan.model_validate_json(plan_path.read_bytes())
    sites = [
        Site(
            name=name,
            model=folder / "start",
            data=folder / "data" / name,
            work=run / "sites" / name,
        )
        for name in SITES
    ]
    started = time.process_time()
    records = simulate(plan, sites, run)
    seconds = time.process_time() - started
    model = load_causal_lm(folder / "start", dtype="float32")[0]
    state = CoordinatorJournal(run).open_state(setup.rounds, "replica")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in state.names:
            own[name].copy_(torch.from_numpy(np.array(state.read(name))))
    return {
        "curve": [heldout(model, folder, setup)],
        "cpu_seconds": seconds,
        "num_parameters": sum(each.numel() for each in own.values()),
        **count_bytes(records),
    }


def count_bytes(records: list[RoundRecord]) -> dict[str, Any]:
    """Return the bytes that one site sends and receives, without and with the first state."""
    one = sorted(SITES)[0]
    rounds = [record.sites[one] for record in records]
    first = rounds[0].bytes_received
    return {
        "bytes_up_per_site": sum(each.bytes_sent for each in rounds),
        "bytes_down_per_site": sum(each.bytes_received for each in rounds[1:]),
        "bytes_first_state": first,
        "bytes_per_round_up": rounds[-1].bytes_sent,
        "bytes_per_round_down": rounds[-1].bytes_received,
    }


def codec_settings(label: str) -> dict[str, Any]:
    """Return the codecs of a row: the same bits both ways."""
    codec = CodecConfig(format=label, block_size=256)  # type: ignore[arg-type]
    return {"upload": codec, "download": codec, "error_feedback": label != "bf16"}


def mean_loss(losses: dict[str, float]) -> float:
    """Return the mean over sites."""
    return math.fsum(losses.values()) / len(losses)


def rows(seeds: int) -> Iterator[tuple[str, int]]:
    """Return what to run, in the order of worth."""
    for seed in range(seeds):
        yield "synchronous", seed
        yield "bf16", seed
        yield "int4", seed
        yield "int8", seed
