"""What stays in memory: never more than the budget, never much less, spread and chosen well."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from small_stores import SPECS, mixed_formats

from mutirao.inference.architecture.model_spec import matrix_shapes
from mutirao.inference.architecture.program import compile_program
from mutirao.inference.native.backend import ALL_PLANES, NOTHING, Placement, resident_planes
from mutirao.inference.planning.memory_use import resident_bytes
from mutirao.inference.planning.placement import (
    extent_bytes,
    multiplied,
    only_looked_up,
    pin,
    split,
)
from mutirao.inference.store.plane_formats import FORMATS
from mutirao.inference.store.store_index import plan_layout

LLAMA = dataclasses.replace(SPECS["llama"], num_layers=6)


def matrices_of(spec, formats):
    """The tensors of a model: those that are multiplied, and those of which rows are read."""
    if isinstance(formats, str):
        formats = dict.fromkeys(matrix_shapes(spec), formats)
    tensors = plan_layout(spec, formats).tensors
    program = compile_program(spec)
    return multiplied(program, tensors), only_looked_up(program, tensors)


CASES = {
    "mixed": matrices_of(LLAMA, mixed_formats(LLAMA)),
    "Q4_K": matrices_of(LLAMA, "Q4_K"),
    "one matrix float": matrices_of(LLAMA, mixed_formats(LLAMA) | {"blk.0.attn_q": "F32"}),
    "F16": matrices_of(LLAMA, "F16"),
    "tied": matrices_of(SPECS["gemma3"], mixed_formats(SPECS["gemma3"])),
    "opt": matrices_of(SPECS["opt"], "Q8_0"),
}


def total_of(matrices):
    return sum(sum(extent_bytes(each)) for each in matrices)


def budgets_of(matrices, num=60):
    total = total_of(matrices)
    some = [total * index // num for index in range(num + 1)]
    return [*some, 1, total - 1, total + 1, 10 * total]


def kept_bytes(choice, tensors):
    placement = Placement(choice.resident)
    return sum(resident_bytes(each, resident_planes(each, placement)) for each in tensors)


def test_what_is_multiplied_and_what_is_looked_up():
    matrices, lookups = CASES["mixed"]
    assert [each.name for each in lookups] == ["token_embd"]
    assert matrices[0].name == "blk.0.attn_q"
    assert matrices[-1].name == "output"
    assert len(matrices) == 7 * 6 + 1
    matrices, lookups = CASES["tied"]
    assert not lookups
    assert matrices[-1].name == "token_embd"
    assert [each.name for each in CASES["opt"][1]] == ["position_embd"]


def test_extents_are_those_of_the_store():
    for matrices, _ in CASES.values():
        for each in matrices:
            sizes = extent_bytes(each)
            scales = [0] if each.scales is None else []
            assert list(sizes) == scales + [extent.num_bytes for extent in each.extents]


@pytest.mark.parametrize("case", CASES)
def test_pinning_fills_the_budget_and_no_more(case):
    matrices, lookups = CASES[case]
    total = total_of(matrices)
    for budget in budgets_of(matrices):
        choice = pin(matrices, lookups, budget)
        assert choice.resident_bytes + choice.streamed_bytes == total
        assert choice.resident_bytes <= budget
        assert kept_bytes(choice, [*matrices, *lookups]) == choice.resident_bytes
        assert choice.loss == 0
        if budget >= total:
            assert choice.streamed_bytes == 0
            assert set(choice.resident) == {each.name for each in lookups}
        # Nothing that is streamed in whole or in part would have fitted, not even its next part.
        spare = budget - choice.resident_bytes
        for each in matrices:
            planes = resident_planes(each, Placement(choice.resident))
            if planes < len(each.planes):
                sizes = extent_bytes(each)
                is_float = FORMATS[each.format].is_float
                assert spare < (sum(sizes) if is_float else sizes[planes + 1])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_what_is_streamed_is_spread_evenly(share):
    """Up to any matrix, the streamed bytes are about their share of all bytes."""
    for case in ("mixed", "Q4_K", "F16"):
        matrices, lookups = CASES[case]
        total = total_of(matrices)
        choice = pin(matrices, lookups, int(total * share))
        largest = max(sum(extent_bytes(each)) for each in matrices)
        so_far = streamed = 0
        for each in matrices:
            size = sum(extent_bytes(each))
            planes = resident_planes(each, Placement(choice.resident))
            so_far += size
            streamed += size - resident_bytes(each, planes)
            assert abs(streamed - so_far * choice.streamed_bytes / total) <= 2 * largest


def test_lookups_are_never_resident():
    for case in ("mixed", "opt"):
        matrices, lookups = CASES[case]
        for budget in (0, total_of(matrices) // 2, 10 * total_of(matrices)):
            for choice in (pin(matrices, lookups, budget), split(matrices, lookups, budget)):
                if choice is not None:
                    assert all(choice.resident[each.name] == NOTHING for each in lookups)


@pytest.mark.parametrize("case", ["mixed", "Q4_K", "tied", "opt"])
def test_drafts_keep_the_upper_planes_of_everything(case):
    matrices, lookups = CASES[case]
    total = total_of(matrices)
    least = sum(sum(extent_bytes(each)[:2]) for each in matrices)
    before = None
    for budget in sorted(budgets_of(matrices)):
        choice = split(matrices, lookups, budget)
        assert (choice is None) == (budget < least)
        if choice is None:
            continue
        assert choice.resident_bytes + choice.streamed_bytes == total
        assert choice.resident_bytes <= budget
        assert kept_bytes(choice, matrices) == choice.resident_bytes
        planes = {each.name: resident_planes(each, Placement(choice.resident)) for each in matrices}
        assert min(planes.values()) >= 1
        assert (choice.loss == 0) == (choice.streamed_bytes == 0) == (budget >= total)
        if budget >= total:
            assert {choice.resident[each.name] for each in matrices} == {ALL_PLANES}
        if before is not None:
            # More memory: nothing is dropped that was kept, and the draft is no worse.
            assert all(planes[name] >= before[0][name] for name in planes)
            assert choice.loss <= before[1]
            assert choice.resident_bytes >= before[2]
        before = (planes, choice.loss, choice.resident_bytes)


def test_floats_make_no_draft():
    matrices, lookups = CASES["F16"]
    assert split(matrices, lookups, total_of(matrices) - 1) is None
    assert split(matrices, lookups, total_of(matrices)).streamed_bytes == 0
    matrices, lookups = CASES["one matrix float"]
    choice = split(matrices, lookups, total_of(matrices) * 3 // 4)
    assert choice.resident["blk.0.attn_q"] == ALL_PLANES


def random_losses(matrices, rng):
    """Losses that grow as planes fall; not in proportion to anything."""
    losses = {}
    for each in matrices:
        steps = list(itertools.accumulate(rng.expovariate(1) for _ in each.planes[1:]))
        losses[each.name] = dict(zip(range(len(each.planes) - 1, 0, -1), steps, strict=True))
    return losses


def test_no_other_draft_of_as_many_bytes_is_better():
    """Against all choices, for three matrices and the losses of many calibrations."""
    rng = random.Random(0)
    matrices, _ = matrices_of(dataclasses.replace(LLAMA, num_layers=1), mixed_formats(LLAMA))
    some = [matrices[0], matrices[3], matrices[5]]
    assert len({len(each.planes) for each in some}) > 1
    for _ in range(30):
        losses = random_losses(some, rng)
        options = [
            [
                (sum(extent_bytes(each)[: keeps + 1]), losses[each.name].get(keeps, 0.0))
                for keeps in range(1, len(each.planes) + 1)
            ]
            for each in some
        ]
        every = [
            (sum(size for size, _ in picked), sum(loss for _, loss in picked))
            for picked in itertools.product(*options)
        ]
        for budget in budgets_of(some, 15):
            choice = split(some, [], budget, losses)
            if choice is None:
                assert min(size for size, _ in every) > budget
                continue
            best = min(loss for size, loss in every if size <= choice.resident_bytes)
            assert choice.loss == pytest.approx(best, abs=1e-9)


def test_losses_decide_what_is_dropped():
    matrices, lookups = CASES["Q4_K"]
    losses = {each.name: {2: 1e-6, 1: 2e-6} for each in matrices}
    losses["blk.3.ffn_up"] = {2: 1e6, 1: 2e6}
    budget = total_of(matrices) * 2 // 3
    choice = split(matrices, lookups, budget, losses)
    assert choice.resident["blk.3.ffn_up"] == ALL_PLANES
    assert sorted(choice.resident[each.name] for each in matrices)[0] == 1
    assert split(matrices, lookups, budget).resident["blk.3.ffn_up"] != ALL_PLANES
