"""One small training loop: AdamW over micro-batches of whole examples.

An example is one record, never packed with another, so that nothing is learned across
records and training sees text as evaluation does; batches group examples of similar
length instead. The learning rate follows the position in the whole run, not in the call,
so that a run cut into rounds follows one schedule. It leaves out data parallelism.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.data.tokenization import Example
from mutirao.errors import DataError
from mutirao.models.batching import group_by_length, pad_sequences
from mutirao.models.causal import masked_loss_sum
from mutirao.train.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What one call of the loop did."""

    loss: float
    """Mean training loss over the learned tokens, in nats per token."""
    num_tokens: int
    """Tokens that passed through the model, padding not counted."""
    num_steps: int
    """Optimizer steps."""
    optimizer_state: dict[str, Any]
    """State of AdamW, to go on from."""


def learning_rate_at(config: TrainConfig, position_tokens: float, total_tokens: int) -> float:
    """Return the learning rate after ``position_tokens`` of a run of ``total_tokens``."""
    if position_tokens < config.warmup_tokens:
        return config.learning_rate * position_tokens / config.warmup_tokens
    span = max(1, total_tokens - config.warmup_tokens)
    progress = min(1.0, (position_tokens - config.warmup_tokens) / span)
    low = config.final_learning_rate_share
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    pad_id: int,
    seed: int,
    start_tokens: int = 0,
    total_tokens: int | None = None,
    optimizer_state: dict[str, Any] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Change the trainable parameters of ``model`` by one pass over ``examples``.

    Args:
        model: a causal language model; parameters with ``requires_grad`` are trained.
        examples: each is seen once.
        config: see ``TrainConfig``.
        pad_id: token that fills batches; never learned.
        seed: of the order of batches.
        start_tokens: position in the whole run, for the learning rate.
        total_tokens: length of the whole run; default, this call alone.
        optimizer_state: state of an earlier call to go on from.
        on_step: called after each step with (tokens so far, loss in nats per token).

    Raises:
        DataError: no example has a token to learn, or the loss is no longer finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    batches = group_by_length([len(example.ids) for example in examples], config.tokens_per_step)
    random.Random(seed).shuffle(batches)
    total = total_tokens or sum(len(example.ids) for example in examples)
    loss_sum, num_learned, num_tokens = 0.0, 0, 0
    model.train()
    for batch in batches:
        chosen = [examples[index] for index in batch]
        rate = learning_rate_at(config, start_tokens + num_tokens, total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch_sum, batch_learned = _step(model, optimizer, parameters, chosen, pad_id, config)
        loss_sum += batch_sum
        num_learned += batch_learned
        num_tokens += sum(len(example.ids) for example in chosen)
        if on_step is not None:
            on_step(num_tokens, batch_sum / max(1, batch_learned))
    model.eval()
    if num_learned == 0:
        raise DataError("no training example has a token to learn")
    return TrainResult(loss_sum / num_learned, num_tokens, len(batches), optimizer.state_dict())


def loss_mask(examples: Sequence[Example], ids_BT: Tensor) -> Tensor:
    """Return where a token is learned: after the context, padding left out.

    Args:
        examples: one for each row.
        ids_BT: (B, T) their tokens, padded at the end.

    Returns:
        (B, T) bool, on the device of ids_BT.
    """
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, example in enumerate(examples):
        mask_BT[row, max(1, example.num_context) : len(example.ids)] = True
    return mask_BT


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    examples: Sequence[Example],
    pad_id: int,
    config: TrainConfig,
) -> tuple[float, int]:
    """Do one optimizer step; return the summed loss in nats and the number of learned tokens."""
    ids_BT, attention_mask_BT = pad_sequences([example.ids for example in examples], pad_id)
    loss_mask_BT = loss_mask(examples, ids_BT)
    num_learned = int(loss_mask_BT.sum())
    if num_learned == 0:
        return 0.0, 0
    device_type = next(model.parameters()).device.type
    with torch.autocast(device_type, dtype=torch.bfloat16):
        loss_sum = masked_loss_sum(model, ids_BT, attention_mask_BT, loss_mask_BT)
    (loss_sum / num_learned).backward()  # type: ignore[no-untyped-call]
    value = float(loss_sum.detach())
    if not math.isfinite(value):
        raise DataError(
            "the training loss is not finite; lower train.learning_rate and start again"
        )
    nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, num_learned
