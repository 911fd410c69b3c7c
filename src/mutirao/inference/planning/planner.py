"""The ways to run a model in some memory, how fast each would be, and which is fastest.

All weights in memory; pinned and streamed; or the upper bit planes in memory as a draft, and the
lower ones streamed to check it. ``placement`` chooses what stays in each, ``memory_use`` says
what that takes, ``cost_model`` how fast it is. ``make_plans`` is what ``mutirao plan`` prints and
what the engine follows, so that they cannot differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mutirao.errors import InputError
from mutirao.inference.architecture.model_spec import ModelSpec
from mutirao.inference.architecture.program import compile_program
from mutirao.inference.native.backend import NOTHING, Placement
from mutirao.inference.planning.cost_model import MAX_DRAFT, Prediction, predict, predict_best_draft
from mutirao.inference.planning.machine import Machine
from mutirao.inference.planning.memory_use import (
    HUGE_PAGE_BYTES,
    PROCESS_BYTES,
    MemoryUse,
    least_ring_bytes,
    memory_besides_weights,
    memory_needed,
    resident_bytes,
)
from mutirao.inference.planning.placement import (
    Choice,
    extent_bytes,
    multiplied,
    only_looked_up,
    pin,
    split,
)
from mutirao.inference.store.plane_formats import find_format

if TYPE_CHECKING:
    from mutirao.inference.calibration import Calibration
    from mutirao.inference.store.store_index import StoredTensor

ALL_RESIDENT = "all resident"
PINNED = "pin and stream"
SPECULATION = "self-speculation"

ASSUMED_OF_CODES = 0.93
"""Acceptance of a draft with all codes of split floats but no rest: they err about as much as the
plane of Q4_K that costs as much above (an assumption, too)."""

LOOKUP_ROWS = 8
"""Tokens checked at once where only repetitions of the text are drafted; a tile of the kernels."""
PREFILL_TOKENS = 128
"""Tokens of a prompt that are taken together."""
STREAMING = (
    {"piece_bytes": 1 << 20, "num_readers": 8, "ring_bytes": 16 << 20},
    {"piece_bytes": 1 << 20, "num_readers": 4, "ring_bytes": 16 << 20},
    {"piece_bytes": 4 << 20, "num_readers": 8, "ring_bytes": 32 << 20},
    {"piece_bytes": 1 << 18, "num_readers": 4, "ring_bytes": 0},
)
"""Ways to read ahead; the first one that fits, unless another is predicted to be clearly faster.
A ring holds at least three pieces, and a piece 256 rows; the last way takes least memory."""
CLEARLY_FASTER = 1.1

ASSUMED_ACCEPTANCE = ((0.0, 1.0), (0.149, 0.93), (0.307, 0.83), (0.449, 0.66), (1.0, 0.0))
"""Share of the multiplied weights that a draft leaves out, and of its tokens that are kept.
Measured on Qwen2.5-Coder-1.5B-Instruct Q4_K_M, greedy, 3 x 110 tokens, 2026-11; the ends are
set. Of any other model it is an assumption, until that model has been calibrated."""


class TooLittleMemoryError(InputError):
    """A budget is too small for any plan; says the least that works."""

    def __init__(self, memory_bytes: int, least_bytes: int, context: int) -> None:
        super().__init__(
            f"{memory_bytes / 1e6:.0f} MB is too small for this model with a context of {context} "
            f"tokens: at least {-(-least_bytes // 10**6)} MB; give more, or lower --context"
        )
        self.least_bytes = least_bytes


@dataclass(frozen=True)
class Plan:
    """One way to run a model."""

    name: str
    """ALL_RESIDENT, PINNED or SPECULATION."""
    placement: Placement
    choice: Choice
    memory: MemoryUse
    prediction: Prediction
    fits: bool
    """Whether the memory is enough."""
    acceptance_from: str
    """'calibration', 'assumption', or '' where nothing is drafted."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values: sizes in bytes, times in seconds."""
        place = self.placement
        return {
            "name": self.name,
            "fits": self.fits,
            **dataclasses.asdict(self.prediction),
            "acceptance_from": self.acceptance_from,
            "memory_bytes": self.memory.total,
            "memory": dataclasses.asdict(self.memory),
            "resident_bytes": self.choice.resident_bytes,
            "streamed_bytes_per_pass": self.choice.streamed_bytes,
            "piece_bytes": place.piece_bytes,
            "num_readers": place.num_readers,
            "ring_bytes": place.ring_bytes if self.choice.streamed_bytes else 0,
        }


