"""The output head of a causal model, evaluated only where its result is needed.

With a vocabulary of 49,152 and 576 channels the head is a fifth of a small model, and its
logits are larger than all other activations together. So hidden states are selected first,
logits are made a few rows at a time, and for training the gradient is formed at the same
time as the loss, while the logits are there (as in Hsu et al. 2024, arXiv:2410.10989,
section 3.2). Models that change logits after the head are refused.

Shapes: B sequences, T tokens, N selected positions, D channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutirao.errors import FormatError

ROWS_PER_CHUNK = 128
"""Rows of logits held at a time: 25 MB in float32 at V = 49,152. On 2 cores of an AMD EPYC
(2026-11), 64 to 512 rows take the same time within noise."""


def split_model(model: Any) -> tuple[nn.Module, nn.Module]:
    """Return (decoder, head) of a causal model, looking through a PEFT wrapper.

    Raises:
        FormatError: the model has no such parts, or changes its logits after the head.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        value = getattr(base.config, name, None)
        if value is not None and value != 1.0:
            raise FormatError(
                f"models of type {base.config.model_type!r} are not supported: they change "
                f"logits after the head ({name}={value}); use a Llama-like model"
            )
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
    head = base.get_output_embeddings()
    if decoder is None or decoder is base or head is None:
        raise FormatError(
            f"models of type {base.config.model_type!r} are not supported (expected a causal "
            "language model with a decoder and an output head)"
        )
    return decoder, head


def hidden_states(decoder: nn.Module, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Return the (B, T, D) states that the head turns into logits."""
    # Without padding no mask is needed, and attention takes its faster causal path.
    mask = None if bool(attention_mask_BT.all()) else attention_mask_BT
    states: Tensor = decoder(
        input_ids=ids_BT, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return states


def selected_logprobs(head: nn.Module, states_ND: Tensor, targets_NK: Tensor) -> Tensor:
    """Return natural log-probabilities of chosen tokens.

    Args:
        head: the output head.
        states_ND: (N, D) hidden states.
        targets_NK: (N, K) token ids.

    Returns:
        (N, K) float32, normalised over the whole vocabulary.
    """
    pieces = []
    for states, targets in zip(
        torch.split(states_ND, ROWS_PER_CHUNK), torch.split(targets_NK, ROWS_PER_CHUNK), strict=True
    ):
        logits = head(states).float()
        pieces.append(logits.gather(1, targets) - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(pieces) if pieces else states_ND.new_zeros(targets_NK.shape).float()


def masked_loss_sum(
    model: nn.Module, ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor
) -> Tensor:
    """Sum the cross-entropy of chosen tokens, with gradients.

    Args:
        model: a causal model, plain or wrapped by PEFT.
        ids_BT: (B, T) token ids, padded on the right.
        attention_mask_BT: (B, T) 1 for tokens, 0 for filling.
        loss_mask_BT: (B, T) True where a token is predicted from those before it; the
            first column never counts.

    Returns:
        Scalar float32: sum of -ln p over the chosen tokens, in nats.

    Raises:
        FormatError: see ``split_model``.
    """
    decoder, head = split_model(model)
    states_BTD = hidden_states(decoder, ids_BT, attention_mask_BT)
    chosen = loss_mask_BT[:, 1:].bool()
    states_ND, targets_N = states_BTD[:, :-1][chosen], ids_BT[:, 1:][chosen]
    if type(head) is nn.Linear and not head.weight.requires_grad:
        loss_sum: Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
            states_ND, targets_N, head.weight, head.bias
        )
        return loss_sum
    return functional.cross_entropy(head(states_ND).float(), targets_N, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy through a frozen head; keeps (N, D) instead of (N, V)."""

    @staticmethod
    def forward(
        context: Any, states_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        needs_gradient = context.needs_input_grad[0]
        gradient_ND = torch.empty_like(states_ND) if needs_gradient else None
        loss_sum = torch.zeros((), dtype=torch.float32, device=states_ND.device)
        for start in range(0, len(targets_N), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            logits = functional.linear(states_ND[rows], weight_VD, bias_V)
            product_dtype = logits.dtype
            logprobs = logits.float().log_softmax(dim=1)
            targets_N1 = targets_N[rows, None]
            loss_sum -= logprobs.gather(1, targets_N1).sum()
            if gradient_ND is not None:
                # d loss / d logits = softmax - one-hot of the target.
                slope = logprobs.exp_()
                slope.scatter_add_(1, targets_N1, slope.new_full(targets_N1.shape, -1.0))
                gradient_ND[rows] = slope.to(product_dtype) @ weight_VD.to(product_dtype)
        if gradient_ND is not None:
            context.save_for_backward(gradient_ND)
        return loss_sum

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = context.saved_tensors
        return gradient_ND * upstream[0].to(gradient_ND.dtype), None, None, None
