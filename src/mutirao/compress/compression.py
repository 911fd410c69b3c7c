"""Compress a model directory into another that opens from disk, and measure what it cost.

All linear layers of the decoder's blocks are quantized and packed in the public
compressed-tensors layout (see ``formats.compressed_tensors``). Embeddings, the output head and
norms stay in bfloat16: the layout's reader in transformers cannot quantize an embedding that is
tied to the head, and a small model's quality hangs on it. The true bits per weight, embeddings
and scales included, are in the manifest. Where there is text to measure on, the result is opened
from disk and scored beside the original before it counts as written. The whole model is held in
memory while it is compressed.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mutirao.artifact import MANIFEST_NAME, ArtifactWriter, open_artifact, write_artifact
from mutirao.compress.blocks import decoder_blocks, linear_layers, walk_blocks
from mutirao.compress.config import CompressConfig, TextConfig
from mutirao.compress.rounding.gptq import gptq_weight
from mutirao.compress.rounding.grid import QuantizedWeight, best_grid, quantize_weight
from mutirao.compress.loss import measure_loss
from mutirao.compress.windows import Windows, read_windows
from mutirao.console import format_bytes, step_progress, track
from mutirao.environment import release_memory
from mutirao.errors import DataError, InputError
from mutirao.formats.compressed_tensors import load_packed, pack_codes
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.causal import CausalModel

logger = logging.getLogger(__name__)

COARSE_LEVELS = 16
"""A group of 32 weights with at most so many values was rounded before: in bfloat16, weights that
were not have nearly as many values as there are weights."""


def compress_model(
    path: Path,
    out: Path,
    config: CompressConfig,
    *,
    text: Path | None = None,
    text_config: TextConfig | None = None,
) -> dict[str, Any]:
    """Write a compressed copy of a model as an artifact of kind 'model'.

    Its manifest's metrics say ``weight_bits`` (bits per code), ``bits_per_weight`` (all
    stored tensors over all weights), ``total_bytes``, ``original_bytes`` (the same weights
    in bfloat16), ``num_weights`` and, with text, ``compress_s`` and the fields of
    ``loss.CompressionLoss`` under ``heldout.``.

    Args:
        path: model artifact, or any Hugging Face directory.
        out: folder of the new artifact.
        config: see ``CompressConfig``.
        text: a folder or a file of text like what the model is for: a part for methods to look
            at, another to measure the result on; None for methods that need none.
        text_config: how much of it; default ``TextConfig()``.

    Returns:
        The manifest's metrics.

    Raises:
        InputError: the model is quantized already, the method needs text and has none, or the
            model takes no windows so long.
        DataError: there is too little text, or weights are not finite.
        ArtifactError: ``path`` was altered since it was written.
        FormatError: ``path`` is no model, or of a kind that is not supported.
        ShapeError: the group size does not divide a layer's inputs.
        DiskFullError: no room; ``out`` is as it was.
    """
    _refuse_quantized(path)
    if text is None and config.method == "gptq":
        raise InputError(
            "compress.method=gptq looks at text and none was given; name some with --text, or "
            "take method rtn"
        )
    is_artifact = (path / MANIFEST_NAME).is_file()
    if is_artifact:
        open_artifact(path, "model")
    text_config = text_config or TextConfig()
    model, tokenizer = load_causal_lm(path, dtype="bfloat16")
    windows = None
    if text is not None:
        windows = read_windows(text, CausalModel(model, tokenizer, name=path.name), text_config)
    recipe = {"compress": config.model_dump(mode="json")}
    if text is not None:
        recipe["text"] = text_config.model_dump(mode="json")
    with write_artifact(out, "model", recipe=recipe) as writer:
        if is_artifact:
            writer.add_parent("model", path)
        started = time.monotonic()
        calibration_WT = None if windows is None else windows.calibration
        tensors = compress_tensors(model, config, calibration_WT)
        save_file(tensors, writer.path / "model.safetensors", metadata={"format": "pt"})
        writer.metrics.update(_measure(model, tensors, config))
        if windows is not None:
            writer.metrics["compress_s"] = round(time.monotonic() - started, 2)
        _write_companions(writer, model, tokenizer, config)
        del tensors, model
        release_memory()
        if windows is not None:
            writer.metrics.update(_measure_again(path, writer.path, windows))
    return dict(open_artifact(out, "model").metrics)


def compress_tensors(
    model: Any, config: CompressConfig, calibration_WT: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what is stored: packed linear layers, and the rest in bfloat16.

    Args:
        model: a transformers causal model; method 'gptq' replaces its weights by rounded ones.
        config: see ``CompressConfig``.
        calibration_WT: (W, T) token ids for methods that look at text.

    Raises:
        DataError: a weight is not finite.
        FormatError: the model is of a kind that is not supported.
        ShapeError: the group size does not divide a layer's inputs.
    """
    layers = linear_layers(model)
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise DataError(f"weights of {name} are not finite; the model is damaged")
    _warn_of_coarse_weights(layers)
    if config.method == "gptq":
        assert calibration_WT is not None
        quantized = _by_blocks(model, config, calibration_WT)
    else:
        label = f"compressing to {config.bits} bits"
        quantized = {
            name: quantize_weight(layer.weight.detach(), config.bits, config.group_size)
            for name, layer in track(layers.items(), label, len(layers))
        }
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized.items():
        tensors |= _pack(name, weight, config.bits)
    packed_weights = {f"{name}.weight" for name in layers}
    for name, parameter in model.named_parameters():  # a tied head is listed once
        if name not in packed_weights:
            tensors[name] = parameter.detach().to(torch.bfloat16).contiguous()
    return tensors