@dataclass(frozen=True)
class Plans:
    """The plans of one model in one amount of memory."""

    plans: tuple[Plan, ...]
    """Those that work, and ``ALL_RESIDENT`` even where the memory is too small for it."""
    least_bytes: int
    """The least memory in which the model runs at all with this context."""
    all_resident_bytes: int
    """The least memory that holds all weights."""

    @property
    def best(self) -> Plan:
        """The fastest of those that fit."""
        fitting = [plan for plan in self.plans if plan.fits]
        return max(fitting, key=lambda plan: plan.prediction.tokens_per_s)


def make_plans(
    machine: Machine,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    memory_bytes: int,
    *,
    context: int,
    calibration: Calibration | None = None,
    process_bytes: int = PROCESS_BYTES,
    looks_up: bool = True,
) -> Plans:
    """Plan a model.

    Args:
        machine: as probed, with the threads that will compute.
        spec: the model.
        tensors: its matrices, by store name.
        memory_bytes: peak of the whole process.
        context: most tokens of prompt and answer.
        calibration: of this model's drafts; without one their acceptance is assumed.
        process_bytes: what the process takes besides the engine.
        looks_up: leave room for checking repetitions, where weights are not the draft.

    Raises:
        TooLittleMemoryError: for any plan.
    """
    planner = _Planner(machine, spec, tensors, memory_bytes, context, process_bytes)
    planner.num_rows = LOOKUP_ROWS if looks_up else 1
    least_bytes = planner.least_bytes()
    if memory_bytes < least_bytes:
        raise TooLittleMemoryError(memory_bytes, least_bytes, context)
    whole, all_resident_bytes = planner.all_resident()
    plans = [whole]
    if not whole.fits:
        plans += planner.pinned()
    if not whole.fits or not planner.is_fastest(whole):
        plans += planner.speculating(calibration)
    return Plans(tuple(plans), least_bytes, all_resident_bytes)


