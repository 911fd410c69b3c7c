"""NF4: codes of 4 bits that stand where a normal distribution has equal shares of its mass.

Each block of 64 weights has a scale; scales are themselves rounded to 8 bits, in blocks of 256
(double quantization), so that a weight takes 4.13 bits, and a layer some 1.3 kB for tables. The
rounding and the layout are bitsandbytes', which transformers needs to open the result, on a CPU
as on a GPU; our own reader is ``formats.nf4``. No text is needed.

Shapes: O outputs, I inputs, N codes of two weights.

References:
    Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mutirao.errors import InputError
from mutirao.tune.qlora import PIP_LINE

BLOCK_SIZE = 64
"""Weights that share a scale: as in the paper, and what transformers expects."""


def quantize_nf4(weight_OI: Tensor) -> dict[str, Tensor]:
    """Round a weight to NF4 with double quantization.

    Args:
        weight_OI: (O, I) floating point, finite.

    Returns:
        What is stored, by the ends of the tensors' names: ``weight`` (N, 1) uint8, and what
        bitsandbytes keeps of scales and tables under ``weight.``.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    functional = import_functional()
    packed_N1, state = functional.quantize_4bit(
        weight_OI.to(torch.bfloat16).contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type="nf4",
    )
    parts = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    return {"weight": packed_N1, **parts}


def import_functional() -> Any:
    """Return bitsandbytes' functions.

    Raises:
        InputError: it is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError:
        raise InputError(
            f"compress.method=nf4 needs bitsandbytes, which is not installed: {PIP_LINE}"
        ) from None
    return functional
