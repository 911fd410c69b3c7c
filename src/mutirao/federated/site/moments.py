"""AdamW's second moments beside the base model: where each site's AdamW begins.

AdamW divides each step by the root of the mean squared gradient, the second moment. One that
begins from zero knows no more than the steps it has seen, and in steps of a few hundred tokens
most of a vocabulary has not been seen: the first gradient of a rare token then moves its row by
many times the learning rate. A single long training forgets that beginning; in a federation
every site has one. So whoever makes the base model measures the moments once, on text that is
nobody's secret, and they travel with it as any of its files: in its manifest, whose hash is in
the plan, and so the same at every site.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mutirao.artifact import Manifest, open_artifact, read_manifest, write_artifact
from mutirao.errors import DataError, InputError
from mutirao.federated.plan import MOMENTS_PATH, FederatedConfig, Plan, Site
from mutirao.federated.site.trainer import LocalTrainer
from mutirao.train.config import TrainConfig
from mutirao.train.loop import make_optimizer

_NEARLY_ONE = 1 - 1e-5
"""Decay with which AdamW's second moment is all but the plain mean over some thousand steps."""
_SETTLED = 40
"""Bias corrections are for moments of so many times the memory, where they are 1 to the bit."""


def measure_moments(
    model: Path,
    data: Path,
    out: Path,
    train: TrainConfig,
    *,
    num_steps: int,
    seed: int = 0,
    on_tokens: Callable[[int], None] | None = None,
) -> Manifest:
    """Write a copy of a model with its second moments: the mean squared gradient of a step.

    Args:
        model: an artifact of kind 'model'.
        data: text that everybody may see, an artifact of kind 'data'.
        out: folder of the new artifact of kind 'model'.
        train: training as the sites will do it: the size of a step decides how large gradients
            are, and they are clipped as there.
        num_steps: steps to take the mean over; fewer where records end before.
        seed: of the order of the text.
        on_tokens: hears how many tokens have been seen.

    Raises:
        ArtifactError: model or data is damaged.
        DataError: there is no text to train on.
    """
    manifest = open_artifact(model, "model")
    # No step but the measured mean: a rate that no weight can feel.
    still = train.model_copy(
        update={"learning_rate": 1e-30, "warmup_tokens": 0, "beta2": _NEARLY_ONE}
    )
    federated = FederatedConfig(num_rounds=1, tokens_per_round=num_steps * train.tokens_per_step)
    plan = Plan(
        federated=federated, lora=None, train=still, seed=seed, model_sha256=manifest.sha256
    )
    trainer = LocalTrainer(Site(name="public", model=model, data=data, work=out), plan)
    result = trainer.train_round(1, None, on_tokens or (lambda _: None))
    if result.num_steps == 0:
        raise DataError(f"{data} has no text to take gradients of")
    states = result.optimizer_state["state"]
    correction = 1 - _NEARLY_ONE**result.num_steps
    moments = {
        name: (states[index]["exp_avg_sq"] / correction).cpu()
        for index, name in enumerate(_trained_names(trainer.model))
    }
    with write_artifact(out, "model", recipe=dict(manifest.recipe), seed=seed) as writer:
        writer.add_parent("base", model)
        for name in manifest.files:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, writer.path / name)
        path = writer.path / MOMENTS_PATH
        path.parent.mkdir(exist_ok=True)
        save_file(moments, path)
        writer.metrics.update({**manifest.metrics, "second_moment_steps": result.num_steps})
    return read_manifest(out)


def start_optimizer(
    model: nn.Module, folder: Path, config: TrainConfig, *, fused: bool = False
) -> dict[str, Any]:
    """Return the state of an AdamW that has a base model's second moments, and no momentum.

    The moments count as settled: no bias correction makes the first steps larger, and ``beta2``
    alone says how fast gradients of its own replace them.

    Args:
        model: what is trained.
        folder: the base model's.
        config: of the training to come.
        fused: as the AdamW is that will go on from the state.

    Raises:
        InputError: the moments are not there, or not those of the model.
    """
    path = find_moments(folder)
    try:
        moments = load_file(path)
    except SafetensorError:
        raise InputError(f"{path} is damaged; measure the second moments anew") from None
    parameters, optimizer = make_optimizer(model, config, fused=fused)
    names = _trained_names(model)
    for name, parameter in zip(names, parameters, strict=True):
        _check(path, name, moments.get(name), parameter)
    step = float(math.ceil(_SETTLED / (1 - max(config.beta1, config.beta2))))
    state = optimizer.state_dict()
    state["state"] = {
        index: {
            "step": torch.tensor(step),
            "exp_avg": torch.zeros_like(moments[name]),
            "exp_avg_sq": moments[name],
        }
        for index, name in enumerate(names)
    }
    return state


def find_moments(model: Path) -> Path:
    """Return where a model has its second moments.

    Raises:
        InputError: it has none.
    """
    path = model / MOMENTS_PATH
    if not path.exists():
        raise InputError(
            f"{model} has no second moments, which federated.second_moments needs; make them "
            "with `mutirao federate moments`"
        )
    return path


def _trained_names(model: nn.Module) -> list[str]:
    """Return the names of what is trained, in AdamW's order."""
    return [name for name, each in model.named_parameters() if each.requires_grad]


def _check(path: Path, name: str, moment: Tensor | None, parameter: Tensor) -> None:
    if moment is None or moment.shape != parameter.shape or moment.dtype != torch.float32:
        raise InputError(f"{path} is not of this model (tensor {name!r}); measure it anew")
    if not (torch.isfinite(moment).all() and (moment >= 0).all()):
        raise InputError(f"{path} has no mean square in tensor {name!r}; measure it anew")
