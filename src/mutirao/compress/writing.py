"""A compressed model as a folder: its tensors, how they are to be read, and its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mutirao.artifact import ArtifactWriter
from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import GRID_ROUNDERS, CompressConfig
from mutirao.compress.rounding.grid import name_bits
from mutirao.compress.shrinking.sharing import named_weights
from mutirao.compress.shrinking.sizes import SPARSE_SHARE, stored_parameters
from mutirao.compress.steps import LayerParts, bits_by_layer
from mutirao.console import format_bytes
from mutirao.formats.layer_bits import EVERY_LAYER

SENTENCES = {
    "wanda": "Weights were pruned by Wanda.",
    "magnitude": "The smallest weights were pruned.",
    "svd": "Matrices were replaced by low-rank products (SVD-LLM), which are stored multiplied.",
    "share": "Neighbouring blocks share their matrices, which are stored once for each.",
    "distill": "It was trained to predict what its original predicts.",
    "qat": "It was trained with weights as they are once rounded.",
}
ROUNDINGS = {
    "rtn": "rounded to nearest",
    "gptq": "rounded by GPTQ",
    "awq": "scaled by AWQ and rounded to nearest",
    "awq,gptq": "scaled by AWQ and rounded by GPTQ",
}


def stored_tensors(model: Any, parts: LayerParts) -> dict[str, Tensor]:
    """Return what is written: rounded layers by their parts, the rest in bfloat16."""
    tensors = {f"{name}.{end}": part for name, all_ in parts.items() for end, part in all_.items()}
    rounded = {f"{name}.weight" for name in parts}
    for name, weight in named_weights(model).items():
        if name not in rounded:
            tensors[name] = weight.to(torch.bfloat16).contiguous()
    return tensors


def count_zeros(model: Any) -> dict[str, int]:
    """Return how many weights of each linear layer are zero."""
    return {
        name: layer.weight.numel() - int(torch.count_nonzero(layer.weight))
        for name, layer in linear_layers(model).items()
    }


def ideal_bytes(model: Any, parts: LayerParts, zeros: dict[str, int], total_bytes: int) -> int:
    """Return what a format for pruned, low-rank and shared weights would take, in bytes.

    Such a format holds shared weights once; of a layer with a quarter of zeros, the other weights
    and one bit for each place; and, where nothing was rounded, low-rank factors.

    Args:
        model: whose parameters the blocks share as they do.
        parts: what is stored of its layers; none where it was not rounded.
        zeros: weights that are zero, by layer, before rounding: what only rounds to zero is a code
            like others.
        total_bytes: what the written tensors take.
    """
    if not parts:
        return 2 * stored_parameters(model)
    bits_saved = 0
    seen: set[int] = set()
    for name, layer in linear_layers(model).items():
        num_weights = layer.weight.numel()
        if id(layer.weight) in seen:
            bits_saved += 8 * sum(part.nbytes for part in parts[name].values())
        elif zeros[name] >= SPARSE_SHARE * num_weights:
            codes = next(
                parts[name][end] for end in ("weight_packed", "weight") if end in parts[name]
            )
            bits_saved += max(0, 8 * codes.nbytes * zeros[name] // num_weights - num_weights)
        seen.add(id(layer.weight))
    return total_bytes - bits_saved // 8


def write_companions(
    writer: ArtifactWriter, model: Any, tokenizer: Any, config: CompressConfig
) -> None:
    """Write all that a model directory has beside its weights; metrics must be there."""
    model.config.dtype = torch.bfloat16
    bits = bits_by_layer(model, config)
    quantization = quantization_config(config, bits)
    if quantization is not None:
        model.config.quantization_config = quantization
    model.config.save_pretrained(str(writer.path))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(writer.path))
    tokenizer.save_pretrained(str(writer.path))
    (writer.path / "README.md").write_text(_model_card(writer, config, bits), encoding="utf-8")


def quantization_config(config: CompressConfig, bits: Mapping[str, int]) -> dict[str, Any] | None:
    """Return what ``config.json`` says of how weights are to be read.

    Args:
        config: see ``CompressConfig``.
        bits: per code, of each linear layer of the blocks.

    Returns:
        None for plain weights.
    """
    if config.rounder is None:
        return None
    if config.rounder == "nf4":
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    weights: dict[str, Any] = {"type": "float", "symmetric": True, "strategy": "channel"}
    if config.rounder in GRID_ROUNDERS:
        weights = {"type": "int", "symmetric": False, "strategy": "group"}
        weights |= {"group_size": config.group_size}
    widths = sorted(set(bits.values()))
    names = {width: [name for name in bits if bits[name] == width] for width in widths}
    groups = [
        {
            "targets": [EVERY_LAYER] if len(widths) == 1 else names[width],
            "weights": {"num_bits": width, **weights},
        }
        for width in widths
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if config.rounder == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": ["lm_head"],
    }


def _model_card(writer: ArtifactWriter, config: CompressConfig, bits: Mapping[str, int]) -> str:
    total_bytes = float(str(writer.metrics["total_bytes"]))
    original_bytes = float(str(writer.metrics["original_bytes"]))
    widths = ", ".join(f"{width}-bit" for width in sorted(set(bits.values())))
    tags = {"nf4": "[bitsandbytes, 4-bit]", "fp8": "[compressed-tensors, fp8]"}.get(
        config.rounder or "", f"[compressed-tensors, {widths}]"
    )
    title = "# Model compressed" + (f" to {name_bits(bits.values())}" if config.rounder else "")
    changes = " ".join(SENTENCES[step] for step in config.changers)
    body = [
        title,
        *([changes] if changes else []),
        f"{_weights_sentence(writer, config, bits)} All weights take {format_bytes(total_bytes)} "
        f"({writer.metrics['bits_per_weight']:.2f} bits per weight), against "
        f"{format_bytes(original_bytes)} in bfloat16.",
        f"{_readers_sentence(config)} `manifest.json` says what it was made from.",
    ]
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"tags: {tags}"] if config.rounder else []
    return "\n".join(["---", *front, "---", ""]) + "\n" + "\n\n".join(body) + "\n"


def _weights_sentence(
    writer: ArtifactWriter, config: CompressConfig, bits: Mapping[str, int]
) -> str:
    rest = "embeddings, head and norms are in bfloat16."
    if config.rounder is None:
        return "All weights are in bfloat16."
    if config.rounder == "nf4":
        return f"The linear layers are in NF4 with double quantization; {rest}"
    if config.rounder == "fp8":
        return f"The linear layers are in FP8 (E4M3) with a 16-bit scale per output; {rest}"
    tuned = " Scales were then trained to predict what its original predicts."
    tuned = tuned if config.tuning is not None else ""
    counts = Counter(bits.values())
    width = next(iter(counts))
    codes, zero_point = f"{width} bits per code", f"a {width}-bit zero point"
    if len(counts) > 1:
        mix = ", ".join(f"{counts[width]} layers in {width} bits" for width in sorted(counts))
        mean = float(str(writer.metrics["weight_bits"]))
        codes = f"{mean:.2f} bits per code in the mean ({mix}: `config.json` names them)"
        zero_point = "a zero point as wide as a code"
    return (
        f"The linear layers are {ROUNDINGS[config.rounder]}, {codes}, in groups of "
        f"{config.group_size} with a 16-bit scale and {zero_point}; {rest}{tuned}"
    )


def _readers_sentence(config: CompressConfig) -> str:
    if config.rounder is None:
        return "Any library that reads safetensors opens it."
    if config.rounder == "nf4":
        return (
            "The layout is bitsandbytes': transformers opens it where that package is installed, "
            "and so does Mutirão."
        )
    layout = "float-quantized" if config.rounder == "fp8" else "pack-quantized"
    return (
        f"The layout is compressed-tensors, format {layout}: transformers opens it where the "
        "package compressed-tensors (0.20 or newer) is installed, Mutirão without it. Weights are "
        "expanded when the model is opened, so that it takes as much memory as the original."
    )
