"""Round to nearest: compress a model directory into another that opens from disk.

No data is seen and nothing is corrected afterwards: this is the baseline that better
methods are measured against. All linear layers of the decoder are quantized and packed in
the public compressed-tensors layout (see ``models.packed``). Embeddings, the output head
and norms stay in bfloat16: the layout's reader in transformers cannot quantize an embedding
that is tied to the head, and a small model's quality hangs on it. The true bits per weight,
embeddings and scales included, are in the manifest. The whole model is held in memory while
it is compressed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mutirao.artifact import MANIFEST_NAME, ArtifactWriter, open_artifact, write_artifact
from mutirao.compress.config import CompressConfig
from mutirao.compress.grid import quantize_weight
from mutirao.console import format_bytes, track
from mutirao.errors import InputError
from mutirao.formats.compressed_tensors import is_packed, pack_codes
from mutirao.formats.huggingface import load_causal_lm


def compress_model(path: Path, out: Path, config: CompressConfig) -> None:
    """Write a compressed copy of a model as an artifact of kind 'model'.

    Its manifest's metrics say ``weight_bits`` (bits per code), ``bits_per_weight`` (all
    stored tensors over all weights), ``total_bytes``, ``original_bytes`` (the same weights
    in bfloat16) and ``num_weights``.

    Args:
        path: model artifact, or any Hugging Face directory.
        out: folder of the new artifact.
        config: see ``CompressConfig``.

    Raises:
        InputError: the model is compressed already.
        ArtifactError: ``path`` was altered since it was written.
        FormatError: ``path`` is no model.
        ShapeError: the group size does not divide a layer's inputs.
        DiskFullError: no room; ``out`` is as it was.
    """
    if is_packed(path):
        raise InputError(f"{path} is compressed already; compress the model it was made from")
    is_artifact = (path / MANIFEST_NAME).is_file()
    if is_artifact:
        open_artifact(path, "model")
    model, tokenizer = load_causal_lm(path, dtype="bfloat16")
    recipe = {"compress": config.model_dump(mode="json")}
    with write_artifact(out, "model", recipe=recipe) as writer:
        if is_artifact:
            writer.add_parent("model", path)
        tensors = compress_tensors(model, config)
        save_file(tensors, writer.path / "model.safetensors", metadata={"format": "pt"})
        writer.metrics.update(_measure(model, tensors, config))
        _write_companions(writer, model, tokenizer, config)


def compress_tensors(model: Any, config: CompressConfig) -> dict[str, Tensor]:
    """Return what is stored: packed linear layers, and the rest in bfloat16.

    Args:
        model: a transformers causal model; unchanged.
        config: see ``CompressConfig``.

    Raises:
        ShapeError: the group size does not divide a layer's inputs.
    """
    layers = _linear_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in track(layers.items(), f"compressing to {config.bits} bits", len(layers)):
        quantized = quantize_weight(layer.weight.detach(), config.bits, config.group_size)
        zero_point = pack_codes(quantized.zero.T.contiguous(), config.bits).T
        tensors[f"{name}.weight_packed"] = pack_codes(quantized.codes, config.bits)
        tensors[f"{name}.weight_scale"] = quantized.scale
        tensors[f"{name}.weight_zero_point"] = zero_point.contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(layer.weight.shape)
    packed_weights = {f"{name}.weight" for name in layers}
    for name, parameter in model.named_parameters():  # a tied head is listed once
        if name not in packed_weights:
            tensors[name] = parameter.detach().to(torch.bfloat16).contiguous()
    return tensors


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Linear layers by name, the output head left out."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _measure(
    model: Any, tensors: dict[str, Tensor], config: CompressConfig
) -> dict[str, int | float]:
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "weight_bits": config.bits,
        "bits_per_weight": 8 * total_bytes / num_weights,
        "total_bytes": total_bytes,
        "original_bytes": 2 * num_weights,
        "num_weights": num_weights,
    }


def _write_companions(
    writer: ArtifactWriter, model: Any, tokenizer: Any, config: CompressConfig
) -> None:
    """Write all that a model directory has beside its weights."""
    model.config.quantization_config = _quantization_config(config)
    model.config.save_pretrained(str(writer.path))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(writer.path))
    tokenizer.save_pretrained(str(writer.path))
    (writer.path / "README.md").write_text(_model_card(writer, config), encoding="utf-8")


def _quantization_config(config: CompressConfig) -> dict[str, Any]:
    weights = {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": config.group_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def _model_card(writer: ArtifactWriter, config: CompressConfig) -> str:
    total_bytes = float(str(writer.metrics["total_bytes"]))
    original_bytes = float(str(writer.metrics["original_bytes"]))
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [compressed-tensors, {config.bits}-bit]\n---\n\n"
        f"# Model compressed to {config.bits} bits\n\n"
        f"The linear layers are rounded to nearest, {config.bits} bits per code, in groups of "
        f"{config.group_size} with a 16-bit scale and a {config.bits}-bit zero point; "
        "embeddings, head and norms are in bfloat16. "
        f"All weights take {format_bytes(total_bytes)} "
        f"({writer.metrics['bits_per_weight']:.2f} bits per weight), against "
        f"{format_bytes(original_bytes)} in bfloat16.\n\n"
        "The layout is compressed-tensors, format pack-quantized: transformers opens it where "
        "the package compressed-tensors (0.20 or newer) is installed, Mutirão without it. "
        "Weights are expanded when the model is opened, so that it takes as much memory as "
        "the original. `manifest.json` says what it was made from.\n"
    )
