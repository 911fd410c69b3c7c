"""Compress a model directory into another that opens from disk, and measure what it cost.

What is done is a row of steps (see ``config``): some change the model, and the last may round the
linear layers of the decoder's blocks to few bits. Codes and FP8 are stored in the public
compressed-tensors layout (see ``formats.compressed_tensors``), NF4 in that of bitsandbytes; a
model that is not rounded is a plain one in bfloat16. Embeddings, the output head and norms stay in
bfloat16: the readers in transformers cannot quantize an embedding that is tied to the head, and a
small model's quality hangs on it. The true bits per weight, embeddings and scales included, are in
the manifest. Where there is text to measure on, the result is opened from disk and scored beside
the original before it counts as written. The whole model is held in memory while it is compressed.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mutirao.artifact import MANIFEST_NAME, open_artifact, write_artifact
from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import TUNE, CompressConfig, TextConfig
from mutirao.compress.loss import measure_loss
from mutirao.compress.rounding.nf4 import import_functional
from mutirao.compress.shrinking.sharing import named_weights
from mutirao.compress.steps import bits_by_layer, change_model, check_finite, round_model
from mutirao.compress.training.following import import_optional
from mutirao.compress.training.students import check_student
from mutirao.compress.windows import Windows, read_windows
from mutirao.compress.writing import count_zeros, ideal_bytes, stored_tensors, write_companions
from mutirao.environment import release_memory
from mutirao.errors import InputError
from mutirao.formats.compressed_tensors import is_packed, load_packed
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

    Its manifest's metrics say ``weight_bits`` (bits per code, or their mean over the weights that
    were rounded), ``bits_per_weight`` (all
    stored tensors over all weights), ``total_bytes``, ``original_bytes`` (the original's
    weights in bfloat16), ``num_weights``, ``compress_s``, ``peak_memory_bytes`` (of the whole
    process so far, measuring included), ``ideal_bytes`` where a format for pruned, low-rank or
    shared weights would take less, and, with text, the fields of ``loss.CompressionLoss`` under
    ``heldout.``.

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
        InputError: the model is quantized already, the method needs text or a package and has
            none, the model takes no windows so long, it lacks a layer whose bits are given, or a
            student of it cannot be made so.
        DataError: there is too little text, or weights are not finite.
        ArtifactError: ``path`` was altered since it was written.
        FormatError: ``path`` is no model, or of a kind that is not supported.
        ShapeError: the group size does not divide a layer's inputs.
        DiskFullError: no room; ``out`` is as it was.
    """
    refuse_quantized(path)
    _refuse_incomplete(config, text)
    is_artifact = (path / MANIFEST_NAME).is_file()
    if is_artifact:
        open_artifact(path, "model")
    check_student(path, config)
    text_config = text_config or TextConfig()
    model, tokenizer = load_causal_lm(path, dtype="bfloat16")
    windows = None
    if text is not None:
        windows = read_windows(text, CausalModel(model, tokenizer, name=path.name), text_config)
    recipe = {"compress": config.model_dump(mode="json", exclude_none=True)}
    if text is not None:
        recipe["text"] = text_config.model_dump(mode="json")
    with write_artifact(out, "model", recipe=recipe) as writer:
        if is_artifact:
            writer.add_parent("model", path)
        started = time.monotonic()
        model, tensors, metrics = _compress(model, tokenizer, path, config, windows)
        save_file(tensors, writer.path / "model.safetensors", metadata={"format": "pt"})
        writer.metrics.update(metrics)
        writer.metrics["compress_s"] = round(time.monotonic() - started, 2)
        write_companions(writer, model, tokenizer, config)
        del tensors, model
        release_memory()
        if windows is not None:
            writer.metrics.update(_measure_again(path, writer.path, windows))
        writer.metrics["peak_memory_bytes"] = _peak_memory_bytes()
    return dict(open_artifact(out, "model").metrics)


