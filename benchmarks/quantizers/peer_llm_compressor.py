"""llm-compressor: GPTQ and AWQ, on a processor without accelerator.

Methods: ``gptq``, ``awq`` (followed by plain rounding), ``awq-gptq`` (followed by GPTQ) and
``rtn`` (plain rounding alone).
Options: ``observer`` (how a group's range is chosen; None for llm-compressor's own default),
``dampening`` and ``block_size`` of GPTQ, ``num_grid`` and ``duo_scaling`` of AWQ, and
``batch_size`` of the calibration.

Only the linear layers inside the blocks are quantized; embeddings, norms and head stay in 16
bits. AWQ also rewrites norms and neighbouring weights, so that all tensors are read back from
what it saved. Runs in an environment of its own; see peers.py.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_result import (
    Clock,
    Linear,
    Task,
    dequantize,
    finish,
    integer_bits,
    read_tensors,
    weight_bytes,
)
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
"""What compressed-tensors stores of a packed matrix."""
IGNORED = ["lm_head"]


def main() -> None:
    task = Task.read()
    clock = Clock()
    with clock.step("load"):
        model = AutoModelForCausalLM.from_pretrained(
            task.model, dtype=torch.bfloat16, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    # It pins the memory of its cache for an accelerator, and fails where there is none.
    IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    windows = task.windows()
    with clock.step("quantize"):
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=_recipe(task),
            dataset=_batches(task),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
        )
    with clock.step("save"):
        model.save_pretrained(task.scratch)
    tensors = read_tensors(task.scratch)
    linears = {}
    for name in [each for each in tensors if each.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        linears[stem] = _linear(
            task, {part: tensors.pop(f"{stem[:-6]}{part}", None) for part in PARTS}
        )
    finish(
        task,
        linears,
        tensors,
        clock,
        versions={
            name: importlib.metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "transformers")
        },
        file_bytes=weight_bytes(Path(task.scratch).glob("*.safetensors")),
    )


def _recipe(task: Task) -> list[Any]:
    options = task.options
    chosen = {"observer": options["observer"]} if options.get("observer") else {}
    weights = QuantizationArgs(
        num_bits=task.bits,
        type="int",
        symmetric=task.symmetric,
        strategy="group",
        group_size=task.group_size,
        **chosen,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    gptq = GPTQModifier(
        config_groups=groups,
        ignore=IGNORED,
        block_size=options.get("block_size", 128),
        dampening_frac=options.get("dampening", 0.01),
    )
    rounding = QuantizationModifier(config_groups=groups, ignore=IGNORED)
    awq = AWQModifier(
        n_grid=options.get("num_grid", 20), duo_scaling=options.get("duo_scaling", True)
    )
    recipes = {"gptq": [gptq], "rtn": [rounding], "awq": [awq, rounding], "awq-gptq": [awq, gptq]}
    if task.method not in recipes:
        raise ValueError(f"method={task.method} is not supported (expected {', '.join(recipes)})")
    return recipes[task.method]


def _batches(task: Task) -> DataLoader:
    """Return the calibration's windows as the pipelines take them, in their order."""
    windows = [{"input_ids": window} for window in torch.from_numpy(task.windows())]
    for window in windows:
        window["attention_mask"] = torch.ones_like(window["input_ids"])
    return DataLoader(windows, batch_size=task.options.get("batch_size", 1), shuffle=False)


def _linear(task: Task, parts: dict[str, Tensor | None]) -> Linear:
    """Read one packed matrix: codes run from -2^(bits-1), zeros are packed along the rows."""
    assert task.bits is not None
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    shape = torch.Size(parts["weight_shape"].tolist())
    if parts["weight_g_idx"] is not None:
        raise ValueError("the columns' groups are permuted (expected actorder 'static')")
    codes = unpack_from_int32(packed, task.bits, shape)
    zeros: Tensor | int = 0
    if (packed_zeros := parts["weight_zero_point"]) is not None:
        zeros = unpack_from_int32(packed_zeros, task.bits, scales.shape, packed_dim=0)
    return Linear(
        weight=dequantize(codes, scales, zeros),
        kind=f"int{task.bits} g{task.group_size} {'sym' if task.symmetric else 'asym'}",
        num_bits=integer_bits(
            codes.numel(),
            scales.numel(),
            task.bits,
            symmetric=task.symmetric,
            scale_bits=8 * scales.element_size(),
        ),
        stored_bytes=sum(part.nbytes for part in parts.values() if part is not None),
    )


if __name__ == "__main__":
    main()
