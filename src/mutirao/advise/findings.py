"""What an advice found, and what it says of it: in sentences, and as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mutirao.advise.checkpoint_law import CheckpointLaw
from mutirao.advise.choosing import Candidate
from mutirao.advise.config import Budget
from mutirao.advise.layers import PROBED_BITS, Mix, Part
from mutirao.advise.measuring import Measured
from mutirao.advise.prospects import Bill, OtherSize, Prospects
from mutirao.console import format_bytes


@dataclass(frozen=True)
class Advice:
    """All that was found, and what follows from it."""

    model: str
    loss: float
    """Of the model as it is, in nats per token, on the held-out windows."""
    num_weights: int
    num_rounded: int
    """Weights in the linear layers of the blocks: the law's N."""
    original_bytes: int
    num_tokens: int
    """Held-out tokens."""
    budget: Budget
    law: CheckpointLaw
    candidates: tuple[Candidate, ...]
    """By bytes."""
    chosen: Candidate
    sentence: str
    parts: tuple[Part, ...]
    mix: Mix | None
    """Bits layer by layer in the bytes of the chosen bits; None where it was not asked for."""
    prospects: Prospects
    coarse: str | None
    """What to know of weights that were rounded before; None where they were not."""
    other_measured: tuple[tuple[Measured, float], ...]
    """Ways that were measured for the law and are no candidates, with their noise."""

    def remarks(self) -> list[str]:
        """Return what else there is to say, one sentence or two each."""
        coarse = [] if self.coarse is None else [f"{self.coarse[0].upper()}{self.coarse[1:]}."]
        return [
            *coarse,
            *self._about_speed(),
            *self._about_layers(),
            *_about(self.prospects),
            *self.prospects.notes,
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; sizes in bytes, losses in nats per token."""
        fitted = self.law.fitted
        return {
            "model": self.model,
            "loss": self.loss,
            "num_weights": self.num_weights,
            "num_rounded": self.num_rounded,
            "original_bytes": self.original_bytes,
            "num_tokens": self.num_tokens,
            "budget": self.budget.model_dump(),
            "law": {
                "parameters": fitted.parameters,
                "standard_errors": fitted.standard_errors(),
                "spread": fitted.spread,
                "num_rows": fitted.num_rows,
                "noise": self.law.noise,
                "num_too_large": self.law.num_left_out,
            },
            "candidates": [self._candidate(each) for each in self.candidates],
            "recommended": self.candidates.index(self.chosen),
            "sentence": self.sentence,
            "remarks": self.remarks(),
            "other_measured": [
                {**asdict(each.way), "noise": noise, "measured": each.loss._asdict()}
                for each, noise in self.other_measured
            ],
            "parts": [{"name": each.name, "divergence": each.divergence} for each in self.parts],
            "mix": self._mix(),
            "prospects": _plain(asdict(self.prospects)),
        }

    def _about_speed(self) -> list[str]:
        speed, memory = self.chosen.speed, self.budget.memory_bytes
        if speed is None:
            return []
        rate = (
            "" if speed.tokens_per_s is None else f", {speed.tokens_per_s:.1f} tokens/s predicted"
        )
        where = f"Run as {speed.quantization} (mutirao export --type {speed.quantization.lower()})"
        if memory is not None and speed.resident_bytes > memory:
            return [f"{where}, it is larger than the memory: weights stream from flash{rate}."]
        return [f"{where}, it takes {format_bytes(speed.resident_bytes)} of memory{rate}."]

    def _about_layers(self) -> list[str]:
        if not self.parts:
            return []
        worst = max(self.parts, key=lambda each: each.divergence)
        total = sum(each.divergence for each in self.parts)
        found = [
            f"Most sensitive: {worst.name}, {worst.divergence / total:.0%} of the divergence that "
            f"all {len(self.parts)} parts cause one by one at {PROBED_BITS} bits."
        ]
        if self.mix is not None:
            ratio = self.mix.mixed.divergence / self.mix.uniform.divergence
            what = "is worth it" if self.mix.is_better else "is not worth it"
            found.append(
                f"Bits layer by layer in the same bytes: {ratio:.2f} of the divergence of "
                f"{self.mix.uniform_bits} bits for all, rounded to nearest; a mix {what} here."
            )
        return found

    def _candidate(self, each: Candidate) -> dict[str, Any]:
        return {
            **asdict(each.way),
            "noise": each.noise,
            "total_bytes": each.total_bytes,
            "bits_per_weight": each.bits_per_weight,
            "predicted": None if each.predicted is None else asdict(each.predicted),
            "measured": None if each.measured is None else each.measured.loss._asdict(),
            "rise": asdict(each.rise),
            "speed": None if each.speed is None else asdict(each.speed),
            "is_pareto": each.is_pareto,
            "fits": each.fits(self.budget, self.loss),
        }

    def _mix(self) -> dict[str, Any] | None:
        if self.mix is None:
            return None
        return {
            "bits": self.mix.bits,
            "group_size": self.mix.group_size,
            "total_bytes": self.mix.total_bytes,
            "uniform_bits": self.mix.uniform_bits,
            "mixed": self.mix.mixed._asdict(),
            "uniform": self.mix.uniform._asdict(),
            "is_better": self.mix.is_better,
        }


def _about(prospects: Prospects) -> list[str]:
    """Return what is to be said of what lies beyond the checkpoint."""
    found = [_about_size(other) for other in prospects.other_sizes]
    more = prospects.more_training
    if more is not None:
        words = {True: "would hurt", False: "would still help", None: "may help or hurt"}
        found.append(
            f"More training {words[more.would_hurt]} once rounded so: the critical number of "
            f"tokens is {more.critical_tokens.mean:.2g} ({more.critical_tokens.low:.2g} to "
            f"{more.critical_tokens.high:.2g})."
        )
    if prospects.qat_share is not None:
        found.append(
            f"If it were trained for these bits, {prospects.qat_share:.0%} of the tokens should be "
            "trained with rounding on (Apple's fit)."
        )
    bill = prospects.bill
    if bill is not None:
        found.append(
            f"Over its life: {bill.original.total_cost:,.0f} in 16 bits (training "
            f"{bill.original.training_cost:,.0f}), {bill.chosen.total_cost:,.0f} with the chosen "
            f"bits; {bill.original.total_energy_kwh:,.0f} and "
            f"{bill.chosen.total_energy_kwh:,.0f} kWh: arithmetic on the sizes and prices that "
            f"were told, which has no interval. {_break_even(bill)}"
        )
    return found


def _about_size(other: OtherSize) -> str:
    size = "half as large" if other.size < 1 else "twice as large"
    model = f"A model {size} at {other.bits:g} bits"
    if other.low <= 0 <= other.high:
        return (
            f"{model} may lose or gain against this choice: {other.change:+.2f} nats of loss "
            f"({other.low:+.2f} to {other.high:+.2f})."
        )
    verb = "lose" if other.change > 0 else "gain"
    low, high = sorted((abs(other.low), abs(other.high)))
    return (
        f"{model} would {verb} about {abs(other.change):.2f} nats ({low:.2f} to {high:.2f}) "
        "against this choice."
    )


def _break_even(bill: Bill) -> str:
    if bill.smaller is None:
        return "No training is known to take a model half as large to the same loss."
    requests = bill.break_even_requests
    when = "never" if requests is None else f"from {requests:,.0f} requests on"
    return (
        "A model half as large, trained to the same loss by Kumar's law, whose constants count as "
        f"exact, costs less {when}."
    )


def _plain(value: Any) -> Any:
    """Replace infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
