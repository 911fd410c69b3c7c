"""How large the privacy benchmark is, and the names in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mutirao.federated.secure.fixed_point import FixedPoint

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MUTIRAO_TEST_DATA", ROOT.parent / "shared" / "data")) / "medquad"
PUBLIC = ("mplus_health_topics", "seniorhealth")
SITES = ("niddk", "ninds", "nhlbi", "cancergov")
TEMPLATE = "The card of patient {label} has the number {secret}"
EMBEDDING = "model.embed_tokens.weight"
CONDITIONS = (
    *("untrained", "overfitted", "plain", "secure-aggregated"),
    *("clipped", "dp-high", "dp-low"),
)
"""The random control, the positive control, and what is compared."""
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
    base_tokens: int = 500_000
    base_learning_rate: float = 3e-3
    max_tokens: int = 48
    num_members: int = 200
    num_others: int = 260
    num_each: int = 2
    repetitions: tuple[int, ...] = (0, 1, 4, 16)
    num_alternatives: int = 127
    num_audit: int = 40
    rounds: int = 3
    epochs_per_round: int = 1
    overfitted_epochs_per_round: int = 4
    learning_rate: float = 3e-3
    private_learning_rate: float = 1e-3
    units_per_step: int = 30
    private_steps: int = 8
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
    epochs_per_round=4,
    overfitted_epochs_per_round=8,
    units_per_step=8,
    private_steps=4,
    attacked_records=4,
    audited_runs=60,
    false_positive_rates=(0.01,),
)
