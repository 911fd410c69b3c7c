"""An advice as its ``advice.json`` has it, read into plain dataclasses.

The file is read as a document, not through ``advise``: what another version wrote is shown as far
as it goes, and what does not fit is one sentence. Losses and rises are in nats per token, sizes in
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue

from mutirao.artifact import MANIFEST_NAME, open_artifact, read_manifest
from mutirao.errors import ArtifactError
from mutirao.report.documents import RUN_FILES, read_document
from mutirao.report.pedigree import Ancestor, trace

FILE_NAME = "advice.json"
KIND = "advice"
Z_95 = 1.96

Size = Annotated[int, Field(gt=0, lt=10**18)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Interval:
    """A rise with its 95 % interval."""

    mean: Finite
    low: Finite
    high: Finite


@dataclass(frozen=True)
class Measure:
    """What was measured of one way."""

    rise: Finite
    standard_error: Finite
    divergence: Finite
    num_tokens: int = 0

    @property
    def interval(self) -> Interval:
        """The rise with its 95 % interval."""
        half = Z_95 * self.standard_error
        return Interval(self.rise, self.rise - half, self.rise + half)


@dataclass(frozen=True)
class Speed:
    """What the engine is predicted to do."""

    quantization: str
    resident_bytes: int
    least_bytes: int
    tokens_per_s: Finite | None = None


@dataclass(frozen=True)
class Way:
    """A way of rounding."""

    method: str
    bits: int
    group_size: int | None

    @property
    def words(self) -> str:
        """The way in words, as the advice's sentence has it."""
        where = f"groups of {self.group_size}" if self.group_size else "rows"
        return f"{self.bits} bits in {where} by {self.method}"


@dataclass(frozen=True)
class Row(Way):
    """A candidate."""

    total_bytes: Size
    bits_per_weight: Finite
    rise: Interval
    """Measured, or else predicted."""
    predicted: Interval | None = None
    measured: Measure | None = None
    speed: Speed | None = None
    is_pareto: bool = False
    fits: bool = True
    noise: Finite | None = None
    """Squared error of rounding over the weights squared; None where it was not written down."""


@dataclass(frozen=True)
class OtherWay(Way):
    """A way that was measured for the law and is no candidate."""

    measured: Measure
    noise: Finite | None = None


@dataclass(frozen=True)
class Limits:
    """The budget; None where it does not matter."""

    memory_bytes: Size | None = None
    disk_bytes: Size | None = None
    loss_share: Above0 | None = None


@dataclass(frozen=True)
class LawNumbers:
    """log δ = log_c[method] + noise_power log noise, δ in nats per token."""

    parameters: dict[str, Finite]
    noise: tuple[Above0, Above0]
    """Where it was calibrated."""
    standard_errors: dict[str, float | None] = field(default_factory=dict)
    spread: float | None = None
    num_rows: int | None = None
    num_too_large: int = 0


@dataclass(frozen=True)
class PartNumbers:
    """A block's attention or network, rounded alone."""

    name: str
    divergence: Finite


@dataclass(frozen=True)
class MixNumbers:
    """Bits layer by layer, beside the same bits for all."""

    bits: dict[str, int]
    total_bytes: Size
    uniform_bits: int
    mixed: Measure
    uniform: Measure
    is_better: bool
    group_size: int | None = None


@dataclass(frozen=True)
class Span:
    """A value with its interval; None where it has no bound."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Training:
    """Whether more training would still help after rounding."""

    critical_tokens: Span
    would_hurt: bool | None = None


@dataclass(frozen=True)
class OtherSize:
    """A model of another size in about the same bytes."""

    size: float
    bits: float
    change: float
    low: float | None = None
    """Both ends of its 95 % interval; None in what earlier versions wrote."""
    high: float | None = None


@dataclass(frozen=True)
class Cost:
    """One row of the bill."""

    name: str
    training_cost: Finite
    cost_per_request: Finite
    num_requests: Finite
    training_energy_kwh: Finite = 0.0
    energy_per_request_kwh: Finite = 0.0

    @property
    def total_cost(self) -> float:
        """Money for training and all requests."""
        return self.training_cost + self.num_requests * self.cost_per_request

    @property
    def total_energy_kwh(self) -> float:
        """Energy for training and all requests."""
        return self.training_energy_kwh + self.num_requests * self.energy_per_request_kwh


@dataclass(frozen=True)
class BillNumbers:
    """What the model costs over its life."""

    original: Cost
    chosen: Cost
    smaller: Cost | None = None
    break_even_requests: float | None = None

    @property
    def rows(self) -> list[Cost]:
        """All rows that are there."""
        return [each for each in (self.original, self.chosen, self.smaller) if each is not None]


@dataclass(frozen=True)
class Outlooks:
    """What lies beyond the checkpoint; None where something was not told."""

    more_training: Training | None = None
    other_sizes: tuple[OtherSize, ...] = ()
    qat_share: float | None = None
    bill: BillNumbers | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdviceDocument:
    """All that the page shows."""

    model: str
    loss: Above0
    num_weights: Size
    original_bytes: Size
    num_tokens: int
    candidates: Annotated[tuple[Row, ...], Field(min_length=1)]
    recommended: Annotated[int, Field(ge=0)]
    sentence: str
    budget: Limits = Limits()
    law: LawNumbers | None = None
    num_rounded: int | None = None
    remarks: tuple[str, ...] = ()
    other_measured: tuple[OtherWay, ...] = ()
    parts: tuple[PartNumbers, ...] = ()
    mix: MixNumbers | None = None
    prospects: Outlooks = Outlooks()
    lineage: tuple[Ancestor, ...] = ()
    """From the manifest, as is what follows."""
    recipe: dict[str, JsonValue] = field(default_factory=dict)
    folder: str = ""

    @cached_property
    def chosen(self) -> Row:
        """The candidate to take."""
        return self.candidates[self.recommended]

    @property
    def num_measured(self) -> int:
        """Ways that were measured."""
        return len(self.other_measured) + sum(each.measured is not None for each in self.candidates)


def is_advice(folder: Path) -> bool:
    """Whether a folder is an artifact of kind 'advice'.

    Raises:
        ArtifactError: it is an artifact whose manifest is damaged.
    """
    return find_kind(folder) == KIND


def find_kind(folder: Path) -> str | None:
    """Return what kind of artifact a folder is; None for a run, or where it is none.

    Raises:
        ArtifactError: the manifest is damaged.
    """
    if any((folder / name).is_file() for name in RUN_FILES):
        return None
    return read_manifest(folder).kind if (folder / MANIFEST_NAME).is_file() else None


def read_advice(folder: Path) -> AdviceDocument:
    """Read an advice and check it against its manifest.

    Raises:
        ArtifactError: it is no advice, or its file is missing, altered or of another shape.
    """
    manifest = open_artifact(folder, KIND)
    path = folder / FILE_NAME
    found = read_document(AdviceDocument, path)
    if found is None:
        raise ArtifactError(f"{folder} is damaged: {FILE_NAME} is missing; advise again")
    if found.recommended >= len(found.candidates):
        raise ArtifactError(
            f"{path} is damaged: it recommends candidate {found.recommended} of "
            f"{len(found.candidates)} (counted from 0); advise again"
        )
    return replace(found, lineage=trace(folder), recipe=dict(manifest.recipe), folder=str(folder))
