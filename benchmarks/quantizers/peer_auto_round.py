"""AutoRound: SignRound, which learns the rounding and the range of each group, block by block.

Method: ``signround``. Options: ``iters`` (steps per block, 200 by default; 0 rounds without
learning), ``batch_size`` (windows per step, 8 by default) and ``seed``, and any of AutoRound's
own under ``more`` (for example ``{"enable_alg_ext": true}``, its experimental extension).

Read back from its own ``auto_round`` format, whose packing it chooses itself: AutoAWQ's for 4
bits with zero points, else streams of bits along the columns; scales in float16. Runs in an
environment of its own; see peers.py.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from numpy.typing import NDArray
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
from transformers import AutoModelForCausalLM, AutoTokenizer

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of eight neighbours lies."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def main() -> None:
    task = Task.read()
    if task.method != "signround":
        raise ValueError(f"method={task.method} is not supported (expected signround)")
    clock = Clock()
    with clock.step("load"):
        model = AutoModelForCausalLM.from_pretrained(
            task.model, dtype=torch.bfloat16, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    windows = task.windows()
    options = task.options
    with clock.step("quantize"):  # it packs each block as soon as it is done
        rounder = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            bits=task.bits,
            group_size=task.group_size,
            sym=task.symmetric,
            iters=options.get("iters", 200),
            dataset=_batches(task),
            seqlen=windows.shape[1],
            nsamples=len(windows),
            batch_size=options.get("batch_size", 8),
            seed=options.get("seed", 42),
            device_map="cpu",
            enable_torch_compile=False,
            **options.get("more", {}),
        )
        rounder.quantize_and_save(output_dir=str(task.scratch), format="auto_round")
    folder = next(task.scratch.rglob("config.json")).parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packing = config["quantization_config"]["packing_format"]
    tensors = read_tensors(folder)
    linears = {}
    for name in [each for each in tensors if each.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        parts = {part: tensors.pop(f"{stem}{part}", None) for part in PARTS}
        linears[f"{stem}weight"] = _linear(task, parts, packing)
    finish(
        task,
        linears,
        tensors,
        clock,
        versions={
            name: importlib.metadata.version(name) for name in ("auto-round", "transformers")
        },
        file_bytes=weight_bytes(Path(folder).glob("*.safetensors")),
    )


def _batches(task: Task) -> list[dict[str, Tensor]]:
    """Return the calibration in batches; no token counts as padding."""
    batch_size = task.options.get("batch_size", 8)
    batches = torch.from_numpy(task.windows()).split(batch_size)
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in batches]


def _linear(task: Task, parts: dict[str, Tensor | None], packing: str) -> Linear:
    """Read one packed matrix.

    Args:
        task: tells the bits.
        parts: its tensors, by their short names.
        packing: which of the layouts it has, as its configuration says.
    """
    assert task.bits is not None
    words, zeros, scales_GO = (_present(parts, name) for name in ("qweight", "qzeros", "scales"))
    if "awq" in packing:
        codes_OI = _interleave(_unpack(words, task.bits)).T
        zeros_GO = _interleave(_unpack(zeros, task.bits))
    else:
        codes_OI = _unpack(words.T, task.bits)
        zeros_GO = _unpack(zeros, task.bits) + int("gptq" in packing)  # stored less one there
    if task.symmetric and not (zeros_GO == 2 ** (task.bits - 1)).all():
        raise ValueError("a symmetric matrix has zero points of its own")
    return Linear(
        weight=dequantize(codes_OI, scales_GO.T, zeros_GO.T),
        kind=f"int{task.bits} g{task.group_size} {'sym' if task.symmetric else 'asym'}",
        num_bits=integer_bits(
            codes_OI.numel(),
            scales_GO.numel(),
            task.bits,
            symmetric=task.symmetric,
            scale_bits=8 * scales_GO.element_size(),
        ),
        stored_bytes=sum(part.nbytes for part in parts.values() if part is not None),
    )


def _present(parts: dict[str, Tensor | None], name: str) -> Tensor:
    tensor = parts[name]
    if tensor is None:
        raise ValueError(f"a quantized matrix has no {name}")
    return tensor


def _interleave(packed_RC: Tensor) -> Tensor:
    """Undo the order in which AutoAWQ packs eight neighbours into a word."""
    plain_RC = packed_RC.reshape(len(packed_RC), -1, 8)[:, :, AWQ_PLACES]
    return plain_RC.reshape(packed_RC.shape)


def _unpack(words_RW: Tensor, bits: int) -> Tensor:
    """Read unsigned integers of ``bits`` bits from each row's words, lowest bits first."""
    words: NDArray[np.int32] = np.ascontiguousarray(words_RW.numpy()).astype("<i4")
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    places = (1 << np.arange(bits)).astype(np.int32)
    return torch.from_numpy(stream.reshape(len(words), -1, bits) @ places)


if __name__ == "__main__":
    main()
