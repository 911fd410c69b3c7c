"""Compressed weights in the public compressed-tensors layout: "pack-quantized", "float-quantized".

A linear layer in format "pack-quantized" is four tensors: ``weight_packed`` (codes of a few bits,
packed without gaps into 32-bit words along the input), ``weight_scale``, ``weight_zero_point``
(packed along the output) and ``weight_shape``. In format "float-quantized" it is two: ``weight``
in FP8 (E4M3) and ``weight_scale``, one for each output. ``config.json`` says how to read them
under ``quantization_config``. transformers opens such a folder where the package
compressed-tensors (0.20 or newer; older ones lay out 3 bits otherwise) is installed; the
reader here does without it. Weights are expanded when read: what is saved is disk and
transfer, not memory. Only integer codes in groups are read, with or without zero points, each
layer in its own number of bits (see ``layer_bits``), and FP8 with a scale per output; and
bitsandbytes' NF4, see ``nf4``.

Shapes: O outputs, I inputs, G groups of inputs, W words.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mutirao.errors import FormatError
from mutirao.formats.huggingface import Dtype, without_progress_bars
from mutirao.formats.layer_bits import LayerBits, read_layer_bits
from mutirao.formats.nf4 import STATE_SUFFIX, expand_nf4, is_nf4


def pack_codes(codes_OI: Tensor, num_bits: int) -> Tensor:
    """Pack unsigned codes along the last dimension, lowest bits first, without gaps.

    Args:
        codes_OI: (O, I) uint8, each below 2 ** num_bits.
        num_bits: bits per code, 1 to 8.

    Returns:
        (O, W) int32 with W = ceil(I * num_bits / 32).
    """
    num_rows, num_codes = codes_OI.shape
    shifts = np.arange(num_bits, dtype=np.uint8)
    bits = (codes_OI.numpy()[..., None] >> shifts) & 1
    num_words = math.ceil(num_codes * num_bits / 32)
    stream = np.zeros((num_rows, num_words * 32), dtype=np.uint8)
    stream[:, : num_codes * num_bits] = bits.reshape(num_rows, -1)
    words = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))


def unpack_codes(words_OW: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Undo ``pack_codes``.

    Args:
        words_OW: (O, W) int32.
        num_bits: bits per code, 1 to 8.
        num_codes: codes per row, I.

    Returns:
        (O, I) uint8.

    Raises:
        FormatError: a row has too few words for so many codes.
    """
    num_rows, num_words = words_OW.shape
    if num_words * 32 < num_codes * num_bits:
        raise FormatError(
            f"a packed weight has {num_words} words per row (expected "
            f"{math.ceil(num_codes * num_bits / 32)} for {num_codes} codes of {num_bits} bits)"
        )
    octets = np.ascontiguousarray(words_OW.numpy().astype("<i4")).view(np.uint8)
    stream: NDArray[np.uint8] = np.unpackbits(octets, axis=1, bitorder="little")
    bits = stream[:, : num_codes * num_bits].reshape(num_rows, num_codes, num_bits)
    return torch.from_numpy(np.packbits(bits, axis=2, bitorder="little")[..., 0])


def expand_weight(
    packed_OW: Tensor,
    scale_OG: Tensor,
    zero_point: Tensor | None,
    shape: tuple[int, int],
    num_bits: int,
) -> Tensor:
    """Return the (O, I) float32 weight that a compressed layer stands for.

    Args:
        packed_OW: (O, W) int32 packed codes.
        scale_OG: (O, G) step between codes.
        zero_point: (ceil(O * num_bits / 32), G) int32 packed codes of zero, or None where
            zero is the middle code.
        shape: (O, I) of the weight.
        num_bits: bits per code.

    Raises:
        FormatError: the tensors do not fit together.
    """
    num_outputs, num_inputs = shape
    num_groups = scale_OG.shape[-1]
    num_words, zero_words = (math.ceil(each * num_bits / 32) for each in (num_inputs, num_outputs))
    fits = packed_OW.shape == (num_outputs, num_words) and len(scale_OG) == num_outputs
    fits &= zero_point is None or zero_point.shape == (zero_words, num_groups)
    if not fits or num_groups == 0 or num_inputs % num_groups:
        zeros = "none" if zero_point is None else tuple(zero_point.shape)
        raise FormatError(
            f"a packed weight of shape {shape} in {num_bits} bits has codes "
            f"{tuple(packed_OW.shape)}, scales {tuple(scale_OG.shape)} and zero points {zeros}, "
            "which do not fit together; make the model again"
        )
    codes_OI = unpack_codes(packed_OW, num_bits, num_inputs)
    if zero_point is None:
        zero_OG = torch.full(scale_OG.shape, float(2 ** (num_bits - 1)))
    else:
        zero_OG = unpack_codes(zero_point.T, num_bits, num_outputs).T.float()
    codes_OGS = codes_OI.view(num_outputs, num_groups, -1).float()
    return ((codes_OGS - zero_OG[..., None]) * scale_OG.float()[..., None]).view(shape)


