"""The federation's plan in a run: made once, and kept as long as what it rests on stays.

With the plan the coordinator's journal is kept, so that an interrupted federation goes on
from its last finished round; when model, data or settings change, both are thrown away.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from pydantic import JsonValue

from mutirao.artifact import read_manifest, write_atomic
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.plan import Plan

if TYPE_CHECKING:
    from mutirao.demo.road import Road


def training_settings(road: Road) -> dict[str, JsonValue]:
    """Return what the result of training depends on besides model and data."""
    recipe = road.recipe
    # Which port was used says nothing about the result.
    federated = recipe.federated.model_dump(mode="json", exclude={"port"})
    return {
        "federated": federated,
        "lora": recipe.lora.model_dump(mode="json"),
        "train": recipe.train.model_dump(mode="json"),
        "seed": recipe.seed,
    }


def load_plan(road: Road) -> Plan:
    """Return the federation's plan, made anew when what it depends on has changed."""
    from mutirao.federated.coordinator.adapter import write_start_apart

    data = {name: read_manifest(road.run / "data" / name).sha256 for name in road.silos}
    model = road.run / "model"
    key: dict[str, JsonValue] = {"settings": training_settings(road), "data": dict(data)}
    key["model"] = read_manifest(model).sha256
    if (kept := _kept_plan(road, key)) is not None:
        return kept.model_copy(update={"federated": road.recipe.federated})
    if road.work.exists():
        shutil.rmtree(road.work)
    recipe = road.recipe
    plan = write_start_apart(
        model, road.work / "coordinator", recipe.federated, recipe.lora, recipe.train, recipe.seed
    )
    write_atomic(road.work / "plan.json", plan.model_dump_json(indent=1))
    write_atomic(road.work / "plan-key.json", json.dumps(key))
    return plan


def _kept_plan(road: Road, key: dict[str, JsonValue]) -> Plan | None:
    """Return the plan of an earlier call; None where it is another, damaged, or lost its start."""
    try:
        if json.loads((road.work / "plan-key.json").read_bytes()) != key:
            return None
        plan = Plan.model_validate_json((road.work / "plan.json").read_bytes())
    except (OSError, ValueError):
        return None
    return plan if CoordinatorJournal(road.work / "coordinator").has_start() else None
