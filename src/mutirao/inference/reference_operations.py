"""Every operation of a Program as a function of PyTorch tensors: the oracle's arithmetic.

The native kernel is tested against these one by one. They are written to be read and believed,
not to be fast. Sums are float32 in whatever order PyTorch takes, so agreement with the kernel is
to a tolerance.

Shape letters: T tokens, S positions seen so far, I inputs, O outputs, W a buffer's width,
K key/value heads, G query heads per key/value head, D a head's width, R half of rotary_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mutirao.errors import ShapeError
from mutirao.inference.store.planes import BLOCK_COLUMNS

LARGEST_CODE = 127
SMALLEST_BLOCK = 1e-36
"""A block whose largest value is below this has codes of zero: 127 over it may overflow."""


def quantize_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8 by blocks of 32 columns, halves to even.

    Args:
        x_TI: (T, I) float32, I a multiple of 32.

    Returns:
        int8 codes (T, I) from -127 to 127, and float32 scales (T, I / 32): max |x| / 127.

    Raises:
        ShapeError: I is no multiple of 32.
    """
    if x_TI.shape[-1] % BLOCK_COLUMNS:
        raise ShapeError(f"{x_TI.shape[-1]} columns (expected a multiple of {BLOCK_COLUMNS})")
    blocks = split(x_TI, x_TI.shape[-1] // BLOCK_COLUMNS)
    largest = blocks.abs().amax(-1, keepdim=True)
    # Divided by a number, PyTorch would multiply by the reciprocal, which rounds twice.
    inverse = torch.full_like(largest, LARGEST_CODE) / largest
    inverse = torch.where(largest > SMALLEST_BLOCK, inverse, 0.0)
    codes = (blocks * inverse).round().to(torch.int8).flatten(-2)
    return codes, (largest / LARGEST_CODE).squeeze(-1)


def matmul(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, quantize: bool = False
) -> Tensor:
    """Return x W^T + bias.

    Args:
        x_TI: (T, I) float32.
        weight_OI: (O, I) float32, dequantized.
        bias_O: (O,) float32.
        quantize: round x as ``quantize_activations`` does first; so for quantized matrices.

    Returns:
        (T, O) float32.
    """
    if quantize:
        codes, scales = quantize_activations(x_TI)
        blocks = split(codes.float(), scales.shape[-1])
        x_TI = (blocks * scales[..., None]).flatten(-2)
    product = x_TI @ weight_OI.T
    return product if bias_O is None else product + bias_O


def rms_norm(x_TW: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), each of num_groups groups of a row apart.

    Args:
        x_TW: (T, W) float32.
        weight: (W / num_groups,) float32.
        eps: added to the mean square.
        num_groups: groups that share the weight; 1: the whole row.

    References:
        Zhang & Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    groups = split(x_TW, num_groups)
    mean = groups.square().mean(-1, keepdim=True)
    return (groups * torch.rsqrt(mean + eps) * weight).flatten(-2)


def layer_norm(x_TW: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float) -> Tensor:
    """Return weight * (x - mean) / sqrt(variance + eps) + bias, by rows (Ba et al. 2016)."""
    centred = x_TW - x_TW.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight_W + bias_W


def rope(
    x_TW: Tensor,
    positions_T: Tensor,
    frequencies_R: Tensor,
    *,
    num_heads: int,
    interleaved: bool,
    factor: float = 1.0,
) -> Tensor:
    """Turn each head's first 2 R values by position * frequency; the others stay.

    Args:
        x_TW: (T, num_heads * D) float32.
        positions_T: (T,) integers.
        frequencies_R: (R,) float32, radians per token.
        num_heads: heads in a row.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + R).
        factor: multiplies what was turned.

    References:
        Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    heads = split(x_TW, num_heads)
    rotary_dim = 2 * frequencies_R.numel()
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    angles = positions_T.float()[:, None, None] * frequencies_R
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if interleaved:
        x, y = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), -1).flatten(-2)
    else:
        x, y = turned.chunk(2, -1)
        turned = torch.cat((x * cos - y * sin, x * sin + y * cos), -1)
    return torch.cat((turned, rest), -1).flatten(-2)


def attention(
    query_TW: Tensor,
    keys_SW: Tensor,
    values_SW: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions over all of them.

    Args:
        query_TW: (T, num_heads * D) float32.
        keys_SW: (S, num_kv_heads * D), S >= T; the last T rows are the tokens' own.
        values_SW: as keys_SW.
        num_heads: query heads; head h reads key/value head h // (num_heads / num_kv_heads).
        num_kv_heads: key and value heads.
        scale: multiplies the scores.
        window: how many keys a token sees, itself counted; None: all up to itself.

    Returns:
        (T, num_heads * D) float32.
    """
    num_tokens, num_positions = query_TW.shape[0], keys_SW.shape[0]
    query_TKGD = split(split(query_TW, num_kv_heads), num_heads // num_kv_heads)
    keys_SKD = split(keys_SW.float(), num_kv_heads)
    values_SKD = split(values_SW.float(), num_kv_heads)
    scores_KGTS = torch.einsum("tkgd,skd->kgts", query_TKGD, keys_SKD) * scale
    token_T1 = torch.arange(num_positions - num_tokens, num_positions)[:, None]
    key_S = torch.arange(num_positions)
    seen_TS = key_S <= token_T1
    if window is not None:
        seen_TS &= key_S > token_T1 - window
    weights_KGTS = scores_KGTS.masked_fill(~seen_TS, -torch.inf).softmax(-1)
    return torch.einsum("kgts,skd->tkgd", weights_KGTS, values_SKD).flatten(-3)


def activation(x_TW: Tensor, function: str, multiply_by_TW: Tensor | None = None) -> Tensor:
    """Return function(x), or its product with another buffer.

    Args:
        x_TW: (T, W) float32.
        function: a key of ``ACTIVATIONS``.
        multiply_by_TW: (T, W) float32.
    """
    result = ACTIVATIONS[function](x_TW)
    return result if multiply_by_TW is None else result * multiply_by_TW


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def split(x: Tensor, num_parts: int) -> Tensor:
    """Return x, its last axis as two: num_parts, and the rest."""
    return x.reshape(*x.shape[:-1], num_parts, x.shape[-1] // num_parts)
