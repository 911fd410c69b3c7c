"""QLoRA: the frozen base in 4-bit NormalFloat, the adapter beside it in float32.

Each frozen linear layer but the output head is replaced by bitsandbytes' 4-bit layer (NF4 with
quantized scales: Dettmers et al. 2023, arXiv:2305.14314), on CPU as on GPU: about half a byte
for each weight in place of two. On a CPU that saves memory, not time, for each pass takes the
weights apart again. The optional package is the extra ``qlora``. Not here: paged optimizers, and
loading a checkpoint layer by layer, so that the base must fit into memory once in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mutirao.errors import InputError

PIP_LINE = 'pip install "mutirao[qlora]"'


def quantize_base(model: nn.Module) -> int:
    """Put the frozen linear layers of a model into 4 bits, one after the other, in place.

    Args:
        model: a causal model with its adapter attached; what is trained stays as it is.

    Returns:
        How many layers were replaced.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    layers = _import_layers()
    causal: Any = model
    head = causal.get_output_embeddings()
    frozen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head and not _is_adapter(parent, child)
    ]
    for parent, name, linear in frozen:
        setattr(parent, name, _quantized(layers, linear))
    return len(frozen)


def _is_adapter(parent: nn.Module, linear: nn.Linear) -> bool:
    """Whether a layer is a factor of an adapter: PEFT keeps those in dictionaries of modules."""
    return isinstance(parent, nn.ModuleDict) or linear.weight.requires_grad


def _quantized(layers: Any, linear: nn.Linear) -> nn.Module:
    device = linear.weight.device
    made: nn.Module = layers.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    made.weight = layers.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", module=made
    )
    if linear.bias is not None:
        made.bias = linear.bias
    return made.to(device)  # this is what quantizes


def _import_layers() -> Any:
    try:
        from bitsandbytes import nn as layers
    except ImportError:
        raise InputError(
            f"lora.quantize_base=true needs bitsandbytes, which is not installed: {PIP_LINE}"
        ) from None
    return layers