class _Planner:
    """Plans of one model in one amount of memory, under way."""

    def __init__(
        self,
        machine: Machine,
        spec: ModelSpec,
        tensors: Mapping[str, StoredTensor],
        memory_bytes: int,
        context: int,
        process_bytes: int,
    ) -> None:
        self.machine, self.spec, self.tensors = machine, spec, tensors
        self.memory_bytes, self.process_bytes = memory_bytes, process_bytes
        self.num_rows = 1
        program = compile_program(spec)
        self.matrices = multiplied(program, tensors)
        self.lookups = only_looked_up(program, tensors)
        self.total_bytes = sum(each.num_bytes for each in self.matrices)
        self.template = Placement(
            num_threads=machine.num_threads,
            direct=machine.direct,
            max_tokens=min(PREFILL_TOKENS, context),
            context=context,
        )

    def least_bytes(self) -> int:
        """Return the memory in which everything is streamed, in the way that takes least."""
        return min(self._besides(self._template(way, 1)) for way in STREAMING)

    def all_resident(self) -> tuple[Plan, int]:
        """Return the plan with all weights in memory, and the least memory for one, in bytes.

        It may not fit. Split floats lie there as plain ones if they fit so, else as they are in
        the store.
        """
        resident = {each.name: NOTHING for each in self.lookups}
        placements = [
            dataclasses.replace(
                self.template, resident=resident, max_logit_rows=num_rows, joined=joined
            )
            for joined in (True, False)
            for num_rows in dict.fromkeys((self.num_rows, 1))
        ]
        plans = [
            self._plan(ALL_RESIDENT, each, all_resident(self.matrices, self.lookups, each.joined))
            for each in placements
        ]
        chosen = next((plan for plan in plans if plan.fits), plans[-1])
        return chosen, min(plan.memory.total for plan in plans)

    def is_fastest(self, whole: Plan) -> bool:
        """Whether all weights are as fast to multiply as they can be: none is a split float."""
        has_split = any(find_format(each.format).split_from for each in self.matrices)
        return whole.placement.joined or not has_split

    def pinned(self) -> list[Plan]:
        """Return the best way to pin and stream, if there is one."""
        plans: list[Plan] = []
        for num_rows in dict.fromkeys((self.num_rows, 1)):
            for template, budget in self._budgets(num_rows):
                choice = pin(self.matrices, self.lookups, budget)
                placement = dataclasses.replace(template, resident=choice.resident)
                plans.append(self._plan(PINNED, placement, choice))
            if plans:
                break
        return _preferred(plans)

    def speculating(self, calibration: Calibration | None) -> list[Plan]:
        """Return the best way to draft with the upper planes, if there is one."""
        plans = []
        for template, budget in self._budgets(MAX_DRAFT + 1):
            losses = calibration.losses if calibration else None
            choice = split(self.matrices, self.lookups, budget, losses)
            if choice is None:
                continue
            if calibration:
                acceptance, source = calibration.expected_agreement(choice.loss), "calibration"
            else:
                acceptance, source = self._assumed_acceptance(choice), "assumption"
            placement = dataclasses.replace(template, resident=choice.resident)
            plans.append(self._plan(SPECULATION, placement, choice, acceptance, source))
        return _preferred(plans)

    def _assumed_acceptance(self, choice: Choice) -> float:
        """Return what is assumed of a draft, by the share of codes and scales that it lacks."""
        kept = whole = 0
        for each in self.matrices:
            codes = 1 + len(find_format(each.format).code_widths)
            sizes = extent_bytes(each)[:codes]
            num_planes = choice.resident[each.name]
            kept, whole = kept + sum(sizes[: 1 + min(num_planes, codes)]), whole + sum(sizes)
        has_split = any(find_format(each.format).split_from for each in self.matrices)
        return assumed_acceptance(1 - kept / whole) * (ASSUMED_OF_CODES if has_split else 1.0)

    def _plan(
        self,
        name: str,
        placement: Placement,
        choice: Choice,
        acceptance: float | None = None,
        acceptance_from: str = "",
    ) -> Plan:
        if acceptance is None:
            prediction = predict(self.machine, self.spec, self.tensors, placement)
        else:
            prediction = predict_best_draft(
                self.machine, self.spec, self.tensors, placement, acceptance
            )
        memory = memory_needed(self.spec, self.tensors, placement, process_bytes=self.process_bytes)
        fits = memory.total <= self.memory_bytes
        return Plan(name, placement, choice, memory, prediction, fits, acceptance_from)

    def _budgets(self, num_rows: int) -> Iterator[tuple[Placement, int]]:
        """Yield ways to read ahead that fit, and the memory that each leaves for weights."""
        for way in STREAMING:
            template = self._template(way, num_rows)
            left_bytes = self.memory_bytes - self._besides(template)
            if left_bytes >= 0:
                yield template, max(left_bytes - HUGE_PAGE_BYTES, 0)

    def _template(self, way: Mapping[str, int], num_rows: int) -> Placement:
        least = least_ring_bytes(self.spec, self.tensors, way["piece_bytes"])
        return dataclasses.replace(
            self.template,
            max_logit_rows=num_rows,
            num_readers=way["num_readers"],
            piece_bytes=way["piece_bytes"],
            ring_bytes=max(way["ring_bytes"], least),
        )

    def _besides(self, placement: Placement) -> int:
        return memory_besides_weights(
            self.spec, self.tensors, placement, process_bytes=self.process_bytes
        ).total


def all_resident(
    matrices: Iterable[StoredTensor], lookups: Iterable[StoredTensor], joined: bool
) -> Choice:
    """Keep all that is multiplied; see ``Placement`` for ``joined``."""
    sizes = (resident_bytes(each, len(each.planes), joined=joined) for each in matrices)
    return Choice({each.name: NOTHING for each in lookups}, sum(sizes), 0)


def assumed_acceptance(share: float) -> float:
    """Return the probability that a drafted token is kept, for a model nobody calibrated.

    Args:
        share: of the multiplied weights' bytes that the draft leaves out, 0 to 1.
    """
    shares, kept = zip(*ASSUMED_ACCEPTANCE, strict=True)
    return float(np.interp(share, shares, kept))


def _preferred(plans: list[Plan]) -> list[Plan]:
    """Return the first plan, or the fastest where that is clearly faster; none of none."""
    if not plans:
        return []
    fastest = max(plans, key=lambda plan: plan.prediction.tokens_per_s)
    is_clear = fastest.prediction.tokens_per_s > CLEARLY_FASTER * plans[0].prediction.tokens_per_s
    return [fastest if is_clear else plans[0]]
