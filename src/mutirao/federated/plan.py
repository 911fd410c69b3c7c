"""What is agreed before a federation starts, and what each site keeps to itself.

The plan goes from the coordinator to every site with each round's message; a site's own
file says where its data and its model lie, and never leaves it.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from mutirao.config import Config
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class FederatedConfig(Config):
    """How sites train together."""

    num_rounds: int = Field(default=3, ge=1)
    """Rounds of local training and aggregation."""
    tokens_per_round: int = Field(default=10_050, ge=1)
    """Training tokens at each site in each round, in whole examples."""
    outer_learning_rate: float = Field(default=1.0, gt=0)
    """Step along the mean update; 1 with no momentum is FedAvg."""
    outer_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Nesterov momentum of the outer step (DiLoCo: 0.9 with a learning rate of 0.7)."""
    monitor_tokens: int = Field(default=500, ge=0)
    """Held-out tokens on which each site measures the model it receives; 0 for none."""
    connect_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for all sites to connect, in seconds."""
    round_timeout_s: float = Field(default=1_800.0, gt=0)
    """Longest wait for all updates of a round, in seconds; sites that take turns on one
    machine wait for each other in it."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port of the SuperLink on loopback; 0 takes a free one."""


class Plan(Config):
    """All that a site has to know to take part; sent with every round."""

    federated: FederatedConfig = FederatedConfig()
    """Rounds and aggregation."""
    lora: LoRAConfig = LoRAConfig()
    """The adapter that is trained."""
    train: TrainConfig = TrainConfig()
    """Local training."""
    seed: int = 0
    """Seed of the adapter's start and of the order of examples."""
    model_sha256: str
    """Artifact hash of the base model; a site with another one refuses to train."""
    frozen_sha256: str
    """Hash of the adapter's frozen part, which every site makes from the seed."""


class Site(Config):
    """What one site keeps in its own file: who it is, and where its things are."""

    name: str
    """The site's name; letters, digits, dot, dash, underscore."""
    model: Path
    """The base model: an artifact of kind 'model'."""
    data: Path
    """The site's prepared data: an artifact of kind 'data'."""
    work: Path
    """Where the site keeps its state, its key and its logs."""
    policy: Path | None = None
    """The site's policy file; null where the site obeys every plan."""
    turn: Path | None = None
    """A lock that the sites of one machine take in turn, so that only one of them at a time
    holds a model in memory; null where a site has its machine to itself."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not SITE_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a site name (at most 64 letters, digits, dots, dashes and "
                "underscores)"
            )
        return name


class Coordinator(Config):
    """What the coordinator keeps in its own file."""

    plan: Plan
    """What is agreed."""
    sites: tuple[str, ...] = Field(min_length=1)
    """Names of the sites that take part, all of them and no other."""
    work: Path
    """Where the rounds are journaled; holds the start as round 0."""
