"""Training and scoring on packed text: one long array of token ids, cut anywhere into windows.

For pre-training: documents follow each other, each ended by the end-of-text token, and a
window may span several. Every step takes windows at offsets that depend on a seed, a name and
the number of the step alone, so that a run that is cut into rounds, or taken up again, sees
exactly what an uninterrupted one would have seen. Windows are drawn with replacement.

Left out: attention masks between documents, and epochs in which each token comes once.

Shapes: B windows, T tokens that are predicted in each; N rows of hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mutirao.errors import ArtifactError, DataError
from mutirao.models.head import hidden_states, masked_loss_sum, split_model
from mutirao.train.config import TrainConfig
from mutirao.train.loop import (
    TrainResult,
    apply_step,
    autocast,
    finite,
    learning_rate_at,
    make_optimizer,
)
from mutirao.train.parallel import ALONE, Ranks

TokenIds: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""(tokens,) uint16 or uint32; may be a memory map."""


def read_packed(path: Path) -> TokenIds:
    """Open an array of token ids without reading it.

    Raises:
        ArtifactError: the file is missing, or not one row of uint16 or uint32.
    """
    try:
        tokens: TokenIds = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); prepare the data again") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ArtifactError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape} (expected one row of uint16 or "
            "uint32); prepare the data again"
        )
    return tokens


