"""A machine of round numbers, as the probe would describe it."""

from __future__ import annotations

from typing import Any

from mutirao.inference.planning.machine import PRODUCT_TOKENS, DiskSpeed, Machine, ProductSpeed
from mutirao.inference.planning.probe import arrangements
from mutirao.inference.store.plane_formats import FORMATS


def small_machine(*, s_per_weight: float = 1e-9, **changes: Any) -> Machine:
    """So long for the first token and half of it for each further one; 1 GB/s; no more."""
    speeds = tuple((1 + (tokens - 1) / 2) * s_per_weight for tokens in PRODUCT_TOKENS)
    values: dict[str, Any] = {
        "host": "here",
        "processor": "a processor",
        "num_cores": 2,
        "num_threads": 2,
        "kernels": "scalar",
        "disk": "8:1",
        "measured_on": "2026-11-22",
        "waited_share": 0.0,
        "direct": True,
        "reads": tuple(
            DiskSpeed(chunk, readers, 1e9, 0.0)
            for chunk in (1 << 16, 1 << 20)
            for readers in (1, 8)
        ),
        "read_cpu_s_per_byte": 0.0,
        "products": tuple(
            ProductSpeed(form.name, widths, speeds, 0.0)
            for form in FORMATS.values()
            for widths in arrangements(form)
        ),
        "attention_s_per_value": 1e-15,
        "cache_s_per_value": 0.0,
        "norm_s_per_value": 1e-15,
        "activation_s_per_value": 1e-15,
        "quantize_s_per_value": 1e-15,
        "loop_s": 1e-12,
        "choice_s_per_logit": 1e-15,
        "confidence_s_per_logit": 1e-15,
    }
    return Machine(**values | changes)
