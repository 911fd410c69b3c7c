"""Which format llama.cpp would give each matrix: for plans of a model that is not there yet.

The rules are those of ``llama_tensor_get_type`` in llama.cpp's src/llama-quant.cpp, without an
importance matrix, for dense models: the head in Q6_K, and in the mixes 'S' and 'M' more bits for
the matrices that suffer most. Only formats that are computed with are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mutirao.errors import InputError
from mutirao.inference.architecture.model_spec import ModelSpec, matrix_shapes
from mutirao.inference.store.plane_formats import BLOCK_COLUMNS, find_format, split_format


@dataclass(frozen=True)
class Mix:
    """One way to quantize a whole model."""

    base: str
    """Format of most matrices."""
    head: str = "Q6_K"
    raised: str = ""
    """Format of some value and down projections; '': none."""
    raises: Callable[[int, int], bool] = lambda layer, num_layers: False
    """Whether those of a layer are."""


def _of_more_bits(layer: int, num_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    is_outer = layer < eighth or layer >= 7 * num_layers // 8
    return is_outer or (layer - eighth) % 3 == 2


MIXES = {
    "BF16": Mix("BF16", head="BF16"),
    "F16": Mix("F16", head="F16"),
    "Q8_0": Mix("Q8_0", head="Q8_0"),
    "Q6_K": Mix("Q6_K"),
    "Q5_K_M": Mix("Q5_K", raised="Q6_K", raises=_of_more_bits),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_0": Mix("Q5_0"),
    "Q4_K_M": Mix("Q4_K", raised="Q6_K", raises=_of_more_bits),
    "Q4_K_S": Mix("Q4_K", raised="Q5_K", raises=lambda layer, num: layer < num // 8),
    "Q4_0": Mix("Q4_0"),
    "Q4_1": Mix("Q4_1", head="Q8_0"),  # as ``mutirao export`` writes it
}
"""By the name that files bear; largest first."""

USUAL = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
"""Those that a plan of a config.json alone compares."""

_INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no whole superblocks."""


def assumed_formats(spec: ModelSpec, quantization: str) -> dict[str, str]:
    """Return the format of each matrix in a weight store, by store name.

    Args:
        spec: the model.
        quantization: a key of MIXES.

    Raises:
        InputError: unknown quantization.
    """
    if quantization not in MIXES:
        raise InputError(
            f"quantization {quantization!r} is not known (expected one of {', '.join(MIXES)})"
        )
    mix = MIXES[quantization]
    head = "token_embd" if spec.tied_head else "output"
    formats = {}
    for name, (_, columns) in matrix_shapes(spec).items():
        wanted = mix.head if name == head else mix.base
        _, _, part = name.partition("blk.")
        layer, _, kind = part.partition(".")
        if kind in ("attn_v", "ffn_down") and mix.raised:
            wanted = mix.raised if mix.raises(int(layer), spec.num_layers) else mix.base
        formats[name] = split_format(_fitting(wanted, columns), columns)
    return formats


def _fitting(wanted: str, num_columns: int) -> str:
    if num_columns % find_format(wanted).block_columns == 0:
        return wanted
    return _INSTEAD.get(wanted, "F16") if num_columns % BLOCK_COLUMNS == 0 else "F16"