def check_vocabulary(tokens: TokenIds, num_tokens: int, origin: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        DataError: with the largest of them.
    """
    largest = int(tokens.max()) if tokens.size else 0
    if largest >= num_tokens:
        raise DataError(
            f"{origin} has token {largest} (expected 0 to {num_tokens - 1}); pack it with the "
            "model's own tokenizer"
        )


def windows_per_step(config: TrainConfig) -> int:
    """Return how many windows one optimizer step takes."""
    return max(1, config.tokens_per_step // config.max_tokens_per_example)


def take_windows(
    tokens: TokenIds, num_windows: int, width: int, *, seed: int, name: str, step: int
) -> Tensor:
    """Return the windows of one step.

    Args:
        tokens: (tokens,) ids.
        num_windows: B.
        width: tokens of a window.
        seed: of the run.
        name: whose stream it is, so that sites with the same text see it in other orders.
        step: number in the whole run, from 0.

    Returns:
        (B, width) int64 token ids.

    Raises:
        DataError: there are fewer tokens than a window needs.
    """
    if tokens.size < width:
        raise DataError(
            f"{tokens.size} tokens are too few for windows of {width}; give more text or lower "
            "train.max_tokens_per_example"
        )
    digest = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    starts = generator.integers(0, tokens.size - width + 1, size=num_windows)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(width)].astype(np.int64))


def train_packed(
    model: nn.Module,
    tokens: TokenIds,
    config: TrainConfig,
    *,
    seed: int,
    name: str,
    num_steps: int,
    start_step: int = 0,
    total_steps: int | None = None,
    optimizer_state: dict[str, Any] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Change the trainable parameters of ``model`` by steps over random windows.

    Args:
        model: a causal language model; parameters with ``requires_grad`` are trained.
        tokens: (tokens,) ids.
        config: see ``TrainConfig``; ``tokens_per_step // max_tokens_per_example`` windows make a
            step, and every token of a window but the first is learned.
        seed: of the windows.
        name: whose stream it is.
        num_steps: steps of this call.
        start_step: position in the whole run, for windows and learning rate.
        total_steps: length of the whole run; default, up to the end of this call.
        optimizer_state: state of an earlier call to go on from.
        on_step: called after each step with (tokens so far, loss in nats per token).
        ranks: who shares each step; all of them call this with the same arguments.

    Raises:
        DataError: there are too few tokens, or the loss is no longer finite.
        RankLostError: another rank is gone.
    """
    num_windows, width = windows_per_step(config), config.max_tokens_per_example + 1
    step_tokens = num_windows * (width - 1)
    total_tokens = (total_steps or start_step + num_steps) * step_tokens
    parameters, optimizer = make_optimizer(model, config, optimizer_state, fused=True)
    device = parameters[0].device
    loss_sum = 0.0
    model.train()
    for step in range(start_step, start_step + num_steps):
        ids = take_windows(tokens, num_windows, width, seed=seed, name=name, step=step)
        own = ids[ranks.share(num_windows)].to(device)
        own_sum = _backward(model, own, config, num_learned=step_tokens)
        step_sum = finite(ranks.sum_gradients(parameters, own_sum))
        # The rate after the step: a warm-up would else waste its first step at rate 0.
        rate = learning_rate_at(config, (step + 1) * step_tokens, total_tokens)
        apply_step(parameters, optimizer, rate, config)
        loss_sum += step_sum
        if on_step is not None:
            on_step((step + 1 - start_step) * step_tokens, step_sum / step_tokens)
    model.eval()
    num_tokens = num_steps * step_tokens
    return TrainResult(loss_sum / num_tokens, num_tokens, num_steps, optimizer.state_dict())


def backward_windows(
    model: nn.Module, ids_BT: Tensor, config: TrainConfig, *, num_learned: int
) -> float:
    """Put the gradients of a step's mean loss in place, a few windows at a time.

    Args:
        model: a causal model.
        ids_BT: (B, T + 1) token ids.
        config: bounds a pass.
        num_learned: tokens by which the sum is divided.

    Returns:
        The summed loss in nats.

    Raises:
        DataError: it is not finite.
    """
    return finite(_backward(model, ids_BT, config, num_learned=num_learned))


def _backward(model: nn.Module, ids_BT: Tensor, config: TrainConfig, *, num_learned: int) -> float:
    """Do the work of ``backward_windows``; a rank's share may have no windows."""
    if not len(ids_BT):
        return 0.0
    width = ids_BT.shape[1] - 1
    total: Tensor | None = None
    for part_BT in torch.split(ids_BT, max(1, config.tokens_per_pass // width)):
        with autocast(model, config):
            part_sum = next_token_loss_sum(model, part_BT)
        (part_sum / num_learned).backward()  # type: ignore[no-untyped-call]
        total = part_sum.detach() if total is None else total + part_sum.detach()
    assert total is not None
    return float(total)


def next_token_loss_sum(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of all tokens but the first of each window, in nats."""
    decoder, head = split_model(model)
    inputs_BT, targets_N = ids_BT[:, :-1], ids_BT[:, 1:].reshape(-1)
    if type(head) is nn.Linear and not head.weight.requires_grad:
        ones_BT = torch.ones_like(ids_BT)  # the frozen head has a leaner way
        return masked_loss_sum(model, ids_BT, ones_BT, ones_BT.bool())
    states_BTD = hidden_states(decoder, inputs_BT, torch.ones_like(inputs_BT))
    logits_NV = head(states_BTD.reshape(-1, states_BTD.shape[-1]))
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


@torch.no_grad()
def packed_loss(
    model: nn.Module, tokens: TokenIds, config: TrainConfig, *, max_tokens: int
) -> tuple[float, int]:
    """Return the mean loss on the first tokens, in windows that follow each other.

    Args:
        model: a causal model.
        tokens: (tokens,) held-out ids.
        config: width of the windows, tokens in a pass.
        max_tokens: most tokens to score.

    Returns:
        Nats per token, and how many tokens were scored.

    Raises:
        DataError: there are not two tokens.
    """
    width = min(config.max_tokens_per_example, max_tokens, tokens.size - 1)
    if width < 1:
        raise DataError("there is no held-out text to score (expected at least two tokens)")
    num_windows = max(1, min(max_tokens, tokens.size - 1) // width)
    device = next(model.parameters()).device
    model.eval()
    loss_sum, per_pass = 0.0, max(1, config.tokens_per_pass // width)
    for first in range(0, num_windows, per_pass):
        starts = np.arange(first, min(first + per_pass, num_windows)) * width
        ids = tokens[starts[:, None] + np.arange(width + 1)].astype(np.int64)
        with autocast(model, config):
            loss_sum += float(next_token_loss_sum(model, torch.from_numpy(ids).to(device)))
    return loss_sum / (num_windows * width), num_windows * width
