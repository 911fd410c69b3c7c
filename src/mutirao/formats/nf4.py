"""Weights in bitsandbytes' NF4 layout, read without bitsandbytes.

Beside a layer's ``weight`` (two codes of 4 bits in a byte, the first in the upper half) stand
``weight.quant_map`` (what the 16 codes mean), ``weight.absmax`` (a scale for each block of
weights) and ``weight.quant_state.bitsandbytes__nf4`` (a JSON text: block size, shape). Scales may
be quantized themselves: bytes, with ``weight.nested_quant_map``, ``weight.nested_absmax`` and an
offset. The layout is as ``QuantState`` in github.com/bitsandbytes-foundation/bitsandbytes has it;
other types of it (fp4, int8) are not read.

Shapes: O outputs, I inputs, N codes, B blocks, S weights in a block.

References:
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from mutirao.errors import FormatError

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
"""After the name of a weight: the tensor that says how it is to be read."""


def is_nf4(quantization: dict[str, Any]) -> bool:
    """Say whether a ``quantization_config`` declares weights that are read here."""
    return (
        quantization.get("quant_method") == "bitsandbytes"
        and quantization.get("load_in_4bit") is True
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    )


def expand_nf4(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return the (O, I) float32 weight that an NF4 layer stands for.

    Args:
        name: of the weight.
        tensors: all of the file's.

    Raises:
        FormatError: a part is missing, or they do not fit together.
    """
    try:
        state = json.loads(bytes(tensors[name + STATE_SUFFIX].tolist()))
        shape, block_size = tuple(map(int, state["shape"])), int(state["blocksize"])
        table = tensors[f"{name}.quant_map"].float()
        scale_B = _scales(name, tensors, state)
    except (KeyError, ValueError, TypeError, RecursionError, IndexError, RuntimeError) as error:
        raise FormatError(f"NF4 weight {name} has no usable scales: {error!r}") from None
    octets = tensors[name].reshape(-1)
    if octets.dtype != torch.uint8:
        raise FormatError(f"NF4 weight {name} is of type {octets.dtype} (expected bytes)")
    codes_N = torch.stack([octets >> 4, octets & 15], dim=1).reshape(-1).long()
    num_weights = math.prod(shape)
    is_matrix = len(shape) == 2 and min(shape) > 0
    has_scales = block_size > 0 and len(scale_B) == -(-num_weights // block_size)
    if not is_matrix or not has_scales or len(table) != 16 or len(codes_N) < num_weights:
        raise FormatError(
            f"NF4 weight {name} of shape {shape} has {len(codes_N)} codes and {len(scale_B)} "
            f"scales for blocks of {block_size}, which do not fit together; make it again"
        )
    scale_N = scale_B[torch.arange(num_weights) // block_size]
    return (table[codes_N[:num_weights]] * scale_N).reshape(shape)


def _scales(name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
    """Return the (B,) float32 scales, which may be quantized themselves."""
    absmax_B = tensors[f"{name}.absmax"]
    if absmax_B.dtype != torch.uint8:
        return absmax_B.float()
    meanings = tensors[f"{name}.nested_quant_map"].float()[absmax_B.long()]
    block_B = torch.arange(len(absmax_B)) // int(state["nested_blocksize"])
    largest_B = tensors[f"{name}.nested_absmax"].float()[block_B]
    return meanings * largest_B + float(state["nested_offset"])
