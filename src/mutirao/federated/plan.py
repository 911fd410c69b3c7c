"""What is agreed before a federation starts, and what each side keeps to itself.

The plan goes from the coordinator to every site with each request; a site's own file says
where its data and its model lie, and never leaves it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mutirao.artifact import canonical_json
from mutirao.config import Config
from mutirao.federated.aggregation.outer import FedAdam, FedAvg, FedMom, Nesterov
from mutirao.federated.codec.config import CodecConfig
from mutirao.train.config import PrivateConfig, TrainConfig
from mutirao.tune.config import LoRAConfig

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RUN_ID = re.compile(r"[0-9a-f]{64}")
PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")

Aggregation = Literal[
    "mean", "separate", "fedex", "stacked", "median", "trimmed_mean", "krum", "multi_krum"
]
Outer = Annotated[FedAvg | Nesterov | FedMom | FedAdam, Field(discriminator="rule")]


class SecureConfig(Config):
    """Secure aggregation: the coordinator learns the sum of the updates alone."""

    clip: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Largest magnitude of an update's value that is kept; the rest is cut off and counted."""
    value_bits: int = Field(default=16, ge=4, le=32)
    """Bits of one site's value; the sum gets as many more as the number of sites needs."""
    threshold: int | None = Field(default=None, ge=2)
    """Sites that must stay to the end of a round; null for more than two thirds."""


class PrivacyConfig(Config):
    """Record-level differential privacy: DP-SGD at each site, a patient as the unit."""

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    """The most that a run may spend at each site."""
    delta: float = Field(gt=0, lt=1)
    """Probability that the bound does not hold; well below one in the number of units."""
    training: PrivateConfig
    """Sampling, clip and noise."""
    steps_per_round: int = Field(default=10, ge=1)
    """Noisy steps at each site in a round; they replace ``tokens_per_round``."""


class FederatedConfig(Config):
    """How sites train together."""

    num_rounds: int = Field(default=3, ge=1)
    """Rounds of local training and aggregation."""
    turns: int = Field(default=1, ge=1)
    """Groups that the sites are split into, of which one trains in each round, there and back; 1
    for all sites in every round. With as many turns as sites the model travels from one to the
    next. All groups train as much, and at the same mean rate, where ``num_rounds`` is a multiple of
    twice the turns."""
    tokens_per_round: int = Field(default=10_050, ge=1)
    """Training tokens at each site in each round, in whole examples."""
    aggregation: Aggregation = "mean"
    """How updates become one. For adapters whose A is trained: 'fedex' and 'stacked' are exact,
    'separate' is not, and is there for comparison."""
    num_faulty: int = Field(default=1, ge=0)
    """Faulty sites that a robust aggregation bears: as many are cut off at each end of a trimmed
    mean, and Krum needs more than twice as many and two sites."""
    weighting: Literal["tokens", "equal"] = "tokens"
    """What an update counts: its training tokens, or 1."""
    outer: Outer = FedAvg()
    """Optimizer of the global state."""
    upload: CodecConfig = CodecConfig(format="int8")
    """How a site's update is written."""
    download: CodecConfig = CodecConfig(format="bf16")
    """How the change of the global state is written; the first state goes whole."""
    error_feedback: bool = False
    """Send with each update what the rounding of earlier ones lost."""
    keeps_optimizer: bool = True
    """Whether a site's AdamW goes on from round to round, or starts anew."""
    second_moments: bool = False
    """Start a site's AdamW from the second moments that lie in the base model's folder, where
    ``mutirao federate moments`` has put them, in place of zero; where all weights are trained."""
    secure: SecureConfig | None = None
    """Secure aggregation; null where the coordinator may see single updates."""
    privacy: PrivacyConfig | None = None
    """Differential privacy; null for none."""
    quorum: int = Field(default=0, ge=0)
    """Fewest updates that make a round; 0 for those of all sites."""
    round_timeout_s: float = Field(default=1_800.0, gt=0)
    """Deadline of a round, in seconds: with a quorum it goes on without those who are late,
    without one the run ends, and goes on from its last round when it is started again. Sites
    that take turns on one machine wait for each other in it."""
    max_update_norm: float | None = Field(default=None, gt=0)
    """Updates of a larger L2 norm are refused as gross faults; null for no bound."""
    monitor_tokens: int = Field(default=500, ge=0)
    """Held-out tokens on which each site measures the model it receives; 0 for none."""
    connect_timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for enough sites to connect, in seconds."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port of the SuperLink; 0 takes a free one."""

    def group(self, sites: Iterable[str], round_number: int) -> tuple[str, ...]:
        """Return the sites whose turn a round is, sorted: of the first group to the last, and back.

        Where the rate falls, the groups' mean rates stay alike in this way.
        """
        cycle, place = divmod(round_number - 1, self.turns)
        turn = self.turns - 1 - place if cycle % 2 else place
        return tuple(sorted(sites)[turn :: self.turns])

    def basis(self, round_number: int) -> int:
        """Return the round whose state the next group holds, after a round; 0 for the start.

        That group was as far from the end of the last cycle as it is from the beginning of its own,
        and was given the state before its round.
        """
        cycle, place = divmod(round_number, self.turns)
        return max(0, cycle * self.turns - place - 1)

    @property
    def num_states(self) -> int:
        """How many of the last states a change may have to lead from, the newest among them."""
        return 2 * self.turns


class Plan(Config):
    """All that a site has to know to take part; sent with every request."""

    federated: FederatedConfig = FederatedConfig()
    """Rounds and aggregation."""
    lora: LoRAConfig | None = LoRAConfig()
    """The adapter that is trained; null trains all weights."""
    train: TrainConfig = TrainConfig()
    """Local training."""
    seed: int = 0
    """Seed of the adapter's start and of the order of examples."""
    model_sha256: str
    """Artifact hash of the base model; a site with another one refuses to train."""
    frozen_sha256: str = ""
    """Hash of the adapter's frozen part, which every site makes from the seed; empty where
    all weights are trained."""

    @property
    def sha256(self) -> str:
        """The recipe's hash, by which a site's policy allows it."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @model_validator(mode="after")
    def _check_aggregation(self) -> Plan:
        if self.federated.aggregation in ("separate", "fedex", "stacked") and (
            self.lora is None or self.lora.freeze_a
        ):
            raise ValueError(
                f"federated.aggregation={self.federated.aggregation} needs an adapter with "
                "lora.freeze_a = false"
            )
        return self


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
    coordinator_key: str | None = None
    """Public key of the coordinator, 64 hexadecimal digits; null takes requests of anybody,
    which is for trials on one machine."""
    identities: dict[str, str] = Field(default_factory=dict)
    """Public key of each site of the cohort, by name, for secure aggregation; got from the
    sites themselves, not from the coordinator."""
    rank: int | None = Field(default=None, ge=1)
    """The adapter's rank at this site where it may differ (aggregation 'stacked'); null for
    the plan's."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that share each training step at this site; each holds the whole model. Not with
    differential privacy."""

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
    sites: dict[str, str] = Field(min_length=1)
    """Public key of each site that takes part, by name: all of them and no other."""
    work: Path
    """Where the rounds are journaled; holds the start as round 0."""
    run_id: str
    """64 hexadecimal digits, random, that name the run; the same after a restart."""
