"""The steps of a compression, run in order: those that change a model, and the one that rounds it.

Each step is one function of its own module, imported when it is asked for.

Shapes: W windows, T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutirao.compress.blocks import linear_layers
from mutirao.compress.config import GRID_ROUNDERS, CompressConfig, PruneConfig, TuneConfig
from mutirao.compress.rounding.by_blocks import round_by_blocks
from mutirao.compress.rounding.fp8 import quantize_fp8
from mutirao.compress.rounding.grid import QuantizedWeight, name_bits, quantize_weight
from mutirao.compress.rounding.nf4 import quantize_nf4
from mutirao.console import track
from mutirao.errors import DataError, InputError
from mutirao.formats.compressed_tensors import pack_codes
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models.arithmetic import fast_dtype

LayerParts = dict[str, dict[str, Tensor]]
"""What is stored of each rounded layer, by the layer's name and the end of the tensor's."""


def change_model(
    model: Any, tokenizer: Any, path: Path, config: CompressConfig, ids_WT: Tensor | None
) -> Any:
    """Run all steps that leave floating-point weights.

    Args:
        model: a transformers causal model, changed in place where the steps can.
        tokenizer: its own.
        path: what it was read from, for a step that compares with it.
        config: see ``CompressConfig``.
        ids_WT: (W, T) token ids of calibration text, for the steps that need some.

    Returns:
        The model after the last of these steps: another one after distillation.

    Raises:
        MutiraoError: see the functions of the steps.
    """
    for index, step in enumerate(config.changers):
        model = model.to(getattr(torch, fast_dtype()))
        model = _change(step, model, tokenizer, path if index else None, config, ids_WT)
    return model


def _change(
    step: str,
    model: Any,
    tokenizer: Any,
    original: Path | None,
    config: CompressConfig,
    ids_WT: Tensor | None,
) -> Any:
    """Run one step; ``original`` is None where the model was not changed yet."""
    if step in ("wanda", "magnitude"):
        from mutirao.compress.shrinking.pruning import prune

        settings = config.prune or PruneConfig()
        prune(model, ids_WT, settings.model_copy(update={"method": step}))
        return model
    if step == "share":
        from mutirao.compress.shrinking.sharing import share_blocks

        assert config.sharing is not None
        share_blocks(model, config.sharing)
        return model
    assert ids_WT is not None
    if step == "svd":
        from mutirao.compress.shrinking.low_rank import lower_rank

        assert config.low_rank is not None
        lower_rank(model, ids_WT, config.low_rank)
        return model
    if step == "qat":
        from mutirao.compress.training.quantized_training import train_quantized

        assert config.quantized_training is not None
        train_quantized(model, ids_WT, config.quantized_training)
        return model
    return _distill(model, tokenizer, original, config, ids_WT)


def _distill(
    model: Any, tokenizer: Any, original: Path | None, config: CompressConfig, ids_WT: Tensor
) -> Any:
    """Return a student of the model, or the model after it learned from what it was made from."""
    from mutirao.compress.training.distillation import distill

    assert config.distillation is not None
    if original is None:
        return distill(model, tokenizer, ids_WT, config.distillation)
    teacher, _ = load_causal_lm(original, dtype=fast_dtype())
    return distill(teacher, tokenizer, ids_WT, config.distillation, student=model)


def round_model(
    model: Any, config: CompressConfig, ids_WT: Tensor | None, original: Path
) -> LayerParts:
    """Round the linear layers of a decoder's blocks, and tune the grids where that is asked for.

    Args:
        model: a transformers causal model; methods that look at text replace its weights by rounded
            ones, and AWQ changes norms and biases too.
        config: see ``CompressConfig``.
        ids_WT: (W, T) token ids of calibration text, for the methods that need some.
        original: the model that tuning follows.

    Returns:
        What is stored of each layer; nothing where the method does not round.

    Raises:
        DataError: a weight, or a layer's input, is not finite.
        FormatError: the model is of a kind that is not supported.
        InputError: a package that the method needs is not installed, or see ``bits_by_layer``.
        ShapeError: the group size does not divide a layer's inputs.
    """
    check_finite(model)
    rounder = config.rounder
    if rounder is None:
        return {}
    bits = bits_by_layer(model, config)
    if rounder in GRID_ROUNDERS:
        codes = _codes(model, config, bits, ids_WT)
        if config.tuning is not None:
            assert ids_WT is not None
            codes = _tune(model, codes, original, config.tuning, ids_WT)
        return {name: _pack(codes.pop(name), bits[name]) for name in list(codes)}
    quantize = _fp8_parts if rounder == "fp8" else quantize_nf4
    return {name: quantize(weight_OI) for name, weight_OI in _weights(model, bits)}


def _codes(
    model: Any, config: CompressConfig, bits: dict[str, int], ids_WT: Tensor | None
) -> dict[str, QuantizedWeight]:
    """Return the codes of all layers and the grids they stand on."""
    assert config.rounder is not None
    if config.rounder != "rtn":
        assert ids_WT is not None
        return round_by_blocks(model, config.rounder, bits, config.group_size, ids_WT)
    return {
        name: quantize_weight(weight_OI, bits[name], config.group_size)
        for name, weight_OI in _weights(model, bits)
    }


def _weights(model: Any, bits: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Give each layer's name and (O, I) weight, with a progress bar."""
    layers = linear_layers(model)
    label = f"compressing to {name_bits(bits.values())}"
    for name, layer in track(layers.items(), label, len(layers)):
        yield name, layer.weight.detach()


def _fp8_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    values, scale = quantize_fp8(weight_OI)
    return {"weight": values, "weight_scale": scale}


def _tune(
    model: Any,
    codes: dict[str, QuantizedWeight],
    original: Path,
    config: TuneConfig,
    ids_WT: Tensor,
) -> dict[str, QuantizedWeight]:
    from mutirao.compress.training.tuning import tune_grids

    teacher, _ = load_causal_lm(original, dtype=fast_dtype())
    return tune_grids(model, codes, teacher, ids_WT, config)


def bits_by_layer(model: Any, config: CompressConfig) -> dict[str, int]:
    """Return the bits per code of all linear layers of a decoder's blocks.

    Raises:
        FormatError: the model is of a kind that is not supported.
        InputError: the configuration names a layer that the model does not have, or gives layers
            that share their weights different bits.
    """
    layers, given = linear_layers(model), config.layer_bits or {}
    if unknown := [name for name in given if name not in layers]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"compress.layer_bits names {unknown[0][:100]}{more}, which is no linear layer of the "
            f"model's blocks (expected names such as {next(iter(layers))})"
        )
    bits = {name: given.get(name, config.bits) for name in layers}
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        if bits[other] != bits[name]:
            raise InputError(
                f"compress.layer_bits has {bits[other]} bits for {other} and {bits[name]} for "
                f"{name}, which share their weights; give them the same"
            )
    return bits


def check_finite(model: Any) -> None:
    """Refuse a model with weights that are no numbers.

    Raises:
        DataError: there are some, in blocks or outside of them.
    """
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            layer = name.removesuffix(".weight")
            raise DataError(f"weights of {layer} are not finite; the model is damaged")


def _pack(weight: QuantizedWeight, bits: int) -> dict[str, Tensor]:
    zero_point = pack_codes(weight.zero.T.contiguous(), bits).T
    return {
        "weight_packed": pack_codes(weight.codes, bits),
        "weight_scale": weight.scale.clone(),  # blocks that share a weight share its codes
        "weight_zero_point": zero_point.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
