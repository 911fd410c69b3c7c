"""accelerate's disk offload: what fits in memory stays there, the rest is read on every pass."""

from __future__ import annotations

import tempfile
from collections import Counter

import accelerate
import torch
import transformers
from accelerate import init_empty_weights
from greedy import greedy_tokens
from recorder import Recorder, read_task
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def main() -> None:
    task = read_task()
    torch.set_num_threads(task["threads"])
    with tempfile.TemporaryDirectory(dir=task["options"]["folder"]) as folder:
        model, device_map = _load(task["model"], task["options"]["weights_bytes"], folder)
        recorder = Recorder(task)
        for prompt in task["prompts"]:
            recorder.record(greedy_tokens(model, prompt))
        recorder.print(
            {
                "accelerate": accelerate.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
            num_modules=dict(Counter(map(str, device_map.values()))),
            weights_bytes=task["options"]["weights_bytes"],
        )


def _load(
    path: str, weights_bytes: int | None, folder: str
) -> tuple[PreTrainedModel, dict[str, str]]:
    if weights_bytes is None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), {"": "cpu"}
    device_map = _place(path, weights_bytes)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map=device_map, offload_folder=folder
    )
    return model, device_map


def _place(path: str, weights_bytes: int) -> dict[str, str]:
    """Say for each module whether it stays in memory.

    The two largest come first, as each is read whole on every pass wherever it lies; then as
    many layers as there is room for. accelerate's own choice leaves the room of its largest
    module (the head, 467 MB) free, and would keep fewer.
    """
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path), dtype=torch.bfloat16
        )
    base = empty.model
    modules = {"model.embed_tokens": base.embed_tokens, "lm_head": empty.lm_head}
    modules |= {"model.norm": base.norm, "model.rotary_emb": base.rotary_emb}
    modules |= {f"model.layers.{index}": layer for index, layer in enumerate(base.layers)}
    device_map = {}
    for name, module in modules.items():
        num_bytes = sum(each.numel() * each.element_size() for each in module.parameters())
        device_map[name] = "cpu" if num_bytes <= weights_bytes else "disk"
        weights_bytes -= num_bytes if num_bytes <= weights_bytes else 0
    return device_map


if __name__ == "__main__":
    main()
