"""Measures AdamW's second moments for a federation, once, before its first round.

A single long training forgets how its AdamW began; in a federation every site has one. So whoever
makes the base model measures the moments, on text that is nobody's secret, and they travel
with it as any of its files: in its manifest, whose hash is in the plan, and so the same at
every site. ``train.moments`` begins from them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mutirao.artifact import Manifest, open_artifact, read_manifest, write_artifact
from mutirao.federated.plan import FederatedConfig, Plan, Site
from mutirao.federated.site.trainer import LocalTrainer
from mutirao.train.config import TrainConfig
from mutirao.train.moments import MOMENTS_PATH, trained_names

_NEARLY_ONE = 1 - 1e-5
"""Decay with which AdamW's second moment is all but the plain mean over some thousand steps."""
_DAMPING = 0.3
"""Share of a tensor's mean that each of its values has added."""


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

    Every value has 0.3 of its tensor's mean added. A mean over a few thousand steps says little of
    what changes in few of them, as the row of a rare token does, and one that is far too small
    would let its value leap in every round.

    Args:
        model: an artifact of kind 'model'.
        data: text that everybody may see, an artifact of kind 'data'.
        out: folder of the new artifact of kind 'model'.
        train: training as the sites will do it: the size of a step decides how large gradients
            are, and they are clipped as there.
        num_steps: steps to take the mean over; about so many where the data is records.
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
    states = result.optimizer_state["state"]
    moments = {
        name: _mean_square(states[index]) for index, name in enumerate(trained_names(trainer.model))
    }
    with write_artifact(out, "model", recipe=dict(manifest.recipe), seed=seed) as writer:
        writer.add_parent("base", model)
        writer.add_parent("public text", data)
        for name in manifest.files:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, writer.path / name)
        path = writer.path / MOMENTS_PATH
        path.parent.mkdir(exist_ok=True)
        save_file(moments, path)
        writer.metrics.update(
            {
                **manifest.metrics,
                "second_moment_steps": result.num_steps,
                "second_moment_damping": _DAMPING,
            }
        )
    return read_manifest(out)


def _mean_square(state: dict[str, Tensor]) -> Tensor:
    """Return the mean squared gradient that an AdamW has seen, damped."""
    moment = (state["exp_avg_sq"] / (1 - _NEARLY_ONE ** float(state["step"]))).cpu()
    damped: Tensor = moment + _DAMPING * moment.mean()
    return damped
