"""SYNTHETIC advice and compressed models: nothing was measured, every number is made up.

Rises follow 0.8 noise (rtn) and 0.4 noise (gptq), so that tests know the law's line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutirao.artifact import write_artifact

LOSS = 2.5
CONSTANTS = {"rtn": -0.22314355, "gptq": -0.91629073}  # log 0.8, log 0.4
NUM_BLOCKS = 12


def noise_of(bits: int, group_size: int) -> float:
    return 0.6 * 4.0**-bits * (group_size / 32) ** 0.3


def make_candidate(method: str, bits: int, group_size: int) -> dict[str, Any]:
    noise = noise_of(bits, group_size)
    mean = {"rtn": 0.8, "gptq": 0.4}[method] * noise
    total_bytes = 60_000_000 + int(300e6 * (bits + 16 / group_size) / 16)
    is_measured = group_size == 32
    rise = mean * (1.1 if method == "rtn" else 0.9)
    error = 0.0004 + 0.03 * rise
    measured = {
        "original": LOSS,
        "compressed": LOSS + rise,
        "rise": rise,
        "standard_error": error,
        "divergence": 1.2 * mean,
        "num_tokens": 12_240,
    }
    interval = {"mean": rise, "low": rise - 1.96 * error, "high": rise + 1.96 * error}
    predicted = {"mean": mean, "low": mean / 1.6, "high": 1.6 * mean} if bits < 8 else None
    speed = {
        "quantization": "Q8_0" if bits == 8 else "Q4_0",
        "resident_bytes": total_bytes + 90_000_000,
        "least_bytes": 120_000_000,
        "tokens_per_s": None if bits == 8 else 21.25,
    }
    return {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "noise": noise,
        "total_bytes": total_bytes,
        "bits_per_weight": 8 * total_bytes / 180e6,
        "predicted": predicted,
        "measured": measured if is_measured else None,
        "rise": interval if is_measured else predicted,
        "speed": speed,
        "is_pareto": False,
        "fits": total_bytes <= 200_000_000,
    }


def make_advice() -> dict[str, Any]:
    rows = [
        make_candidate(method, bits, size)
        for method in ("rtn", "gptq")
        for bits in (2, 3, 4, 8)
        for size in ((32, 64, 128) if bits < 8 else (32,))
    ]
    rows.sort(key=lambda row: (row["total_bytes"], row["rise"]["mean"]))
    least = float("inf")
    for row in rows:
        row["is_pareto"] = row["rise"]["mean"] < least
        least = min(least, row["rise"]["mean"])
    chosen = next(
        place
        for place, row in enumerate(rows)
        if (row["method"], row["bits"], row["group_size"]) == ("gptq", 4, 32)
    )
    kinds = ("self_attn", "mlp")
    parts = [
        {"name": f"model.layers.{n}.{kind}", "divergence": 0.02 / (n + 1) + 0.003 * (kind == "mlp")}
        for n in range(NUM_BLOCKS)
        for kind in kinds
    ]
    ends = {"self_attn": ("q_proj", "o_proj"), "mlp": ("up_proj",)}
    bits = {
        f"model.layers.{n}.{kind}.{end}": 8 if n == 0 else 3 + n % 2
        for n in range(NUM_BLOCKS)
        for kind in kinds
        for end in ends[kind]
    }
    costs = {"num_requests": 1e9, "training_energy_kwh": 5e4, "energy_per_request_kwh": 2e-6}
    return {
        "model": "small-model",
        "loss": LOSS,
        "num_weights": 180_000_000,
        "num_rounded": 150_000_000,
        "original_bytes": 360_000_000,
        "num_tokens": 12_240,
        "budget": {"memory_bytes": 400_000_000, "disk_bytes": 200_000_000, "loss_share": 0.02},
        "law": {
            "parameters": {
                **{f"log_c[{name}]": value for name, value in CONSTANTS.items()},
                "noise_power": 1.0,
            },
            "standard_errors": {"log_c[rtn]": 0.2, "log_c[gptq]": 0.2, "noise_power": 0.07},
            "spread": 0.2,
            "num_rows": 9,
            "noise": [noise_of(5, 32), noise_of(2, 128)],
            "num_too_large": 1,
        },
        "candidates": rows,
        "recommended": chosen,
        "sentence": "Take 4 bits in groups of 32 by gptq: 144.4 MB, because it was made up.",
        "remarks": ["Most sensitive: model.layers.0.mlp.", "A remark of its own."],
        "other_measured": [
            {
                "method": "rtn",
                "bits": bits_,
                "group_size": None,
                "noise": 2 * noise_of(bits_, 128),
                "measured": {
                    "original": LOSS,
                    "compressed": LOSS + rise,
                    "rise": rise,
                    "standard_error": 0.0006,
                    "divergence": abs(rise),
                    "num_tokens": 12_240,
                },
            }
            for bits_, rise in ((5, 0.0021), (6, -0.0003))
        ],
        "parts": parts,
        "mix": {
            "bits": bits,
            "group_size": 32,
            "total_bytes": 144_000_000,
            "uniform_bits": 4,
            "mixed": {**rows[chosen]["measured"], "divergence": 0.00071},
            "uniform": {**rows[chosen]["measured"], "divergence": 0.00112},
            "is_better": True,
        },
        "prospects": {
            "more_training": {
                "critical_tokens": {"mean": 3.1e12, "low": 4.2e11, "high": None},
                "would_hurt": None,
            },
            "other_sizes": [
                {"size": 0.5, "bits": 8.0, "change": 0.1234, "low": 0.1011, "high": 0.1502},
                {"size": 2.0, "bits": 2.0, "change": -0.0567},
            ],
            "qat_share": 0.17,
            "bill": {
                "original": {"name": "this model, 16 bits", "training_cost": 123_456.0,
                             "cost_per_request": 2e-4, **costs},
                "chosen": {"name": "chosen", "training_cost": 123_456.0,
                           "cost_per_request": 5e-5, **costs},
                "smaller": {"name": "half as large, 16 bits", "training_cost": 234_567.0,
                            "cost_per_request": 1e-4, **costs},
                "break_even_requests": 1.1e9,
            },
            "notes": ["Nothing of it was measured on this model."],
        },
    }  # fmt: skip


def write_advice(folder: Path, document: dict[str, Any] | str) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    with write_artifact(
        folder, "advice", recipe={"advise": {"methods": ["rtn", "gptq"]}}
    ) as writer:
        writer.add_source("model", "hf:made/up@1", "ab" * 32)
        (writer.path / "advice.json").write_text(text, encoding="utf-8")
    return folder


def write_original(folder: Path) -> Path:
    with write_artifact(folder, "model", recipe={"seed": 1}) as writer:
        (writer.path / "config.json").write_text("{}")
    return folder


def write_model(
    folder: Path, parent: Path, *, method: str = "gptq", bits: int = 4, rise: float | None = 0.011,
    original: float = LOSS, **metrics: Any,
) -> Path:  # fmt: skip
    compress = {"method": method, "bits": bits, "group_size": 32}
    with write_artifact(folder, "model", recipe={"compress": compress}) as writer:
        writer.add_parent("model", parent)
        (writer.path / "config.json").write_text("{}")
        total_bytes = 60_000_000 + 20_000_000 * bits
        writer.metrics.update(
            weight_bits=bits,
            bits_per_weight=8 * total_bytes / 180e6,
            total_bytes=total_bytes,
            original_bytes=360_000_000,
            num_weights=180_000_000,
            compress_s=93.25,
            peak_memory_bytes=1_900_000_000,
        )
        if rise is not None:
            writer.metrics.update(
                {
                    "heldout.original": original,
                    "heldout.compressed": original + rise,
                    "heldout.rise": rise,
                    "heldout.standard_error": 0.001,
                    "heldout.divergence": 0.0234,
                    "heldout.num_tokens": 12_240,
                }
            )
        writer.metrics.update(metrics)
    return folder
