"""Choose what stays in memory: which matrices, and which of their bit planes.

Two kinds of placement fit a model into less memory than it has. *Pinned*: matrices stay whole
while there is room, the rest is streamed on every pass; for a cyclic scan no choice reads less,
so the streamed ones are simply spread evenly between the pinned ones, and reading overlaps
computing. *Split*: the scales and upper planes of every matrix stay, as a draft model, and of
the lower planes those leave memory that cost the draft least for their bytes; their losses come
from a calibration (``calibration.py``), or, without one, from how coarse a plane makes a code.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mutirao.inference.architecture.program import Embed, MatMul, Program
from mutirao.inference.native.backend import ALL_PLANES, NOTHING
from mutirao.inference.store.planes import (
    find_format,
    num_panels,
    plane_panel_bytes,
    scales_panel_bytes,
)

if TYPE_CHECKING:
    from mutirao.inference.store.store_index import StoredTensor

Losses = Mapping[str, Mapping[int, float]]
"""By matrix and number of resident planes: how much it harms the draft; additive."""


@dataclass(frozen=True)
class Choice:
    """What is resident, and what that makes."""

    resident: dict[str, int]
    """By matrix: planes in memory with the scales, ALL_PLANES or NOTHING."""
    resident_bytes: int
    streamed_bytes: int
    """Read on every full pass, in bytes."""
    loss: float = 0.0
    """Sum of the losses of what a draft leaves out; 0 where there is no draft."""


def multiplied(program: Program, tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """Return the matrices that are multiplied, in order of their first use."""
    names = dict.fromkeys(op.weight for op in program.ops if isinstance(op, MatMul))
    return [tensors[name] for name in names]


def only_looked_up(program: Program, tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """Return the matrices of which only rows are looked up."""
    names = dict.fromkeys(op.weight for op in program.ops if isinstance(op, Embed))
    used = {tensor.name for tensor in multiplied(program, tensors)}
    return [tensors[name] for name in names if name not in used]


def extent_bytes(tensor: StoredTensor) -> tuple[int, ...]:
    """Return the bytes of a matrix's scales, then of its planes."""
    panels = num_panels(tensor.num_rows)
    scales = scales_panel_bytes(tensor.format, tensor.num_columns)
    planes = plane_panel_bytes(tensor.format, tensor.num_columns)
    return tuple(panels * size for size in (scales, *planes))


def pin(
    matrices: Iterable[StoredTensor], lookups: Iterable[StoredTensor], budget_bytes: int
) -> Choice:
    """Pin what fits; stream the rest, spread evenly, the last one in part.

    Args:
        matrices: those that are multiplied, in order of use.
        lookups: those of which rows are looked up; never resident.
        budget_bytes: for resident weights.
    """
    sizes = {each: sum(extent_bytes(each)) for each in matrices}
    total = sum(sizes.values())
    missing = max(0, total - budget_bytes)
    resident = {each.name: NOTHING for each in lookups}
    # Error diffusion: each matrix adds its share of what is missing, and one is streamed
    # whenever a whole one has come together.
    owed, streamed = 0.0, []
    for each, size in sizes.items():
        owed += size * missing / max(total, 1)
        if owed >= size / 2 and missing:
            streamed.append(each)
            owed -= size
    chosen = sum(sizes[each] for each in streamed)
    for each in sorted(sizes, key=lambda tensor: sizes[tensor]):
        if chosen >= missing:
            break
        if each not in streamed:
            streamed.append(each)
            chosen += sizes[each]
    resident |= {each.name: NOTHING for each in streamed}
    spare = chosen - missing
    for each in sorted(streamed, key=lambda tensor: sizes[tensor]):
        planes = _planes_that_fit(each, spare)
        if planes > NOTHING:
            kept = sum(extent_bytes(each)[: planes + 1])
            resident[each.name] = planes
            spare -= kept
            chosen -= kept
    return Choice(resident, total - chosen, chosen)


