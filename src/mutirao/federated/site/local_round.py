"""The work of one round at a site: train, take the difference, keep what the next round needs.

What is kept before an answer is made: the optimizer's state, what rounding left behind, and of
round 1 the trained adapter, with which training alone begins (``trainer.train_alone``).
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutirao.artifact import write_atomic
from mutirao.errors import ArtifactError
from mutirao.federated.arrays import write_arrays
from mutirao.federated.audit.record import Noise
from mutirao.federated.codec import (
    Payload,
    Tensors,
    encode_tensors,
    encode_with_feedback,
    start_residuals,
)
from mutirao.federated.codec.shapes import shapes_of
from mutirao.federated.plan import Plan
from mutirao.federated.site.journal import LOCAL_NAME, RunJournal
from mutirao.federated.site.trainer import (
    LocalTrainer,
    OnTokens,
    load_optimizer,
    save_optimizer,
)
from mutirao.train.accountant import Phase, PrivacyBudget, epsilon_spent


@dataclass(frozen=True)
class LocalUpdate:
    """What a round of training made."""

    tensors: dict[str, NDArray[np.float32]]
    """The change of what is trained."""
    numbers: dict[str, Any]
    """Fields of the answer."""


def base_round(run: RunJournal, round_number: int, last_counted: int | None) -> int:
    """Return the round whose optimizer and residuals a round goes on from; 0 for none.

    An update that did not count leaves no trace: the state went on without it, so what its
    rounding left behind belongs to nothing, and what was left before it is still to be sent.

    Args:
        run: what was kept of earlier rounds.
        round_number: from 1.
        last_counted: the last round in which this site's update counted, 0 for none; None
            where the coordinator does not say, and all are taken to have counted.
    """
    end = round_number if last_counted is None else min(round_number, last_counted + 1)
    return run.last_round(before=end)


def train_update(
    trainer: LocalTrainer,
    run: RunJournal,
    round_number: int,
    state: Tensors,
    on_tokens: OnTokens,
    base: int,
) -> LocalUpdate:
    """Train for one round from the agreed state.

    Args:
        trainer: model and data of the site.
        run: what was kept of earlier rounds, and where this one's is kept.
        round_number: from 1.
        state: what all sites hold.
        on_tokens: hears how far it has come.
        base: the round whose optimizer goes on; see ``base_round``.

    Raises:
        PrivacyBudgetError: the budget does not last for the round.
        RankLostError: a process that shares the work ended; the call may be made again.
        DataError: there is nothing to train on, or the loss is not finite.
    """
    plan, started = trainer.plan, time.monotonic()
    start = trainer.start_round(state, round_number)
    earlier = None
    if plan.federated.keeps_optimizer and base:
        earlier = load_optimizer(run.round_folder(base))
    numbers: dict[str, Any]
    if plan.federated.privacy is None:
        heldout_loss = trainer.heldout_loss()
        result = trainer.train_round(round_number, earlier, on_tokens)
        numbers = {
            "num_tokens": result.num_tokens,
            "num_steps": result.num_steps,
            "train_loss": result.loss,
            "heldout_loss": heldout_loss,
            "seconds": time.monotonic() - started,
        }
        optimizer_state = result.optimizer_state
    else:
        numbers, optimizer_state = _train_private(trainer, run, round_number, earlier)
    trained = trainer.get_state()
    folder = run.round_folder(round_number)
    if plan.federated.keeps_optimizer:
        save_optimizer(folder, optimizer_state)
    if round_number == 1 and plan.lora is not None and plan.federated.privacy is None:
        write_arrays(folder / LOCAL_NAME, trained)
    if trainer.site.rank is not None:
        numbers["rank"] = trainer.site.rank
    return LocalUpdate({name: trained[name] - start[name] for name in trained}, numbers)


def _train_private(
    trainer: LocalTrainer, run: RunJournal, round_number: int, earlier: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do noisy steps; numbers that no epsilon covers (losses, counts, times) are not told."""
    plan = trainer.plan
    budget = open_budget(plan, run)
    result = trainer.train_private_round(
        round_number,
        earlier,
        budget,
        lambda paid: write_atomic(run.privacy_path, paid.dump()),
    )
    numbers = {
        "num_tokens": plan.federated.tokens_per_round,
        "num_steps": result.num_steps,
        "epsilon": budget.spent(),
        "seconds": 0.0,
    }
    return numbers, result.optimizer_state


def open_budget(plan: Plan, run: RunJournal) -> PrivacyBudget:
    """Return a run's privacy budget as it stands at this site.

    Raises:
        ArtifactError: its ledger is damaged.
    """
    privacy = plan.federated.privacy
    assert privacy is not None
    try:
        budget = PrivacyBudget.restore(run.privacy_path.read_bytes())
    except FileNotFoundError:
        if run.last_round():
            raise ArtifactError(
                f"the privacy ledger {run.privacy_path} is missing; without it nothing more may "
                "be trained on these units: restore it from a copy"
            ) from None
        return PrivacyBudget(privacy.epsilon, privacy.delta)
    return PrivacyBudget(privacy.epsilon, privacy.delta, budget.phases)


def noise_after(plan: Plan, run: RunJournal, *, more_steps: int) -> Noise | None:
    """Return the privacy of a run after so many more steps, for the policy and the audit log."""
    privacy = plan.federated.privacy
    if privacy is None:
        return None
    training = privacy.training
    phases = list(open_budget(plan, run).phases)
    if more_steps:
        phases.append(
            Phase(
                sampling_probability=training.sampling_probability,
                noise_multiplier=training.noise_multiplier,
                num_steps=more_steps,
            )
        )
    epsilon = epsilon_spent(phases, privacy.delta)
    return Noise(
        noise_multiplier=training.noise_multiplier,
        clip_norm=training.max_unit_norm,
        epsilon=min(epsilon, 1e9),  # no noise: infinite, which JSON has no word for
        delta=privacy.delta,
    )


def encode_update(
    trainer: LocalTrainer, run: RunJournal, round_number: int, update: Tensors, base: int
) -> dict[str, Payload]:
    """Return an update as it travels, after what rounding left behind was kept.

    What rounding left behind in round ``base`` goes out with it; see ``base_round``.

    Raises:
        UpdateError: a value is not finite; nothing may leave.
    """
    federated = trainer.plan.federated
    text = f"{trainer.plan.seed}/{trainer.site.name}/{round_number}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    if not federated.error_feedback:
        return encode_tensors(update, federated.upload, seed=seed)
    residuals = run.read_residuals(base) if base else None
    payloads, left = encode_with_feedback(
        update, residuals or start_residuals(shapes_of(update)), federated.upload, seed=seed
    )
    run.write_residuals(round_number, left)
    return payloads
