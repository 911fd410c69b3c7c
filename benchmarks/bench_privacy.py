"""Privacy attacks on a small federated model: what each defence changes, and what it costs.

A decoder of a million parameters, trained on public health text, is tuned by four sites on
answers of four institutes (MedQuAD), which hold canaries. It is attacked from where the
server, a peer and an outsider stand. Sites train plainly, with each unit's gradient clipped,
or with DP-SGD at two noise levels; secure aggregation changes what is seen, not what is
trained. A small stand-in for the federation trains in one process. Writes
docs/benchmarks/data/privacy.json and docs/benchmarks/privacy.svg, and prints a table.

    python benchmarks/bench_privacy.py             (under 15 minutes on one core)
    python benchmarks/bench_privacy.py --short     (under a minute; its figures mean nothing)

What is finished is kept in --run, and the same command goes on from there. Noise comes from
a fixed seed, so that figures repeat: nothing here is private, and nothing has to be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mutirao.data.tokenization import Example
from mutirao.environment import runs_directory, silence
from mutirao.evaluate.losses import TextResult, evaluate_examples
from mutirao.evaluate.privacy.audit import audit_one_run, audit_runs
from mutirao.evaluate.privacy.canaries import (
    Canary,
    canary_example,
    extract_secrets,
    make_canaries,
    measure_exposure,
    summarize_exposures,
)
from mutirao.evaluate.privacy.membership import (
    calibrated_scores,
    evaluate_membership,
    loss_scores,
)
from mutirao.evaluate.privacy.updates import (
    evaluate_attribution,
    evaluate_presence,
    sole_owners,
    token_evidence,
)
from mutirao.federated.secure.fixed_point import FixedPoint
from mutirao.models.causal import CausalModel
from mutirao.train.accountant import Phase, PrivacyBudget, epsilon_spent, find_noise_multiplier
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.loop import train
from mutirao.train.private import example_loss, fixed_bytes_for_tests_only, train_private

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MUTIRAO_TEST_DATA", ROOT.parent / "shared" / "data")) / "medquad"
PUBLIC = ("mplus_health_topics", "seniorhealth")
SITES = ("niddk", "ninds", "nhlbi", "cancergov")
TEMPLATE = "The card of patient {label} has the number {secret}"
EMBEDDING = "model.embed_tokens.weight"
CONDITIONS = ("untrained", "plain", "secure-aggregated", "clipped", "dp-high", "dp-low")
POSITIONS = ("server", "peer", "outsider")
DELTA = 1e-4
FIXED_POINT = FixedPoint(clip=4.0, scale=2.0**20)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the fields are part of the result."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 3
    base_tokens: int = 600_000
    base_learning_rate: float = 3e-3
    max_tokens: int = 48
    num_members: int = 200
    num_others: int = 250
    num_each: int = 2
    repetitions: tuple[int, ...] = (0, 1, 4, 16)
    num_alternatives: int = 127
    num_audit: int = 40
    rounds: int = 3
    epochs_per_round: int = 2
    learning_rate: float = 2e-3
    private_learning_rate: float = 1e-3
    units_per_step: int = 30
    private_steps: int = 20
    epsilons: tuple[float, float] = (8.0, 2.0)
    attacked_records: int = 8
    audited_runs: int = 500
    false_positive_rates: tuple[float, ...] = (0.01, 0.001)


SHORT = Sizes(
    vocabulary=512,
    hidden=32,
    layers=1,
    base_tokens=20_000,
    max_tokens=24,
    num_members=25,
    num_others=25,
    num_each=1,
    repetitions=(0, 8),
    num_alternatives=31,
    num_audit=8,
    rounds=1,
    units_per_step=8,
    private_steps=4,
    attacked_records=4,
    audited_runs=60,
    false_positive_rates=(0.01,),
)


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


@dataclass(frozen=True)
class Run:
    """What was seen of one federated run: the last round's start and updates, and the end."""

    start: State
    updates: list[State]
    final: State


