"""What pruning, low rank and shared blocks cost beside rounding, and what each would take.

    .venv/bin/python benchmarks/bench_shrinking.py MODEL TEXT > shrinking.json

Every method starts from the same model in memory and sees the same text; the rise of the loss is
paired over the same held-out windows. ``ideal_bytes`` is what the best format for the method
would hold, with everything else in 16 bits: non-zeros and a mask, factors, shared matrices once
(``compress.shrinking.sizes``), codes with a 16-bit scale and a zero point for each group. No
method is followed by training, which sharing in particular is meant to be.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import LowRankConfig, PruneConfig, SharingConfig, TextConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.shrinking.low_rank import lower_rank
from mutirao.compress.shrinking.pruning import prune
from mutirao.compress.shrinking.sharing import share_blocks
from mutirao.compress.shrinking.sizes import stored_parameters
from mutirao.compress.windows import Windows, read_windows
from mutirao.environment import silence
from mutirao.errors import MutiraoError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.causal import CausalModel

GROUP_SIZE = 32

Method = Callable[[Any, Tensor], int]
"""Changes a model in place and returns its ideal bytes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory, not quantized")
    parser.add_argument("text", type=Path, help="a folder or a file of text")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--heldout-windows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    silence()
    text_config = TextConfig(
        window_tokens=options.window_tokens,
        calibration_windows=options.calibration_windows,
        heldout_windows=options.heldout_windows,
    )
    try:
        model, tokenizer = load_causal_lm(options.model, dtype=fast_dtype())
        encoder = CausalModel(model, tokenizer, name=options.model.name)
        windows = read_windows(options.text, encoder, text_config)
        result = {
            "model": options.model.name,
            "text": options.text.name,
            "text_config": text_config.model_dump(),
            "date": time.strftime("%Y-%m-%d"),
            "dtype": fast_dtype(),
            "threads": options.threads,
            "num_weights": sum(each.numel() for each in model.parameters()),
            "original_bytes": 2 * stored_parameters(model),
            "rows": list(compare(model, windows, METHODS)),
        }
    except MutiraoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=1))
    return 0


def compare(model: Any, windows: Windows, methods: dict[str, Method]) -> Iterator[dict[str, Any]]:
    """Yield what each method costs, applied to a copy of a model."""
    num_weights = sum(each.numel() for each in model.parameters())
    for name, method in methods.items():
        changed = copy.deepcopy(model)
        started = time.monotonic()
        ideal_bytes = method(changed, windows.calibration)
        seconds = time.monotonic() - started
        row = {
            "method": name,
            **measure_loss(model, changed, windows.heldout)._asdict(),
            "ideal_bytes": ideal_bytes,
            "ideal_bits_per_weight": 8 * ideal_bytes / num_weights,
            "seconds": round(seconds, 1),
        }
        print(
            f"{name}: {row['rise']:+.4f} ± {row['standard_error']:.4f} nats per token, "
            f"{ideal_bytes / 1e6:.2f} MB",
            file=sys.stderr,
        )
        yield row


def _pruned(**settings: Any) -> Method:
    def method(model: Any, ids_WT: Tensor) -> int:
        prune(model, ids_WT, PruneConfig(**settings))
        return 2 * stored_parameters(model)

    return method


def _lowered(kept: float) -> Method:
    def method(model: Any, ids_WT: Tensor) -> int:
        lower_rank(model, ids_WT, LowRankConfig(kept=kept))
        return 2 * stored_parameters(model)

    return method


def _shared(every: int) -> Method:
    def method(model: Any, _: Tensor) -> int:
        share_blocks(model, SharingConfig(every=every))
        return 2 * stored_parameters(model)

    return method


def _rounded(bits: int) -> Method:
    def method(model: Any, ids_WT: Tensor) -> int:
        round_by_blocks(model, "gptq", bits, GROUP_SIZE, ids_WT)
        num_rounded = sum(layer.weight.numel() for layer in linear_layers(model).values())
        num_others = sum(each.numel() for each in model.parameters()) - num_rounded
        rounded_bits = num_rounded * bits + num_rounded // GROUP_SIZE * (16 + bits)
        return 2 * num_others + -(-rounded_bits // 8)

    return method


METHODS: dict[str, Method] = {
    "magnitude, 50 %": _pruned(method="magnitude"),
    "wanda, 50 %": _pruned(method="wanda"),
    "magnitude, 2:4": _pruned(method="magnitude", pattern="2:4"),
    "wanda, 2:4": _pruned(method="wanda", pattern="2:4"),
    "low rank, 80 %": _lowered(0.8),
    "low rank, 50 %": _lowered(0.5),
    "blocks shared by 2": _shared(2),
    "gptq, 8 bits": _rounded(8),
    "gptq, 4 bits": _rounded(4),
    "gptq, 3 bits": _rounded(3),
}


if __name__ == "__main__":
    sys.exit(main())
