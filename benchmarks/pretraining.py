"""Pre-training across four institutes against training on their pooled text.

The text is four institutes' answers to patients' questions (MedQuAD's sources, each with
templates and a subject of its own). Half of their documents, taken as published, makes the start:
a small decoder trained from nothing for some thousand steps, as DiLoCo begins after 24,000 of
88,000 steps of ordinary training (Douillard et al. 2023, arXiv:2311.08105). The other half stays
with four sites, each of which holds ``skew`` of one institute's documents and an equal part of the
rest; a twentieth is held out. From the start, with the same text, seed by seed:

    synchronous    each step takes the mean gradient of the four sites' windows: data parallel,
                   with the same number of steps after one another as a site does
    in turn        rounds of ``steps`` local steps at one site, from which the model goes on to
                   the next; through the simulation, which signs, encodes and journals all that
                   would travel
    together       the same steps at all sites in every round, from the same state, and the mean
                   of what they learned

AdamW's second moments are measured at the start on published text, once for steps of one site and
once for steps of all, and every AdamW begins from them. Rates and the second moment's decay are
each way's best of those that the log names.

Tokens and floating-point operations are the same in all rows. Measured is the mean loss on the
four institutes' held-out text, of the state that the sites hold at the end, and every byte of
every parcel both ways; the first request, which carries the whole state, is counted apart.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
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
from mutirao.federated.moments import measure_moments
from mutirao.federated.plan import FederatedConfig, Plan, Site
from mutirao.federated.simulation import simulate
from mutirao.formats.huggingface import load_causal_lm, save_causal_lm
from mutirao.train.config import TrainConfig
from mutirao.train.loop import apply_step, learning_rate_at, make_optimizer
from mutirao.train.moments import start_optimizer
from mutirao.train.packed import (
    backward_windows,
    packed_loss,
    read_packed,
    take_windows,
    train_packed,
)

DATA = Path(os.environ.get("MUTIRAO_TEST_DATA", ROOT.parent / "shared" / "data"))
SITES = {
    "cancergov": "medquad/cancergov.jsonl",
    "gard": "medquad_rare/gard.jsonl",
    "ghr": "medquad_rare/ghr.jsonl",
    "niddk": "medquad/niddk.jsonl",
}
VOCABULARY = 4096
HELDOUT_SHARE = 0.05
HELDOUT_TOKENS = 16_384
"""Scored at each site, at most."""
ONE, ALL = "start-of-one", "start-of-all"
"""The start with second moments for steps of one site, and for steps of all."""


@dataclass(frozen=True)
class Setup:
    """What all rows of the comparison share."""

    width: int = 256
    layers: int = 6
    window: int = 64
    """Tokens of a training window."""
    windows: int = 2
    """Windows of a step at each site."""
    steps: int = 500
    """Local steps in a round: H."""
    rounds: int = 4
    """Of each site."""
    learning_rate: float = 7e-4
    """Of sites."""
    beta2: float = 0.99999
    """Of sites; so close to 1 that what was measured holds for all of a visit."""
    synchronous_rate: float = 1e-3
    """Of steps on all sites' text."""
    synchronous_beta2: float = 0.999
    """Of steps on all sites' text."""
    final_share: float = 0.02
    """Of the rate, at the end of all steps, of either way."""
    moment_tokens: int = 256_000
    """Tokens to measure second moments on."""
    skew: float = 0.55
    """Share of an institute's documents that lies at one site; 0.25 would be all alike."""
    start_steps: int = 2_000
    """Steps on published text that make the start, of eight windows, at a constant rate."""
    start_rate: float = 1e-3
    compute_dtype: str = "auto"
    """Of training: what the processor has fast products of."""

    @property
    def train(self) -> TrainConfig:
        """Training at a site."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            final_learning_rate_share=self.final_share,
            warmup_tokens=0,
            tokens_per_step=self.step_tokens,
            max_tokens_per_example=self.window,
            beta2=self.beta2,
            compute_dtype=self.compute_dtype,
        )

    @property
    def train_synchronous(self) -> TrainConfig:
        """Training on all sites' text."""
        changes = {
            "learning_rate": self.synchronous_rate,
            "beta2": self.synchronous_beta2,
            "tokens_per_step": self.step_tokens * len(SITES),
        }
        return self.train.model_copy(update=changes)

    @property
    def step_tokens(self) -> int:
        """Tokens of one site's step."""
        return self.window * self.windows