@dataclass(frozen=True)
class View:
    """A model that an attacker has, what it is compared with, and whom it is used against."""

    state: State
    reference: State | None
    sites: list[int]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--run", type=Path, default=runs_directory() / "bench-privacy")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/data/privacy.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/benchmarks/privacy.svg")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not there; name its parent in MUTIRAO_TEST_DATA")
        return 0
    silence()
    # It warns of each call with a fixed seed; the head of this file says so once.
    logging.getLogger("mutirao.train.private").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    sizes = SHORT if arguments.short else Sizes()
    journal = Journal(arguments.run, sizes, fresh=arguments.fresh)
    result = measure(sizes, journal)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, arguments.figure)
    print_table(result)
    return 0


class Journal:
    """Finished cells in a folder of their own for each set of sizes."""

    def __init__(self, folder: Path, sizes: Sizes, *, fresh: bool) -> None:
        code = Path(__file__).read_bytes()
        key = hashlib.sha256(json.dumps(asdict(sizes)).encode() + code).hexdigest()[:12]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self.folder.iterdir():
                path.unlink()

    def tensors(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made before under this name, or make and keep it."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            made = make()
            torch.save(made, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return torch.load(path, weights_only=True)

    def figures(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The same for figures, with the seconds that they took."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            started = time.monotonic()
            row = make()
            row["seconds"] = round(time.monotonic() - started, 1)
            path.with_suffix(".part").write_text(json.dumps(row), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            print(f"{name}: {row['seconds']:.0f} s", file=sys.stderr)
        return json.loads(path.read_bytes())


def measure(sizes: Sizes, journal: Journal) -> dict[str, Any]:
    tokenizer = make_tokenizer(sizes)
    model = make_model(sizes, tokenizer)
    scorer = CausalModel(model, tokenizer, name="small decoder", max_batch_tokens=4096)
    sites = [make_site(number, scorer, sizes) for number in range(len(SITES))]
    base = journal.tensors("base", lambda: train_base(model, scorer, sizes))
    conditions = {
        name: journal.figures(
            name, lambda name=name: attack(name, model, scorer, base, sites, sizes, journal)
        )
        for name in CONDITIONS
    }
    small = journal.figures("many-runs", lambda: audit_many_runs(sizes))
    seconds = sum(row["seconds"] for row in (*conditions.values(), small))
    return {
        "command": "python benchmarks/bench_privacy.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, one thread, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}",
        "data": f"MedQuAD (CC BY 4.0): {', '.join(SITES)}; public: {', '.join(PUBLIC)}",
        "sizes": asdict(sizes),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        "conditions": conditions,
        "many_runs_small_model": small,
    }


# Text, tokenizer, model


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


# Training


def state_of(model: nn.Module) -> State:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def combine(start: State, updates: Sequence[State]) -> State:
    """The start plus the mean of the updates."""
    return {
        name: tensor + torch.stack([update[name] for update in updates]).mean(dim=0)
        for name, tensor in start.items()
    }


def noise_of(condition: str, sizes: Sizes) -> tuple[float, float]:
    """Noise multiplier and claimed ε of a condition."""
    if not condition.startswith("dp-"):
        return 0.0, math.inf
    target = sizes.epsilons[condition == "dp-low"]
    q, num_steps = sizes.units_per_step / public_number(sizes), sizes.rounds * sizes.private_steps
    sigma = find_noise_multiplier(target, DELTA, sampling_probability=q, num_steps=num_steps)
    phase = Phase(sampling_probability=q, noise_multiplier=sigma, num_steps=num_steps)
    return sigma, epsilon_spent([phase], DELTA)


def public_number(sizes: Sizes) -> int:
    """Number of units as all may know it, whatever the coins said."""
    num_canaries = sizes.num_each * sum(count > 0 for count in sizes.repetitions)
    return sizes.num_members + num_canaries + sizes.num_audit // 2


def train_site(
    condition: str, model: nn.Module, units: Sequence[Sequence[Example]], sizes: Sizes, seed: int
) -> None:
    """One site's part of one round, in place."""
    if condition == "plain":
        examples, optimizer_state = [record for unit in units for record in unit], None
        config = TrainConfig(learning_rate=sizes.learning_rate, warmup_tokens=0)
        for epoch in range(sizes.epochs_per_round):
            result = train(
                model,
                examples,
                config,
                pad_id=0,
                seed=seed + epoch,
                optimizer_state=optimizer_state,
            )
            optimizer_state = result.optimizer_state
        return
    private = PrivateConfig(
        num_units=public_number(sizes),
        units_per_step=sizes.units_per_step,
        noise_multiplier=noise_of(condition, sizes)[0],
    )
    train_noisily(model, units, private, sizes, sizes.private_steps, seed)


def train_noisily(
    model: nn.Module,
    units: Sequence[Sequence[Example]],
    private: PrivateConfig,
    sizes: Sizes,
    num_steps: int,
    seed: int,
) -> None:
    train_private(
        model,
        units,
        example_loss(0),
        TrainConfig(learning_rate=sizes.private_learning_rate, warmup_tokens=0),
        private,
        budget=PrivacyBudget(math.inf, DELTA),
        num_steps=num_steps,
        draw_bytes=fixed_bytes_for_tests_only(seed),
    )


def federate(
    condition: str, model: nn.Module, base: State, sites: Sequence[Site], sizes: Sizes
) -> dict[str, Any]:
    """Train in rounds and average, in turns; the parts of a ``Run``."""
    final = base
    for number in range(sizes.rounds):
        start, updates = final, []
        for index, site in enumerate(sites):
            load(model, start)
            train_site(condition, model, site.units, sizes, seed=1000 * number + 10 * index)
            updates.append(difference(state_of(model), start))
        final = combine(start, updates)
    return {"start": start, "updates": updates, "final": final}


def difference(state: State, start: State) -> State:
    return {name: tensor - start[name] for name, tensor in state.items()}


# Attacks


def attack(
    condition: str,
    model: nn.Module,
    scorer: CausalModel,
    base: State,
    sites: Sequence[Site],
    sizes: Sizes,
    journal: Journal,
) -> dict[str, Any]:
    """All attacks on one condition, from all positions."""
    if condition == "untrained":
        # The random control: a model that never saw the sites' text.
        run = Run(base, [difference(base, base) for _ in sites], base)
    else:
        trained = "plain" if condition == "secure-aggregated" else condition
        parts = journal.tensors(
            f"run-{trained}", lambda: federate(trained, model, base, sites, sizes)
        )
        run = Run(**parts)
    sigma, claimed = noise_of(condition, sizes)
    row: dict[str, Any] = {
        "noise_multiplier": sigma,
        "claimed_epsilon": None if math.isinf(claimed) else claimed,
        "delta": DELTA,
        "perplexity": perplexity(model, scorer, run.final, sites),
        "positions": {
            position: attack_models(
                views(condition, position, base, run), model, scorer, sites, sizes
            )
            for position in POSITIONS
        },
    }
    if condition != "untrained":
        row["tokens"] = attack_updates(condition, model, base, sites, sizes)
    return row


def views(condition: str, position: str, base: State, run: Run) -> list[View]:
    """Return the models that an attacker has."""
    everyone = list(range(len(run.updates)))
    if condition == "untrained":
        return [View(run.final, None, everyone)]
    if position == "outsider":
        return [View(run.final, None, everyone)]
    if position == "peer":  # the first site, which takes its own update out of the sum
        return [View(combine(run.start, run.updates[1:]), base, everyone[1:])]
    if condition == "secure-aggregated":
        return [View(run.final, base, everyone)]
    return [
        View(combine(run.start, [update]), base, [index])
        for index, update in enumerate(run.updates)
    ]


def attack_models(
    seen: Sequence[View],
    model: nn.Module,
    scorer: CausalModel,
    sites: Sequence[Site],
    sizes: Sizes,
) -> dict[str, Any]:
    inside, outside, exposures, found, audit, coins = [], [], [], [], [], []
    for view in seen:
        targets = [sites[index] for index in view.sites]
        groups = [
            [example for site in targets for example in getattr(site, kind)]
            for kind in ("members", "others", "audit")
        ]
        references = [score(model, scorer, view.reference, group) for group in groups]
        scores = [
            loss_scores(target) if reference is None else calibrated_scores(target, reference)
            for target, reference in zip(
                [score(model, scorer, view.state, group) for group in groups],
                references,
                strict=True,
            )
        ]
        for everything, part in zip((inside, outside, audit), scores, strict=True):
            everything.append(part)
        coins += [coin for site in targets for coin in site.is_included]
        canaries = [canary for site in targets for canary in site.canaries]
        load(model, view.state)
        exposures += measure_exposure(
            scorer, canaries, num_alternatives=sizes.num_alternatives, seed=0
        )
        found += extract_secrets(scorer, canaries)
    extracted: dict[int, list[bool]] = {}
    for exposure, secret in zip(exposures, found, strict=True):
        canary = exposure.canary
        extracted.setdefault(canary.num_repetitions, []).append(secret == canary.secret)
    membership = evaluate_membership(
        np.concatenate(inside),
        np.concatenate(outside),
        false_positive_rates=[
            rate for rate in sizes.false_positive_rates if rate * sum(map(len, outside)) >= 1
        ],
    )
    bound = audit_one_run(
        np.concatenate(audit), coins, num_guesses=[len(coins) // 4, len(coins)], delta=DELTA
    )
    return {
        "exposure": [summary.model_dump() for summary in summarize_exposures(exposures)],
        "extracted": {str(count): sum(each) / len(each) for count, each in extracted.items()},
        "membership": membership.model_dump(),
        "audit": bound.model_dump(),
    }


def score(
    model: nn.Module, scorer: CausalModel, state: State | None, examples: Sequence[Example]
) -> TextResult | None:
    if state is None:
        return None
    load(model, state)
    return evaluate_examples(scorer, [[example] for example in examples])


def perplexity(
    model: nn.Module, scorer: CausalModel, state: State, sites: Sequence[Site]
) -> dict[str, float]:
    """Of each site's held-out records, and of all."""
    results = [score(model, scorer, state, site.others) for site in sites]
    total = sum(sum(result.record_losses) for result in results)
    rows = {name: math.exp(result.loss) for name, result in zip(SITES, results, strict=True)}
    return rows | {"all": math.exp(total / sum(result.num_tokens for result in results))}


def attack_updates(
    condition: str, model: nn.Module, base: State, sites: Sequence[Site], sizes: Sizes
) -> dict[str, Any]:
    """Which tokens were in a round of two steps on a few records, and at which site."""
    trained = "plain" if condition == "secure-aggregated" else condition
    updates, tokens = [], []
    for index, site in enumerate(sites):
        units = [(example,) for example in site.members[: sizes.attacked_records]]
        load(model, base)
        if trained == "plain":
            config = TrainConfig(learning_rate=sizes.learning_rate, warmup_tokens=0)
            records = [record for unit in units for record in unit]
            for seed in range(2):
                train(model, records, config, pad_id=0, seed=seed)
        else:
            private = PrivateConfig(
                num_units=len(units),
                units_per_step=len(units),
                noise_multiplier=noise_of(trained, sizes)[0],
            )
            train_noisily(model, units, private, sizes, 2, seed=90 + index)
        updates.append(difference(state_of(model), base)[EMBEDDING])
        tokens.append({token for (example,) in units for token in example.ids[:-1]})
    owners = sole_owners(tokens)
    alone = np.stack([token_evidence(update) for update in updates])
    result: dict[str, Any] = {}
    if condition == "secure-aggregated":
        total, rest = secure_sum(updates), secure_sum(updates[:-1])
        sum_V = token_evidence(total)
        result["presence"] = evaluate_presence(sum_V, set().union(*tokens)).model_dump()
        result["attribution"] = evaluate_attribution(
            np.stack([sum_V] * len(sites)), owners
        ).model_dump()
        # The same round again while the last site is away: it had what is missing now.
        last_V = token_evidence(total - rest)
        others_V = token_evidence(rest)
        result["attribution_when_one_leaves"] = evaluate_attribution(
            np.stack([others_V] * (len(sites) - 1) + [last_V]), owners
        ).model_dump()
    else:
        presences = [evaluate_presence(alone[index], tokens[index]) for index in range(len(sites))]
        keys = ("auc", "precision", "recall")
        result["presence"] = {
            key: float(np.mean([getattr(each, key) for each in presences])) for key in keys
        }
        result["attribution"] = evaluate_attribution(alone, owners).model_dump()
    result["peer_attribution"] = peer_attribution(updates, tokens)
    return result


def secure_sum(updates: Sequence[Tensor]) -> Tensor:
    """The sum as secure aggregation gives it: of integers on a grid."""
    codes = [FIXED_POINT.encode(update.numpy().ravel()).codes for update in updates]
    decoded = FIXED_POINT.decode(np.sum(codes, axis=0)).reshape(updates[0].shape)
    return torch.from_numpy(decoded)


def peer_attribution(updates: Sequence[Tensor], tokens: Sequence[set[int]]) -> dict[str, Any]:
    """The first site asks which of the others had a token; it sees the sum alone, always."""
    rest_V = token_evidence(secure_sum(updates) - secure_sum(updates[:1]))
    evidence = np.stack([rest_V] * (len(updates) - 1))
    return evaluate_attribution(evidence, sole_owners(tokens[1:])).model_dump()


def audit_many_runs(sizes: Sizes) -> dict[str, Any]:
    """Jagielski's audit, on a model small enough to be trained a thousand times.

    One unit's gradient is far beyond the clipping norm along a weight that no other moves;
    the attacker reads AdamW's first moment, which noisy gradients alone make.
    """
    rows = {}
    for name, claimed_sigma, real_sigma in (
        ("as claimed", 1.0, 1.0),
        ("a tenth of the noise claimed", 1.0, 0.1),
        ("no noise", 0.0, 0.0),
    ):
        phase = Phase(sampling_probability=1.0, noise_multiplier=claimed_sigma, num_steps=3)
        claimed = epsilon_spent([phase], 1e-3)
        scores = [toy_scores(real_sigma, there, sizes.audited_runs) for there in (True, False)]
        rows[name] = {
            "claimed_epsilon": None if math.isinf(claimed) else claimed,
            **audit_runs(*scores, delta=1e-3).model_dump(),
        }
    return rows


def toy_scores(sigma: float, with_unit: bool, num_runs: int) -> list[float]:
    others = [[(torch.tensor([0.0, 1.0, 0.5]), 1.0)], [(torch.tensor([0.0, 1.0, 1.0]), 1.0)]]
    units = others + [[(torch.tensor([1e3, 0.0, 0.0]), -1e3)]] * with_unit
    private = PrivateConfig(num_units=3, units_per_step=3, noise_multiplier=sigma)
    config = TrainConfig(learning_rate=1e-2, warmup_tokens=0, beta1=0.999)
    draw = fixed_bytes_for_tests_only(int(with_unit))
    scores = []
    for _ in range(num_runs):
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        result = train_private(
            model,
            units,
            lambda m, records: sum(((m(x) - y) ** 2).sum() for x, y in records),
            config,
            private,
            budget=PrivacyBudget(math.inf, 1e-3),
            num_steps=3,
            draw_bytes=draw,
        )
        scores.append(float(result.optimizer_state["state"][0]["exp_avg"][0, 0]))
    return scores


# Telling


COLOURS = {
    "untrained": "#9aa7b4",
    "plain": "#b8326a",
    "secure-aggregated": "#d9691e",
    "clipped": "#7a5cb0",
    "dp-high": "#2f6db3",
    "dp-low": "#3c8f5a",
}


def label_of(result: dict[str, Any], name: str) -> str:
    claimed = result["conditions"][name]["claimed_epsilon"]
    return f"DP, ε = {claimed:.1f}" if claimed else name


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels: exposure, membership, tokens, audited ε."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "mutirao", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 7.4), layout="constrained")
        FigureCanvasSVG(figure)
        (canaries, members), (tokens, audit) = figure.subplots(2, 2)
        for name, row in result["conditions"].items():
            server, colour = row["positions"]["server"], COLOURS[name]
            counts = [str(each["num_repetitions"]) for each in server["exposure"]]
            bits = [each["mean_bits"] for each in server["exposure"]]
            canaries.plot(counts, bits, "o-", color=colour, label=label_of(result, name))
            for place, position in enumerate(POSITIONS):
                found = row["positions"][position]["membership"]
                x = place + 0.12 * (CONDITIONS.index(name) - 2.5)
                ends = [[found["auc"] - found["auc_low"]], [found["auc_high"] - found["auc"]]]
                members.errorbar([x], [found["auc"]], ends, fmt="o", color=colour)
        canaries.set(title="canaries, seen by the server", ylabel="mean exposure, bits")
        canaries.set_xlabel("repetitions of the canary")
        members.set(title="membership", ylabel="AUC, 95 % interval")
        members.set_xticks(range(len(POSITIONS)), POSITIONS)
        members.axhline(0.5, color="#9aa7b4", linewidth=0.8)
        draw_bars(tokens, audit, result)
        figure.legend(
            *canaries.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=6,
            frameon=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_bars(tokens: Any, audit: Any, result: dict[str, Any]) -> None:
    names = [name for name in result["conditions"] if name != "untrained"]
    for place, name in enumerate(names):
        row, colour = result["conditions"][name], COLOURS[name]
        found = row["tokens"]["attribution"]
        ends = [[found["accuracy"] - found["low"]], [found["high"] - found["accuracy"]]]
        tokens.bar([place], [found["accuracy"]], yerr=ends, color=colour)
        audit.bar([place], [row["positions"]["server"]["audit"]["epsilon"]], color=colour)
        if row["claimed_epsilon"]:
            audit.plot([place], [row["claimed_epsilon"]], "_", color="black", markersize=24)
    tokens.axhline(1 / len(SITES), color="#9aa7b4", linewidth=0.8)
    tokens.set(title="which site had a token, seen by the server", ylabel="accuracy")
    audit.set(title="audited ε (bar) and claimed ε (dash)", ylabel="ε, nats")
    for axes in (tokens, audit):
        axes.set_xticks(range(len(names)), [label_of(result, name) for name in names], rotation=15)


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['num_parameters']:,} parameters, {result['seconds']:.0f} s")
    for name, row in result["conditions"].items():
        print(f"{label_of(result, name)}: perplexity {row['perplexity']['all']:.1f}")
        if "tokens" in row:
            attribution, presence = row["tokens"]["attribution"], row["tokens"]["presence"]
            print(
                f"  tokens: AUC {presence['auc']:.2f}, site named right "
                f"{attribution['accuracy']:.0%} (chance {attribution['chance']:.0%})"
            )
        for position, found in row["positions"].items():
            member = found["membership"]
            bits = " ".join(
                f"{each['num_repetitions']}x{each['mean_bits']:.1f}/{each['share_first']:.0%}"
                for each in found["exposure"]
            )
            rates = " ".join(
                f"TPR@{each['asked_false_positive_rate']:.1%} {each['rate']:.1%}"
                for each in member["rates"]
            )
            print(
                f"  {position}: exposure {bits}; AUC {member['auc']:.3f} "
                f"({member['auc_low']:.3f}-{member['auc_high']:.3f}) {rates}; "
                f"eps > {found['audit']['epsilon']:.2f}"
            )
    for name, row in result["many_runs_small_model"].items():
        if isinstance(row, dict):
            print(
                f"many runs, {name}: eps > {row['epsilon']:.2f}, claimed {row['claimed_epsilon']}"
            )


if __name__ == "__main__":
    sys.exit(main())
