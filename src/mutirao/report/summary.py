"""A run in numbers: everything the page and the terminal say, computed once.

Differences of loss are paired by record; their standard errors are clustered by record
(``evaluate.losses.paired_difference``). Means over silos give every silo the same weight,
and take the silos' errors as independent, since no record belongs to two of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from mutirao.evaluate.choices import QuestionResult
from mutirao.evaluate.losses import Difference
from mutirao.evaluate.outcomes import OutcomeResult
from mutirao.report.documents import (
    Answer,
    Preparation,
    Round,
    Stage,
)
from mutirao.report.pedigree import Ancestor

Z_95 = 1.959964
"""Half-width of a normal 95 % interval, in standard errors."""
BASE, FEDERATED, ALONE = "base", "federated", "alone-"
NAME_TYPES = frozenset({"NAME", "PERSON", "PERSON_NAME"})
"""Types that stand for names of people."""


@dataclass(frozen=True)
class Baseline:
    """The model that everything started from."""

    source: str
    """As written in the recipe."""
    quantization: str | None
    """Of the file it came from, for instance 'Q4_1'; None where it was not quantized."""
    num_parameters: int | None

    @property
    def short_name(self) -> str:
        """The last part of the source, without version, hash and extension."""
        name = self.source.split("@sha256:")[0].rsplit("/", 1)[-1].rsplit("#", 1)[-1]
        name = name.removesuffix(".gguf").removeprefix("hf:")
        return name.removesuffix(f".{self.quantization}") or self.source

    @property
    def is_4_bit(self) -> bool:
        """Whether its weights were read from a file of 4 bits."""
        return self.quantization is not None and "4" in self.quantization[:4]


@dataclass(frozen=True)
class LossRow:
    """One silo's held-out text: every model against the base, in nats per token."""

    silo: str
    base_loss: float
    num_tokens: int
    num_records: int
    differences: dict[str, Difference | None]
    """By label: loss minus the base's; None where it was not measured on these records."""
    best: str | None
    """Label that is lower than every other beyond the uncertainty of their difference."""


@dataclass(frozen=True)
class Comparison:
    """A task's result before and after federation, at one silo."""

    silo: str
    before: QuestionResult | OutcomeResult | None
    after: QuestionResult | OutcomeResult | None


@dataclass(frozen=True)
class Traffic:
    """What left a silo, and what stayed there, in bytes."""

    bytes_sent: int
    bytes_received: int
    bytes_stayed: int | None
    """Text that was used, in UTF-8; None where the silo's report is missing."""

    @property
    def ratio(self) -> float | None:
        """Bytes that left for each byte of data that stayed."""
        return self.bytes_sent / self.bytes_stayed if self.bytes_stayed else None


@dataclass(frozen=True)
class Compression:
    """The federated model at fewer bits."""

    label: str
    """Its folder's name."""
    weight_bits: float
    """Of a code; their mean over the rounded weights where they differ."""
    bits_per_weight: float
    """Scales and unquantized tensors included."""
    total_bytes: int
    original_bytes: int
    differences: dict[str, Difference | None]
    """By silo: loss minus the uncompressed model's, nats per token."""
    mean: Difference | None
    """Over the silos."""

    @property
    def words(self) -> str:
        """The label, and the mean bits of a code where layers differ in theirs."""
        if self.weight_bits.is_integer():
            return self.label
        return f"{self.label} (mean {self.weight_bits:.2f})"


@dataclass(frozen=True)
class RunSummary:
    """Everything that is known of a run."""

    run: str
    finished_at: str | None
    """UTC time of the newest artifact that was read."""
    baseline: Baseline | None
    silos: tuple[str, ...]
    stages: tuple[Stage, ...]
    preparations: dict[str, Preparation]
    rounds: tuple[Round, ...]
    model_labels: tuple[str, ...]
    """Columns of the loss table: alone-NAME for each silo, then federated."""
    losses: tuple[LossRow, ...]
    federated_loss: dict[str, float]
    """By silo, nats per token, on the same records as the base's."""
    mean_difference: Difference | None
    """Federated minus base, over the silos, nats per token."""
    questions: tuple[Comparison, ...]
    outcomes: tuple[Comparison, ...]
    synthetic_patients: bool
    ceilings: dict[str, float]
    """Best AUROC that any score could reach, by silo, where it is known."""
    traffic: dict[str, Traffic]
    compressions: tuple[Compression, ...]
    answer: Answer | None
    lineage: tuple[Ancestor, ...]
    recipe: dict[str, JsonValue] | None
    missing: tuple[str, ...]
    """What the run does not have yet, or what does not fit, each in a few words."""

    @property
    def seconds(self) -> float:
        """Time of all stages together."""
        return math.fsum(stage.seconds for stage in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        """Of the stage that took most."""
        return max((stage.peak_memory_bytes for stage in self.stages), default=0)

    @property
    def total_traffic(self) -> Traffic | None:
        """All silos together."""
        if not self.traffic:
            return None
        rows = self.traffic.values()
        stayed = [row.bytes_stayed for row in rows if row.bytes_stayed is not None]
        return Traffic(
            bytes_sent=sum(row.bytes_sent for row in rows),
            bytes_received=sum(row.bytes_received for row in rows),
            bytes_stayed=sum(stayed) if len(stayed) == len(self.traffic) else None,
        )

    @property
    def num_identifiers(self) -> int:
        """Identifiers replaced in all silos."""
        return sum(sum(each.identifiers.values()) for each in self.preparations.values())

    def injected(self, *, names: bool) -> tuple[int, int]:
        """Return (caught, injected) over all silos, of names or of all other types."""
        counts = [
            count
            for each in self.preparations.values()
            for kind, count in (each.injected or {}).items()
            if (kind in NAME_TYPES) == names
        ]
        return sum(count.caught for count in counts), sum(count.num for count in counts)

    @property
    def removes_names(self) -> bool:
        """Whether any name of a person was found and replaced."""
        return any(NAME_TYPES & set(each.identifiers) for each in self.preparations.values())

    def mean_auroc(self) -> tuple[float, float] | None:
        """Return the mean AUROC over hospitals (before, after), where both are known."""
        pairs = [
            (row.before.auroc, row.after.auroc)
            for row in self.outcomes
            if isinstance(row.before, OutcomeResult) and isinstance(row.after, OutcomeResult)
        ]
        if not pairs:
            return None
        before, after = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return before, after

    def to_json(self) -> str:
        """Return everything as one JSON object; a number that is not finite becomes null."""
        return json.dumps(to_plain(asdict(self)), indent=2, ensure_ascii=False)


def mean_over_silos(differences: Sequence[Difference | None]) -> Difference | None:
    """Average independent differences with equal weights; None where one is not known."""
    known = [each for each in differences if each is not None]
    if not known or len(known) < len(differences):
        return None
    mean = math.fsum(each.mean for each in known) / len(known)
    variance = math.fsum(each.standard_error**2 for each in known)
    return Difference(mean, math.sqrt(variance) / len(known))


def is_clear(difference: Difference) -> bool:
    """Whether a difference stands out of its 95 % interval."""
    return abs(difference.mean) > Z_95 * difference.standard_error


def to_plain(value: Any) -> Any:
    """Turn a summary's values into what JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "model_dump"):
        return to_plain(value.model_dump(mode="python"))
    if isinstance(value, dict):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    return value
