"""In which number format a processor multiplies matrices fast."""

from __future__ import annotations

import platform

import torch

from mutirao.formats.huggingface import Dtype

_X86 = ("x86_64", "AMD64")


def fast_dtype(device_type: str = "cpu") -> Dtype:
    """Return 'bfloat16', but 'float32' where PyTorch multiplies bfloat16 by plain loops.

    That is on x86 without AVX-512: 7 GFLOP/s beside 62 in float32 (torch 2.13, one core with
    AVX2, 2026-11).

    Args:
        device_type: PyTorch's name of the device.
    """
    is_x86 = device_type == "cpu" and platform.machine() in _X86
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "float32" if is_x86 and not has_avx512 else "bfloat16"