def texts(skew: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return training documents by site, with 'published' among them, and held-out ones."""
    training: dict[str, list[str]] = {"published": [], **{site: [] for site in SITES}}
    heldout: dict[str, list[str]] = {}
    draw = random.Random(0)
    for site, path in SITES.items():
        rows = map(json.loads, (DATA / path).read_text(encoding="utf-8").splitlines())
        answers = {f"{row['question']}\n{row['answer']}" for row in rows if row.get("answer")}
        documents = sorted(answers)
        draw.shuffle(documents)
        num_heldout = round(len(documents) * HELDOUT_SHARE)
        half = (len(documents) + num_heldout) // 2
        heldout[site] = documents[:num_heldout]
        training["published"] += documents[num_heldout:half]
        others = [each for each in SITES if each != site]
        for document in documents[half:]:
            training[site if draw.random() < skew else draw.choice(others)].append(document)
    return training, heldout


def prepare(folder: Path, setup: Setup) -> None:
    """Make tokenizer, packed data of every site, and both starts; what is there stays."""
    if not (folder / "start" / "manifest.json").exists():
        _prepare_start(folder, setup)
    for out, train in ((ONE, setup.train), (ALL, setup.train_synchronous)):
        if not (folder / out / "manifest.json").exists():
            measure_moments(
                folder / "start",
                folder / "data" / "published",
                folder / out,
                train,
                num_steps=setup.moment_tokens // train.tokens_per_step,
            )


def _prepare_start(folder: Path, setup: Setup) -> None:
    training, held_out = texts(setup.skew)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(training["published"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, documents in training.items():
        _pack(folder / "data" / name, name, documents, held_out.get(name, []), tokenizer)
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


def _pack(
    path: Path, name: str, train: list[str], held_out: list[str], tokenizer: Tokenizer
) -> None:
    order = sorted(train)
    random.Random(0).shuffle(order)
    with write_artifact(path, "data", recipe={"packed": True, "source": name}) as writer:
        for side, chosen in (("train", order), ("heldout", held_out)):
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
    config_start = setup.train.model_copy(
        update={
            "learning_rate": setup.start_rate,
            "final_learning_rate_share": 1.0,
            "warmup_tokens": 100 * 8 * setup.window,
            "tokens_per_step": 8 * setup.window,
            "weight_decay": 0.1,
            "beta2": 0.95,
        }
    )
    tokens = read_packed(folder / "data" / "published" / "train.npy")
    result = train_packed(
        model, tokens, config_start, seed=0, name="published", num_steps=setup.start_steps
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>", pad_token="<eos>"
    )
    with write_artifact(folder / "start", "model", seed=0) as writer:
        writer.metrics["train_loss"] = result.loss
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
    config = setup.train_synchronous
    model = load_causal_lm(folder / ALL, dtype="float32")[0]
    model.requires_grad_(True)
    tokens = {name: read_packed(folder / "data" / name / "train.npy") for name in SITES}
    state = start_optimizer(model, folder / ALL, config, fused=True)
    parameters, optimizer = make_optimizer(model, config, state, fused=True)
    model.train()
    num_steps = setup.rounds * setup.steps
    started, curve = time.process_time(), []
    for step in range(num_steps):
        parts = [
            take_windows(
                tokens[name],
                setup.windows,
                setup.window + 1,
                seed=seed,
                name=name,
                step=step,
            )
            for name in sorted(SITES)
        ]
        ids = torch.cat(parts)
        backward_windows(model, ids, config, num_learned=ids.shape[0] * setup.window)
        rate = learning_rate_at(config, step + 1, num_steps)
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
    num_rounds = setup.rounds * settings.get("turns", 1)
    config = FederatedConfig(
        num_rounds=num_rounds,
        tokens_per_round=setup.steps * setup.step_tokens,
        monitor_tokens=0,
        round_timeout_s=1e6,
        weighting="equal",
        second_moments=True,
        **settings,
    )
    plan_path = run / "plan.json"
    if not plan_path.exists():
        plan = write_start(folder / ONE, run, config, None, setup.train, seed)
        write_atomic(plan_path, plan.model_dump_json())
    plan = Plan.model_validate_json(plan_path.read_bytes())
    sites = [
        Site(
            name=name,
            model=folder / ONE,
            data=folder / "data" / name,
            work=run / "sites" / name,
        )
        for name in SITES
    ]
    started = time.process_time()
    records = simulate(plan, sites, run)
    seconds = time.process_time() - started
    model = load_causal_lm(folder / ONE, dtype="float32")[0]
    state = CoordinatorJournal(run).open_state(num_rounds, "replica")
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
    rounds = [record.sites[one] for record in records if one in record.sites]
    first = rounds[0].bytes_received
    return {
        "bytes_up_per_site": sum(each.bytes_sent for each in rounds),
        "bytes_down_per_site": sum(each.bytes_received for each in rounds[1:]),
        "bytes_first_state": first,
        "bytes_per_round_up": rounds[-1].bytes_sent,
        "bytes_per_round_down": rounds[-1].bytes_received,
    }


def row_settings(label: str) -> dict[str, Any]:
    """Return the turns of a row, and its codecs: the same bits both ways."""
    way, _, bits = label.partition("-")
    codec = CodecConfig(format=bits, block_size=256)  # type: ignore[arg-type]
    return {
        "turns": len(SITES) if way == "turns" else 1,
        "upload": codec,
        "download": codec,
        "error_feedback": bits != "bf16",
    }


def mean_loss(losses: dict[str, float]) -> float:
    """Return the mean over sites."""
    return math.fsum(losses.values()) / len(losses)
