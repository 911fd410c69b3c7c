"""One small training loop: AdamW over micro-batches of whole examples.

An example is one record, never packed with another, so that nothing is learned across
records and training sees text as evaluation does; batches group examples of similar
length instead. The learning rate follows the position in the whole run, not in the call,
so that a run cut into rounds follows one schedule. ``packed`` has the loop over tokens without
records; several processes may share each step of either (``parallel``).

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.data.tokenization import Example
from mutirao.errors import DataError
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.batching import group_by_length, pad_sequences
from mutirao.models.causal import masked_loss_sum
from mutirao.train.config import TrainConfig
from mutirao.train.parallel import ALONE, Ranks

logger = logging.getLogger(__name__)


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
    ranks: Ranks = ALONE,
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
        ranks: who shares each step; all of them call this with the same arguments.

    Raises:
        DataError: no example has a token to learn, or the loss is no longer finite.
        RankLostError: another rank is gone.
    """
    parameters, optimizer = make_optimizer(model, config, optimizer_state)
    batches = group_by_length([len(example.ids) for example in examples], config.tokens_per_step)
    random.Random(seed).shuffle(batches)
    total = total_tokens or sum(len(example.ids) for example in examples)
    loss_sum, num_learned, num_tokens = 0.0, 0, 0
    model.train()
    for batch in batches:
        chosen = [examples[index] for index in batch]
        rate = learning_rate_at(config, start_tokens + num_tokens, total)
        batch_sum, batch_learned = 0.0, sum(map(_count_learned, chosen))
        if batch_learned:
            own = chosen[ranks.share(len(chosen))]
            own_sum = _backward(model, config, own, pad_id=pad_id, num_learned=batch_learned)
            batch_sum = finite(ranks.sum_gradients(parameters, own_sum))
            apply_step(parameters, optimizer, rate, config)
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


def make_optimizer(
    model: nn.Module,
    config: TrainConfig,
    state: dict[str, Any] | None = None,
    *,
    fused: bool = False,
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Return what is trained and its AdamW, which goes on from ``state`` where there is one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=fused or None,
    )
    if state is not None:
        optimizer.load_state_dict(state)
    return parameters, optimizer


def autocast(model: nn.Module, config: TrainConfig) -> torch.autocast:
    """Return the context in which a training pass computes."""
    device_type = next(model.parameters()).device.type
    is_half = is_half_precision(config, device_type)
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_half)


def is_half_precision(config: TrainConfig, device_type: str) -> bool:
    """Whether a device multiplies matrices in bfloat16, as the settings have it."""
    if config.compute_dtype == "auto":
        return fast_dtype(device_type) == "bfloat16"
    is_half = config.compute_dtype == "bfloat16"
    if is_half and fast_dtype(device_type) != "bfloat16":
        _warn_of_slow_bfloat16()
    return is_half


@functools.cache
def _warn_of_slow_bfloat16() -> None:
    """Say it once."""
    logger.warning(
        "this processor has no AVX-512: passes in bfloat16 can take ten times as long as with "
        'train.compute_dtype = "auto"'
    )


def finite(loss_sum: float) -> float:
    """Return a loss as it is.

    Raises:
        DataError: it is not finite.
    """
    if not math.isfinite(loss_sum):
        raise DataError(
            "the training loss is not finite; lower train.learning_rate and start again"
        )
    return loss_sum


def apply_step(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: TrainConfig,
) -> None:
    """Clip the gradients, change the parameters by one step, and forget the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _count_learned(example: Example) -> int:
    return max(0, len(example.ids) - max(1, example.num_context))


def _backward(
    model: nn.Module,
    config: TrainConfig,
    examples: Sequence[Example],
    *,
    pad_id: int,
    num_learned: int,
) -> float:
    """Put the gradients of examples in place: of their summed loss divided by ``num_learned``.

    Args:
        model: a causal language model.
        config: see ``TrainConfig``.
        examples: of one batch, or a rank's share of it; may be none.
        pad_id: token that fills.
        num_learned: tokens that the whole batch learns.

    Returns:
        The summed loss in nats.
    """
    if not any(map(_count_learned, examples)):
        return 0.0
    device = next(model.parameters()).device
    ids_BT, attention_mask_BT = pad_sequences([example.ids for example in examples], pad_id)
    inputs = (ids_BT, attention_mask_BT, loss_mask(examples, ids_BT))
    with autocast(model, config):
        loss_sum = masked_loss_sum(model, *(each.to(device) for each in inputs))
    mean = loss_sum / torch.tensor(num_learned, device=device)
    mean.backward()  # type: ignore[no-untyped-call]
    return float(loss_sum.detach())
