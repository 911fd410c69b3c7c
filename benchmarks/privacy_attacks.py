"""The attacks of the privacy benchmark, from where the server, a peer and an outsider stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from privacy_journal import Journal
from privacy_settings import DELTA, EMBEDDING, FIXED_POINT, POSITIONS, SITES, Sizes, State
from privacy_sites import Site, state_of
from privacy_training import (
    Run,
    combine,
    difference,
    federate,
    load,
    noise_of,
    rate_of,
    train_noisily,
)
from torch import Tensor, nn

from mutirao.data.tokenization import Example
from mutirao.evaluate.losses import TextResult, evaluate_examples
from mutirao.evaluate.privacy.audit import audit_one_run, audit_runs
from mutirao.evaluate.privacy.canaries import (
    extract_secrets,
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
from mutirao.models.causal import CausalModel
from mutirao.train.accountant import Phase, PrivacyBudget, epsilon_spent
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.loop import train
from mutirao.train.private import fixed_bytes_for_tests_only, train_private


@dataclass(frozen=True)
class View:
    """A model that an attacker has, what it is compared with, and whom it is used against."""

    state: State
    reference: State | None
    sites: list[int]


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
        "positions": {},
    }
    for position in POSITIONS:
        if condition == "untrained" and row["positions"]:
            row["positions"][position] = row["positions"]["server"]  # all see the same
            continue
        seen = views(condition, position, base, run)
        row["positions"][position] = attack_models(seen, model, scorer, sites, sizes)
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
        np.concatenate(audit),
        coins,
        num_guesses=[len(coins) // 4, len(coins) // 2, len(coins)],
        delta=DELTA,
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
        if trained in ("plain", "overfitted"):
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
            train_noisily(model, units, private, rate_of(trained, sizes), 2, seed=90 + index)
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
        ("as claimed", 2.0, 2.0),
        ("a tenth of the noise claimed", 2.0, 0.2),
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
