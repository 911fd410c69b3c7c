"""The coordinator's adapter: the agreed start, and the result with its lineage.

The start is made once, with the model in memory; the result only replaces the trained
tensors in it, so the coordinator needs no model and no PyTorch while rounds run.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from mutirao.artifact import Manifest, open_artifact, read_manifest, write_artifact
from mutirao.errors import ShapeError, explain_disk_errors
from mutirao.federated.journal import CoordinatorJournal
from mutirao.federated.plan import FederatedConfig, Plan
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig

START_FOLDER = "start"
WEIGHTS_NAME = "adapter_model.safetensors"


def write_start(
    model: Path,
    work: Path,
    federated: FederatedConfig,
    lora: LoRAConfig,
    train: TrainConfig,
    seed: int,
) -> Plan:
    """Make the adapter that every site starts from, and the plan that names it.

    Args:
        model: the base model, an artifact of kind 'model'.
        work: the coordinator's folder; gets the start as round 0.
        federated: rounds and aggregation.
        lora: the adapter.
        train: local training.
        seed: of the adapter's start.
    """
    from mutirao.formats.huggingface import load_causal_lm
    from mutirao.tune.lora import (
        adapter_state,
        attach_lora,
        frozen_sha256,
        save_adapter,
        state_to_vector,
    )

    manifest = open_artifact(model, "model")
    loaded, _ = load_causal_lm(model)
    peft_model = attach_lora(loaded, lora, seed=seed)
    start = work / START_FOLDER
    with explain_disk_errors(start):
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir(parents=True)
        save_adapter(peft_model, start, base_model=str(model))
    vector = state_to_vector(adapter_state(peft_model))
    CoordinatorJournal(work).write_start(vector)
    return Plan(
        federated=federated,
        lora=lora,
        train=train,
        seed=seed,
        model_sha256=manifest.sha256,
        frozen_sha256=frozen_sha256(peft_model),
    )


def write_start_apart(
    model: Path,
    work: Path,
    federated: FederatedConfig,
    lora: LoRAConfig,
    train: TrainConfig,
    seed: int,
) -> Plan:
    """Do ``write_start`` in a process of its own, which gives the model's memory back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(write_start, model, work, federated, lora, train, seed).result()


def write_result(
    work: Path,
    out: Path,
    plan: Plan,
    *,
    model: Path,
    data: Mapping[str, Path],
    extra_files: Mapping[str, Path],
    metrics: Mapping[str, JsonValue],
) -> Manifest:
    """Write the state after the last round as a PEFT directory with its lineage.

    Args:
        work: the coordinator's folder.
        out: folder of the new artifact of kind 'adapter'.
        plan: what was agreed.
        model: the base model.
        data: each site's data artifact, by site name.
        extra_files: files to keep beside the adapter, by their name there.
        metrics: measured numbers.

    Raises:
        ArtifactError: the journal is damaged.
    """
    journal = CoordinatorJournal(work)
    state = journal.load_state(plan.federated.num_rounds)["global"]
    recipe: dict[str, JsonValue] = {"plan": plan.model_dump(mode="json"), "sites": [*sorted(data)]}
    with write_artifact(out, "adapter", recipe=recipe, seed=plan.seed) as writer:
        writer.add_parent("base", model)
        for name, folder in sorted(data.items()):
            writer.add_parent(f"data of {name}", folder)
        shutil.copytree(work / START_FOLDER, writer.path, dirs_exist_ok=True)
        _replace_trained(writer.path / WEIGHTS_NAME, state, freeze_a=plan.lora.freeze_a)
        for name, source in extra_files.items():
            target = writer.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        writer.metrics.update(metrics)
    return read_manifest(out)


def _replace_trained(path: Path, state: NDArray[np.float32], *, freeze_a: bool) -> None:
    """Put the state's values in place of the trained tensors of a PEFT weight file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(str(path))
    trained = sorted(name for name in tensors if not (freeze_a and "lora_A" in name))
    if state.size != sum(tensors[name].size for name in trained):
        raise ShapeError(f"the state has {state.size} values, the adapter others")
    start = 0
    for name in trained:
        size = tensors[name].size
        piece = state[start : start + size].reshape(tensors[name].shape)
        tensors[name] = np.ascontiguousarray(piece, dtype=np.float32)
        start += size
    save_file(tensors, str(path), metadata={"format": "pt"})