def _compress(
    model: Any, tokenizer: Any, path: Path, config: CompressConfig, windows: Windows | None
) -> tuple[Any, dict[str, Tensor], dict[str, int | float]]:
    """Run all steps; return the model, what is stored of it, and what that takes."""
    check_finite(model)
    bits_by_layer(model, config)  # refuses names before anything is done
    coarse = coarse_weights(linear_layers(model))
    if coarse is not None:
        logger.warning(coarse)
    original_bytes = 2 * _count_weights(model)
    calibration_WT = None if windows is None else windows.calibration
    model = change_model(model, tokenizer, path, config, calibration_WT)
    zeros = count_zeros(model)
    parts = round_model(model, config, calibration_WT, path)
    tensors = stored_tensors(model, parts)
    num_weights = _count_weights(model)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    metrics: dict[str, int | float] = {
        "weight_bits": _mean_bits(model, config),
        "bits_per_weight": 8 * total_bytes / num_weights,
        "total_bytes": total_bytes,
        "original_bytes": original_bytes,
        "num_weights": num_weights,
    }
    ideal = ideal_bytes(model, parts, zeros, total_bytes)
    if ideal != total_bytes:
        metrics["ideal_bytes"] = ideal
    return model, tensors, metrics


def _mean_bits(model: Any, config: CompressConfig) -> int | float:
    """Return the bits per code; their mean over the weights of the blocks where they differ."""
    bits, layers = bits_by_layer(model, config), linear_layers(model)
    if len(widths := set(bits.values())) == 1:
        return widths.pop()
    num_weights = sum(layer.weight.numel() for layer in layers.values())
    return sum(bits[name] * each.weight.numel() for name, each in layers.items()) / num_weights


def _count_weights(model: Any) -> int:
    """Count weights as a file holds them: those that blocks share for each, a tied head once."""
    return sum(weight.numel() for weight in named_weights(model).values())


def _peak_memory_bytes() -> int:
    """Return the largest memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux says it in KiB


def _refuse_incomplete(config: CompressConfig, text: Path | None) -> None:
    """Raise where a step lacks text, or its package, before anything is loaded."""
    if text is None and config.needs_text:
        step = config.needs_text[0]
        hint = "; name some with --text"
        if config.method == step:
            hint += ", or take method magnitude" if step == "wanda" else ", or take method rtn"
        raise InputError(
            f"compress.method={config.method}: {step} looks at text and none was given{hint}"
        )
    if config.rounder == "nf4":
        import_functional()
    if not {"distill", "qat", TUNE}.isdisjoint(config.steps):
        import_optional("teacher_trainer", "TRL")
    if "qat" in config.steps:
        import_optional("fake_rounding", "torchao")


def refuse_quantized(path: Path) -> None:
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


def coarse_weights(layers: Mapping[str, nn.Linear]) -> str | None:
    """Return what to know of weights that were rounded to a few values before, and then expanded.

    Returns:
        A sentence without its full stop; None where the first layer's weights are not of that kind.
    """
    name, layer = next(iter(layers.items()))
    rows_OI = layer.weight.detach()[:64].float()
    groups_N32 = rows_OI[:, : rows_OI.shape[1] // 32 * 32].reshape(-1, 32).sort(dim=1).values
    levels_N = 1 + (groups_N32.diff(dim=1) != 0).sum(dim=1)
    if not len(levels_N) or float((levels_N <= COARSE_LEVELS).float().mean()) <= 0.9:
        return None
    return (
        f"weights of {name} have at most {COARSE_LEVELS} values in every group of 32: the model "
        "was rounded before. Losses are measured from that model, not from what it was made from, "
        "and 4 bits on the same groups are no test"
    )


def _measure_again(path: Path, compressed: Path, windows: Windows) -> dict[str, float]:
    """Open what was written and score it beside the original."""
    original, _ = load_causal_lm(path, dtype=fast_dtype())
    load = load_packed if is_packed(compressed) else load_causal_lm
    reopened, _ = load(compressed, dtype=fast_dtype())
    found = measure_loss(original, reopened, windows.heldout)
    return {f"heldout.{name}": value for name, value in found._asdict().items()}
