"""A small stand-in for the federation: sites train in turns, in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from privacy_settings import DELTA, Sizes, State
from privacy_sites import Site, state_of
from torch import Tensor, nn

from mutirao.data.tokenization import Example
from mutirao.train.accountant import Phase, PrivacyBudget, epsilon_spent, find_noise_multiplier
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.train.loop import train
from mutirao.train.private import example_loss, fixed_bytes_for_tests_only, train_private


@dataclass(frozen=True)
class Run:
    """What was seen of one federated run: the last round's start and updates, and the end."""

    start: State
    updates: list[State]
    final: State


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


@lru_cache
def noise_of(condition: str, sizes: Sizes) -> tuple[float, float]:
    """Noise multiplier and claimed ε of a condition."""
    if not condition.startswith("dp-"):
        return 0.0, math.inf
    target = sizes.epsilons[condition == "dp-low"]
    q, num_steps = sizes.units_per_step / public_number(sizes), sizes.rounds * sizes.private_steps
    sigma = find_noise_multiplier(target, DELTA, sampling_probability=q, num_steps=num_steps)
    phase = Phase(sampling_probability=q, noise_multiplier=sigma, num_steps=num_steps)
    return sigma, epsilon_spent([phase], DELTA)


def rate_of(condition: str, sizes: Sizes) -> float:
    """Learning rate: noise wants a smaller one."""
    return sizes.private_learning_rate if condition.startswith("dp-") else sizes.learning_rate


def public_number(sizes: Sizes) -> int:
    """Number of units as all may know it, whatever the coins said."""
    num_canaries = sizes.num_each * sum(count > 0 for count in sizes.repetitions)
    return sizes.num_members + num_canaries + sizes.num_audit // 2


def train_site(
    condition: str, model: nn.Module, units: Sequence[Sequence[Example]], sizes: Sizes, seed: int
) -> None:
    """One site's part of one round, in place."""
    if condition in ("plain", "overfitted"):
        examples, optimizer_state = [record for unit in units for record in unit], None
        config = TrainConfig(learning_rate=sizes.learning_rate, warmup_tokens=0)
        is_plain = condition == "plain"
        num_epochs = sizes.epochs_per_round if is_plain else sizes.overfitted_epochs_per_round
        for epoch in range(num_epochs):
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
    train_noisily(model, units, private, rate_of(condition, sizes), sizes.private_steps, seed)


def train_noisily(
    model: nn.Module,
    units: Sequence[Sequence[Example]],
    private: PrivateConfig,
    learning_rate: float,
    num_steps: int,
    seed: int,
) -> None:
    train_private(
        model,
        units,
        example_loss(0),
        TrainConfig(learning_rate=learning_rate, warmup_tokens=0),
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