def expand_float(values_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Return the (O, I) float32 weight that an FP8 layer stands for.

    Args:
        values_OI: (O, I) float8_e4m3fn.
        scale_O1: (O, 1) what they are multiplied by.

    Raises:
        FormatError: the tensors do not fit together.
    """
    if scale_O1.shape != (len(values_OI), 1):
        raise FormatError(
            f"an FP8 weight of shape {tuple(values_OI.shape)} has scales "
            f"{tuple(scale_O1.shape)} (expected ({len(values_OI)}, 1)); make the model again"
        )
    return values_OI.float() * scale_O1.float()


def is_packed(path: Path) -> bool:
    """Say whether a model directory holds weights for ``load_packed``; False for no model."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and (
        quantization.get("quant_method") == "compressed-tensors" or is_nf4(quantization)
    )


def load_packed(path: Path, dtype: Dtype = "bfloat16") -> tuple[Any, Any]:
    """Read a compressed directory and expand its weights.

    Args:
        path: the model's directory.
        dtype: of the weights in memory.

    Returns:
        The transformers model, in evaluation mode, and its tokenizer.

    Raises:
        FormatError: the directory is damaged, or compressed in a way that is not read here.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        tensors = load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise FormatError(
            f"compressed model {path} cannot be read: {error}; make it again"
        ) from None
    try:
        state = expand_state(tensors, _layer_bits(config.quantization_config, path), dtype)
    except FormatError as error:
        raise FormatError(
            str(error) if str(path) in str(error) else f"compressed model {path}: {error}"
        ) from None
    del config.quantization_config
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with without_progress_bars():
        model = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=getattr(torch, dtype)
        )
    return model.eval(), tokenizer


def expand_state(
    tensors: dict[str, Tensor], num_bits: int | LayerBits, dtype: str
) -> dict[str, Tensor]:
    """Turn the tensors of a compressed file into those of a plain one.

    Args:
        tensors: all of the file's, by name.
        num_bits: bits per packed integer code, of all layers or of each; floating-point and NF4
            codes say theirs.
        dtype: of the weights to return.

    Raises:
        FormatError: a part of a compressed layer is missing or does not fit.
    """
    state: dict[str, Tensor] = {}
    bits = LayerBits(num_bits) if isinstance(num_bits, int) else num_bits
    in_nf4 = {name.removesuffix(STATE_SUFFIX) for name in tensors if name.endswith(STATE_SUFFIX)}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight_packed":
            try:
                shape = tensors[f"{layer}.weight_shape"].tolist()
                scale_OG = tensors[f"{layer}.weight_scale"]
            except KeyError as error:
                raise FormatError(f"compressed layer {layer} has no {error}") from None
            width, zero_point = bits.of(layer), tensors.get(f"{layer}.weight_zero_point")
            rows_columns = (int(shape[0]), int(shape[1]))
            try:
                weight = expand_weight(tensor, scale_OG, zero_point, rows_columns, width)
            except FormatError as error:
                raise FormatError(f"compressed layer {layer}: {error}") from None
            state[f"{layer}.weight"] = weight.to(getattr(torch, dtype))
        elif tensor.dtype == torch.float8_e4m3fn:
            scale = tensors.get(f"{name}_scale")
            if scale is None:
                raise FormatError(f"compressed layer {layer} has no {name}_scale")
            state[name] = expand_float(tensor, scale).to(getattr(torch, dtype))
        elif name in in_nf4:
            state[name] = expand_nf4(name, tensors).to(getattr(torch, dtype))
        elif not _is_part(name, part, in_nf4):
            state[name] = tensor
    return state


def _is_part(name: str, part: str, in_nf4: set[str]) -> bool:
    """Say whether a tensor belongs to another, compressed one."""
    if part in ("weight_scale", "weight_zero_point", "weight_shape"):
        return True
    return f"{name.partition('.weight.')[0]}.weight" in in_nf4


def _layer_bits(quantization: Any, path: Path) -> LayerBits:
    """Return the bits per code that ``quantization_config`` declares.

    Raises:
        FormatError: weights are compressed in a way that is not read here.
    """
    document = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if is_nf4(document):
        return LayerBits(4)
    if _is_fp8(document):
        return LayerBits(8)
    bits = read_layer_bits(document)
    if bits is None:
        raise FormatError(
            f"compressed model {path} is of a kind that is not read here (expected format "
            "'pack-quantized' with integer weights in groups, or 'float-quantized' with one set "
            "of 8 bits and a scale per channel, or bitsandbytes' NF4)"
        )
    return bits


def _is_fp8(document: dict[str, Any]) -> bool:
    groups = list((document.get("config_groups") or {}).values())
    weights = groups[0].get("weights") if len(groups) == 1 else None
    if document.get("format") != "float-quantized" or not isinstance(weights, dict):
        return False
    kind = (weights.get("type"), weights.get("strategy"), weights.get("num_bits"))
    return kind == ("float", "channel", 8)
