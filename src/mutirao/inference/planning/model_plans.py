"""Plan a model by its name: what ``mutirao plan`` does, as one function.

The probe, the model's description and the planner come together here; the result says what it
rests on, assumptions included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mutirao.environment import cache_directory
from mutirao.inference.calibration import Calibration
from mutirao.inference.planning.machine import Machine, memory_limits
from mutirao.inference.planning.plan_source import PlannedModel, planned_models
from mutirao.inference.planning.planner import (
    Plan,
    Plans,
    TooLittleMemoryError,
    make_plans,
)
from mutirao.inference.planning.probe import is_disturbed, probe

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class ModelPlans:
    """The plans of a model, or of several quantizations that it could have."""

    name: str
    memory_bytes: int
    """Peak of the whole process."""
    available_bytes: int
    """Memory that could be taken when the plans were made."""
    context: int
    machine: Machine
    models: dict[str, tuple[PlannedModel, Plans | None]]
    """By quantization ('' where the weights are there); None where the memory is too small."""
    least_bytes: dict[str, int]
    """The least memory that works, by quantization."""

    def notes(self) -> list[str]:
        """Return sentences on what the plans need and what they rest on."""
        notes = [self._needs(*item) for item in self.models.items()]
        if any(plan.acceptance_from == "assumption" for plan in self._all_plans()):
            notes.append(
                "* an assumption, measured on one model of 1.5 billion weights; how many drafted "
                "tokens this one keeps is measured when it is first run in little memory."
            )
        if any(quantization for quantization in self.models):
            notes.append("Formats of the weights are assumed, as llama.cpp would choose them.")
        if self.memory_bytes > self.available_bytes:
            notes.append(
                f"Only {self.available_bytes / 1e6:.0f} MB are available here at this moment."
            )
        if is_disturbed(self.machine):
            notes.append(
                "The probe was disturbed by other programs: its rounds differ by "
                f"{100 * self.machine.spread:.0f} %, and it waited for the processor for "
                f"{100 * self.machine.waited_share:.0f} % of its time. Figures may be far off; "
                "--probe measures again."
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return plain values: sizes in bytes, times in seconds."""
        return {
            "model": self.name,
            "memory_bytes": self.memory_bytes,
            "available_bytes": self.available_bytes,
            "context": self.context,
            "machine": {
                "processor": self.machine.processor,
                "num_threads": self.machine.num_threads,
                "kernels": self.machine.kernels,
                "measured_on": self.machine.measured_on,
                "spread": self.machine.spread,
                "waited_share": self.machine.waited_share,
                "is_disturbed": is_disturbed(self.machine),
                "direct": self.machine.direct,
                "read_bytes_per_s": max(each.bytes_per_s for each in self.machine.reads),
            },
            "quantizations": [
                {
                    "quantization": quantization or None,
                    "weights_bytes": sum(each.num_bytes for each in model.tensors.values()),
                    "least_memory_bytes": self.least_bytes[quantization],
                    "chosen": plans.best.name if plans else None,
                    "plans": [plan.to_json() for plan in plans.plans] if plans else [],
                }
                for quantization, (model, plans) in self.models.items()
            ],
        }

    def _needs(self, quantization: str, planned: tuple[PlannedModel, Plans | None]) -> str:
        _, plans = planned
        what = f"{quantization} runs" if quantization else "It runs"
        least = f"{what} in {self.least_bytes[quantization] / 1e6:.0f} MB or more"
        if plans is None:
            return f"{least}."
        return f"{least}, and is all resident from {plans.all_resident_bytes / 1e6:.0f} MB."

    def _all_plans(self) -> list[Plan]:
        return [plan for _, plans in self.models.values() if plans for plan in plans.plans]


def plan_model(
    text: str,
    *,
    memory_bytes: int | None = None,
    context: int | None = None,
    num_threads: int | None = None,
    quantizations: Sequence[str] = (),
    refresh_probe: bool = False,
) -> ModelPlans:
    """Plan what a source names.

    Args:
        text: the source; see ``plan_source.planned_models``.
        memory_bytes: peak of the whole process; None: what is available now.
        context: most tokens of prompt and answer; None: the model's own, up to 2048.
        num_threads: to compute with; None: one for each core.
        quantizations: to assume; none: the weights as they are.
        refresh_probe: measure the machine again.

    Raises:
        InputError: the memory is too small, or a setting is out of range.
        SourceError: the source is malformed or names nothing.
        FormatError: what it names is damaged, no model, or one that is not supported.
        MissingKernelError: there is no native library, whose speed could be predicted.
    """
    found = planned_models(text, quantizations)
    limits = memory_limits()
    budget = limits.available_bytes if memory_bytes is None else memory_bytes
    length = min(found[0].spec.context_length, context or DEFAULT_CONTEXT)
    num_cores = len(os.sched_getaffinity(0))
    machine = probe(cache_directory() / "stores", num_threads or num_cores, refresh=refresh_probe)
    models: dict[str, tuple[PlannedModel, Plans | None]] = {}
    least_bytes = {}
    for model in found:
        calibration = Calibration.load(model.store) if model.store else None
        try:
            plans = make_plans(
                machine,
                model.spec,
                model.tensors,
                budget,
                context=length,
                calibration=calibration,
            )
        except TooLittleMemoryError as error:
            if len(found) == 1:
                raise
            least_bytes[model.quantization] = error.least_bytes
            models[model.quantization] = (model, None)
            continue
        least_bytes[model.quantization] = plans.least_bytes
        models[model.quantization] = (model, plans)
    return ModelPlans(
        found[0].name, budget, limits.available_bytes, length, machine, models, least_bytes
    )