def _refuse_quantized(path: Path) -> None:
    """Raise for a model whose config.json says that its weights are quantized, in any way."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # loading it says what is wrong
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise InputError(
            f"{path} is compressed already ({method or 'by an unnamed method'}); compress the "
            "model it was made from"
        )


def _warn_of_coarse_weights(layers: dict[str, nn.Linear]) -> None:
    """Say so where weights were rounded to a few values before, and then expanded."""
    name, layer = next(iter(layers.items()))
    rows_OI = layer.weight.detach()[:64].float()
    groups_N32 = rows_OI[:, : rows_OI.shape[1] // 32 * 32].reshape(-1, 32).sort(dim=1).values
    levels_N = 1 + (groups_N32.diff(dim=1) != 0).sum(dim=1)
    if len(levels_N) and float((levels_N <= COARSE_LEVELS).float().mean()) > 0.9:
        logger.warning(
            "weights of %s have at most %d values in every group of 32: the model was rounded "
            "before. Losses are measured from that model, not from the one it was made from, and "
            "4 bits on the same groups are no test",
            name,
            COARSE_LEVELS,
        )


def _by_blocks(
    model: Any, config: CompressConfig, calibration_WT: Tensor
) -> dict[str, QuantizedWeight]:
    """Round block after block, each by what it sees of the text behind the rounded ones."""
    quantized: dict[str, QuantizedWeight] = {}
    with step_progress() as progress:
        num_blocks = len(decoder_blocks(model))
        bar = progress.add_task(f"compressing to {config.bits} bits", total=num_blocks)

        def visit(prefix: str, block: nn.Module, grams: Any) -> None:
            for name, gram_II in grams.items():
                layer: Any = block.get_submodule(name)
                grid = best_grid(layer.weight, config.bits, config.group_size, gram_II.diagonal())
                codes = gptq_weight(layer.weight, gram_II, grid, config.bits)
                layer.weight.data.copy_(codes.expand())
                quantized[f"{prefix}.{name}"] = codes
            progress.advance(bar)

        walk_blocks(model.to(getattr(torch, fast_dtype())), calibration_WT, visit)
    return quantized


def _pack(name: str, weight: QuantizedWeight, bits: int) -> dict[str, Tensor]:
    zero_point = pack_codes(weight.zero.T.contiguous(), bits).T
    return {
        f"{name}.weight_packed": pack_codes(weight.codes, bits),
        f"{name}.weight_scale": weight.scale,
        f"{name}.weight_zero_point": zero_point.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.codes.shape),
    }


def _measure_again(path: Path, compressed: Path, windows: Windows) -> dict[str, float]:
    """Open what was written and score it beside the original."""
    original, _ = load_causal_lm(path, dtype=fast_dtype())
    reopened, _ = load_packed(compressed, dtype=fast_dtype())
    found = measure_loss(original, reopened, windows.heldout)
    return {f"heldout.{name}": value for name, value in found._asdict().items()}


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
    how = "rounded to nearest" if config.method == "rtn" else "rounded by GPTQ"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [compressed-tensors, {config.bits}-bit]\n---\n\n"
        f"# Model compressed to {config.bits} bits\n\n"
        f"The linear layers are {how}, {config.bits} bits per code, in groups of "
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