def _planes_that_fit(tensor: StoredTensor, budget_bytes: int) -> int:
    sizes = extent_bytes(tensor)
    if find_format(tensor.format).is_float:
        return NOTHING if sum(sizes) > budget_bytes else len(tensor.planes)
    planes = NOTHING
    while planes < len(tensor.planes) and sum(sizes[: planes + 2]) <= budget_bytes:
        planes += 1
    return planes


def split(
    matrices: Iterable[StoredTensor],
    lookups: Iterable[StoredTensor],
    budget_bytes: int,
    losses: Losses | None = None,
) -> Choice | None:
    """Keep the upper planes of everything; drop lower ones where that costs the draft least.

    Drafts do not read the rests of split floats, so these leave memory first.

    Args:
        matrices: those that are multiplied.
        lookups: those of which rows are looked up; never resident.
        budget_bytes: for resident weights.
        losses: of a calibration; without one, a plane's share of a code's range, squared.

    Returns:
        None where not even one plane of each matrix fits, or a matrix has no planes to drop
        (the float formats) and something has to leave memory.
    """
    matrices = list(matrices)
    kept = {each.name: len(each.planes) for each in matrices}
    resident_bytes = sum(sum(extent_bytes(each)) for each in matrices)
    total, loss = resident_bytes, sum(_least_loss(each, losses) for each in matrices)
    steps = [(step, each) for each in matrices for step in _steps(each, losses)]
    heap = [
        (step.loss / step.freed, step.order, step.keeps, i) for i, (step, _) in enumerate(steps)
    ]
    heapq.heapify(heap)
    while resident_bytes > budget_bytes and heap:
        _, _, keeps, index = heapq.heappop(heap)
        step, tensor = steps[index]
        kept[tensor.name] = keeps
        resident_bytes -= step.freed
        loss += step.loss
    if resident_bytes > budget_bytes:
        return None
    resident = {each.name: NOTHING for each in lookups}
    resident |= {
        each.name: kept[each.name] if kept[each.name] < len(each.planes) else ALL_PLANES
        for each in matrices
    }
    return Choice(resident, resident_bytes, total - resident_bytes, loss)


@dataclass(frozen=True)
class _Step:
    """Dropping planes of one matrix down to ``keeps``, from the step before."""

    keeps: int
    freed: int
    loss: float
    order: int


def _steps(tensor: StoredTensor, losses: Losses | None) -> list[_Step]:
    """Return a matrix's ways to shrink, each costlier per byte than the one before it.

    Steps that would cost less per byte than an earlier one are joined with it, so that taking
    the cheapest step of all matrices is always possible (the lower convex hull).
    """
    form = find_format(tensor.format)
    if form.is_float:
        return []
    sizes = extent_bytes(tensor)
    points = [(0, _least_loss(tensor, losses), len(tensor.planes))]
    for keeps in range(len(tensor.planes) - 1, 0, -1):
        freed = sum(sizes[keeps + 1 :])
        points.append((freed, _loss(tensor, keeps, losses), keeps))
    hull: list[tuple[int, float, int]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [
        _Step(after[2], after[0] - before[0], max(after[1] - before[1], 0.0), order)
        for order, (before, after) in enumerate(pairwise(hull))
    ]


def _slope(before: tuple[int, float, int], after: tuple[int, float, int]) -> float:
    return (after[1] - before[1]) / max(after[0] - before[0], 1)


def _least_loss(tensor: StoredTensor, losses: Losses | None) -> float:
    """Return the loss of a whole matrix: none, but drafts read only codes of split floats."""
    form = find_format(tensor.format)
    return _loss(tensor, len(form.code_widths), losses) if form.split_from else 0.0


def _loss(tensor: StoredTensor, keeps: int, losses: Losses | None) -> float:
    if losses is not None and tensor.name in losses:
        return float(losses[tensor.name].get(keeps, float("inf")))
    form = find_format(tensor.format)
    dropped = form.bits - sum(form.code_widths[:keeps])
    # Of split floats even all codes leave something out: where in its cell a number lies.
    spread = float((1 << dropped) ** 2 - (0 if form.split_from else 1)) / 12
    return spread / float(1 << 2 * form.bits) * tensor.num_rows * tensor.num_columns
