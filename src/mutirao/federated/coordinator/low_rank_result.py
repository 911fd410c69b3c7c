"""The result of 'stacked' and 'fedex' as one PEFT adapter: history and adapter are one product.

Its rank is what the sum needs, and may be far above that of the adapters that were trained; how
to cut it down is in ``low_rank_state.sum_as_adapter``. Written as r = lora_alpha = rank, so that
the scale is 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mutirao.artifact import write_atomic
from mutirao.errors import ShapeError
from mutirao.federated.aggregation.low_rank_state import sum_as_adapter
from mutirao.federated.coordinator.state_files import StateFile
from mutirao.tune.config import LoRAConfig

CONFIG_NAME = "adapter_config.json"


def replace_by_sum(folder: Path, weights_name: str, state: StateFile, lora: LoRAConfig) -> int:
    """Put a state's sum of products in place of a PEFT adapter's factors.

    Args:
        folder: the adapter that was the start; changed in place.
        weights_name: of its weight file.
        state: what the sites hold.
        lora: the adapter that was trained.

    Returns:
        The new rank.

    Raises:
        ShapeError: the state has layers that the adapter has not.
    """
    from safetensors.numpy import load_file, save_file

    tensors = {name: state.read(name) for name in state.names}
    factors, rank, _ = sum_as_adapter(tensors, scale=lora.alpha / lora.rank)
    weights = load_file(str(folder / weights_name))
    for name in [each for each in weights if ".lora_" in each]:
        module, _, rest = name.rpartition(".lora_")
        if (own := factors.get(module)) is not None:
            weights[name] = own.a.astype("f4") if rest.startswith("A") else own.b.astype("f4")
        else:  # a layer that learned nothing: zero, of the same rank
            outer, inner = weights[name].shape
            shape = (rank, inner) if rest.startswith("A") else (outer, rank)
            weights[name] = np.zeros(shape, np.float32)
    if strangers := factors.keys() - {name.rpartition(".lora_")[0] for name in weights}:
        raise ShapeError(
            f"the state has a history of {min(strangers)}, which the adapter in {folder} has "
            "not; write the start anew"
        )
    save_file(weights, str(folder / weights_name), metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config.update(r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={})
    write_atomic(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return rank
