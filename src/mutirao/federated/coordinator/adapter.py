"""The coordinator's start and result: the trained tensors before the first round, and after the
last, with their lineage.

The start is made once, with the model in memory; the result of an adapter only replaces the
trained tensors in it, so the coordinator needs no model and no PyTorch while rounds run. With
full weights the start is the base model's weights, and the result a model of the same form.
The result is what the sites hold, to the bit.
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
from mutirao.environment import silence
from mutirao.errors import InputError, ShapeError, explain_disk_errors
from mutirao.federated.aggregation.low_rank_rounds import LOW_RANK_RULES
from mutirao.federated.coordinator.journal import CoordinatorJournal
from mutirao.federated.coordinator.low_rank_result import replace_by_sum
from mutirao.federated.coordinator.next_low_rank import write_low_rank_start
from mutirao.federated.coordinator.state_files import StateFile
from mutirao.federated.plan import FederatedConfig, Plan
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig

START_FOLDER = "start"
WEIGHTS_NAME = "adapter_model.safetensors"
_ADAPTER_NAME = ".default"
"""PEFT puts the adapter's name into a tensor's name in memory, and leaves it out in files."""


def write_start(
    model: Path,
    work: Path,
    federated: FederatedConfig,
    lora: LoRAConfig | None,
    train: TrainConfig,
    seed: int,
) -> Plan:
    """Make the state that every site starts from, and the plan that names it.

    Args:
        model: the base model, an artifact of kind 'model'.
        work: the coordinator's folder; gets the start as round 0.
        federated: rounds and aggregation.
        lora: the adapter; None trains all weights.
        train: local training.
        seed: of the adapter's start.

    Raises:
        InputError: the plan needs second moments, and the model has none.
    """
    from mutirao.train.moments import find_moments

    manifest = open_artifact(model, "model")
    if federated.second_moments and lora is None:
        find_moments(model)
    plan = Plan(
        federated=federated, lora=lora, train=train, seed=seed, model_sha256=manifest.sha256
    )
    tensors, frozen_sha256 = _full_start(model) if lora is None else _start(model, work, plan, lora)
    journal = CoordinatorJournal(work)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if federated.aggregation in LOW_RANK_RULES:
        write_low_rank_start(journal, federated, shapes, tensors.__getitem__)
    else:
        journal.write_start(shapes, lambda name: tensors[name], federated.outer)
    return plan.model_copy(update={"frozen_sha256": frozen_sha256})


def _start(
    model: Path, work: Path, plan: Plan, lora: LoRAConfig
) -> tuple[dict[str, NDArray[np.float32]], str]:
    """Make the adapter; keep it as PEFT does, for the result."""
    from mutirao.formats.huggingface import load_causal_lm
    from mutirao.tune.lora import adapter_state, attach_lora, frozen_sha256, save_adapter

    loaded, _ = load_causal_lm(model)
    peft_model = attach_lora(loaded, lora, seed=plan.seed)
    start = work / START_FOLDER
    with explain_disk_errors(start):
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir(parents=True)
        save_adapter(peft_model, start, base_model=str(model))
    tensors = {name: tensor.numpy() for name, tensor in adapter_state(peft_model).items()}
    return tensors, frozen_sha256(peft_model)


def _full_start(model: Path) -> tuple[dict[str, NDArray[np.float32]], str]:
    from mutirao.formats.huggingface import load_causal_lm
    from mutirao.tune.lora import adapter_state

    loaded, _ = load_causal_lm(model, dtype="float32")
    loaded.requires_grad_(True)
    return {name: tensor.numpy() for name, tensor in adapter_state(loaded).items()}, ""


def write_start_apart(
    model: Path,
    work: Path,
    federated: FederatedConfig,
    lora: LoRAConfig | None,
    train: TrainConfig,
    seed: int,
) -> Plan:
    """Do ``write_start`` in a process of its own, which gives the model's memory back."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=silence) as pool:
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
    """Write the state after the last round as an artifact with its lineage.

    Args:
        work: the coordinator's folder.
        out: folder of the new artifact: of kind 'adapter', or 'model' where all weights were
            trained.
        plan: what was agreed.
        model: the base model.
        data: each site's data artifact, by site name; of those that are at hand.
        extra_files: files to keep beside the result, by their name there.
        metrics: measured numbers.

    Raises:
        ArtifactError: the journal is damaged.
    """
    state = CoordinatorJournal(work).open_state(plan.federated.num_rounds, "replica")
    recipe: dict[str, JsonValue] = {"plan": plan.model_dump(mode="json"), "sites": [*sorted(data)]}
    kind = "model" if plan.lora is None else "adapter"
    with write_artifact(out, kind, recipe=recipe, seed=plan.seed) as writer:
        writer.add_parent("base", model)
        for name, folder in sorted(data.items()):
            writer.add_parent(f"data of {name}", folder)
        if plan.lora is None:
            _write_model(writer.path, model, state)
        else:
            shutil.copytree(work / START_FOLDER, writer.path, dirs_exist_ok=True)
            if plan.federated.aggregation in LOW_RANK_RULES:
                replace_by_sum(writer.path, WEIGHTS_NAME, state, plan.lora)
            else:
                _replace_trained(writer.path / WEIGHTS_NAME, state)
        for name, source in extra_files.items():
            target = writer.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        writer.metrics.update(metrics)
    return read_manifest(out)


def _replace_trained(path: Path, state: StateFile) -> None:
    """Put the state's values in place of the trained tensors of a PEFT weight file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(str(path))
    for name in state.names:
        in_file = name.replace(_ADAPTER_NAME, "")
        values = state.read(name)
        if in_file not in tensors or tensors[in_file].shape != values.shape:
            raise ShapeError(
                f"the state has tensor {name!r} of shape {values.shape}, which the adapter in "
                f"{path} has not; write the start anew"
            )
        tensors[in_file] = values
    save_file(tensors, str(path), metadata={"format": "pt"})


def _write_model(folder: Path, base: Path, state: StateFile) -> None:
    """Write the base model with the state's weights in place of its own, in bfloat16."""
    import torch

    from mutirao.formats.huggingface import load_causal_lm, save_causal_lm

    loaded, tokenizer = load_causal_lm(base)
    parameters = dict(loaded.named_parameters())
    if parameters.keys() != {*state.names}:
        odd = sorted(parameters.keys() ^ {*state.names})[0]
        raise InputError(f"the state and the model {base} differ in their tensors: {odd!r}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(state.read(name)))
    save_causal_lm(loaded, tokenizer, folder, base_model=str(base))
