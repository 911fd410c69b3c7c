"""Named tensors to payloads and back, by the layout of version 2.

The sender refuses what must not leave, the receiver what must not come in: each with a sentence
that names the tensor. Payloads are uint8 arrays, as journals and messages carry them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError, UpdateError
from mutirao.federated.codec.blocks import (
    GRIDS,
    Grid,
    dequantize_blocks,
    pack_codes,
    quantize_blocks,
    stretches,
    to_blocks,
    unpack_codes,
)
from mutirao.federated.codec.config import CodecConfig
from mutirao.federated.codec.layout import HEADER, check_header, lay_out, write_header
from mutirao.federated.codec.places import read_places, select_largest, write_places
from mutirao.federated.codec.rounding import Dither, from_bfloat16, to_bfloat16
from mutirao.federated.codec.shapes import (
    Shapes,
    Tensors,
    check_names,
    check_tensors,
    count_values,
    shapes_of,
)

Payload: TypeAlias = NDArray[np.uint8]
"""(bytes,) one tensor as it travels."""


def encode_tensors(
    tensors: Tensors, codec: CodecConfig, *, seed: int | None = None
) -> dict[str, Payload]:
    """Encode all tensors of an update, in the order of their names.

    Args:
        tensors: float32, by name.
        codec: how they are written.
        seed: of stochastic rounding; a new one for each site and round.

    Raises:
        UpdateError: a value is not finite; such an update must not leave the site.
        InputError: stochastic rounding has no seed.
    """
    return {name: encode_tensor(name, tensors[name], codec, seed=seed) for name in sorted(tensors)}


def decode_tensors(
    payloads: Mapping[str, NDArray[Any]], shapes: Shapes, codec: CodecConfig
) -> dict[str, NDArray[np.float32]]:
    """Decode all tensors of an update.

    Args:
        payloads: what a site sent; not trusted.
        shapes: what was agreed.
        codec: what was agreed.

    Raises:
        UpdateError: a tensor is missing, unknown or malformed.
    """
    check_names(payloads, shapes, "a site")
    return {
        name: decode_tensor(name, payloads[name], shape, codec) for name, shape in shapes.items()
    }


def encode_tensor(
    name: str, values: NDArray[np.float32], codec: CodecConfig, *, seed: int | None = None
) -> Payload:
    """Encode one tensor into exactly ``count_payload_bytes`` bytes.

    Args:
        name: of the tensor; with the seed, it fixes stochastic rounding.
        values: float32, any shape.
        codec: how they are written.
        seed: of stochastic rounding.

    Returns:
        (bytes,) the payload; the same values, settings and seed give the same bytes anywhere.

    Raises:
        UpdateError: a value is not finite or the type is not float32; nothing must leave.
        InputError: stochastic rounding has no seed.
    """
    check_tensors({name: values}, shapes_of({name: values}), "this site")
    dither = _dither(name, codec, seed)
    values_N = np.ascontiguousarray(values).reshape(-1)
    layout = lay_out(values_N.size, codec)
    payload = np.empty(layout.num_bytes, np.uint8)
    payload[: HEADER.size] = np.frombuffer(write_header(layout, codec), np.uint8)
    places_room, scales_room, values_room = layout.split(payload)
    if codec.is_sparse:
        places_K = select_largest(values_N, layout.num_kept)
        write_places(places_K, layout.size, places_room)
        values_N = values_N[places_K]
    _write_values(values_N, codec, scales_room, values_room, dither)
    return payload


def decode_tensor(
    name: str, payload: NDArray[Any], shape: tuple[int, ...], codec: CodecConfig
) -> NDArray[np.float32]:
    """Decode one tensor, within ``count_decode_bytes`` of memory.

    Args:
        name: of the tensor, for messages.
        payload: what a site sent; not trusted.
        shape: what was agreed.
        codec: what was agreed.

    Returns:
        float32 of that shape, all finite.

    Raises:
        UpdateError: type, length, header, places, scales, codes or values are not as agreed.
    """
    layout = lay_out(count_values(shape), codec)
    is_whole = payload.dtype == np.uint8 and payload.flags.c_contiguous
    if not is_whole or payload.shape != (layout.num_bytes,):
        raise UpdateError(
            f"the payload of tensor {name!r} is {payload.dtype} of shape {payload.shape} "
            f"(expected uint8 of shape ({layout.num_bytes},), in one piece)"
        )
    check_header(payload[: HEADER.size].tobytes(), layout, codec, name)
    places_raw, scales_raw, values_raw = layout.split(payload)
    values_K = np.empty(layout.num_kept, np.float32)
    if not codec.is_sparse:
        _read_values(values_K, codec, scales_raw, values_raw, name)
        return values_K.reshape(shape)
    places_K = read_places(places_raw, layout.size, name)
    _read_values(values_K, codec, scales_raw, values_raw, name)
    values_N = np.zeros(layout.size, np.float32)
    values_N[places_K] = values_K
    return values_N.reshape(shape)


def _dither(name: str, codec: CodecConfig, seed: int | None) -> Dither | None:
    if codec.rounding == "nearest" or codec.format == "fp32":
        return None
    if seed is None:
        raise InputError("stochastic rounding needs a seed; give one for each site and round")
    return Dither(seed, name)


def _write_values(
    values_K: NDArray[np.float32],
    codec: CodecConfig,
    scales_room: NDArray[np.uint8],
    values_room: NDArray[np.uint8],
    dither: Dither | None,
) -> None:
    if codec.format == "fp32":
        values_room.view("<f4")[:] = values_K
    elif codec.format == "bf16":
        halves = values_room.view("<u2")
        for part in stretches(values_K.size):
            halves[part] = to_bfloat16(values_K[part], dither)
    else:
        grid, scales = GRIDS[codec.format], scales_room.view("<f4")
        for part in stretches(values_K.size, codec.block_size):
            blocks_BK = to_blocks(values_K[part], codec.block_size)
            codes_BK, scales_B = quantize_blocks(blocks_BK, grid, dither)
            codes = codes_BK.reshape(-1)[: part.stop - part.start]
            scales[_blocks_of(part, codec)] = scales_B
            values_room[_octets_of(part, grid)] = pack_codes(codes, grid.num_bits)


def _read_values(
    values_K: NDArray[np.float32],
    codec: CodecConfig,
    scales_raw: NDArray[np.uint8],
    values_raw: NDArray[np.uint8],
    name: str,
) -> None:
    """Fill in a payload's values, a stretch at a time."""
    for part in stretches(values_K.size, codec.block_size):
        if codec.format == "fp32":
            values_K[part] = values_raw.view("<f4")[part]
        elif codec.format == "bf16":
            values_K[part] = from_bfloat16(values_raw.view("<u2")[part])
        else:
            grid = GRIDS[codec.format]
            scales_B = _read_scales(scales_raw.view("<f4")[_blocks_of(part, codec)], name)
            num_codes = part.stop - part.start
            codes = _read_codes(values_raw[_octets_of(part, grid)], num_codes, grid, name)
            blocks_BK = dequantize_blocks(to_blocks(codes, codec.block_size), scales_B, grid)
            values_K[part] = blocks_BK.reshape(-1)[:num_codes]
        if not np.isfinite(values_K[part]).all():
            raise UpdateError(f"the payload of tensor {name!r} has values that are not finite")


def _read_scales(scales_B: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if not np.isfinite(scales_B).all() or np.signbit(scales_B).any():
        raise UpdateError(
            f"the payload of tensor {name!r} has a scale that is negative or not finite"
        )
    return scales_B


def _read_codes(
    octets: NDArray[np.uint8], num_codes: int, grid: Grid, name: str
) -> NDArray[np.int8]:
    codes = unpack_codes(octets, grid.num_bits)
    if (codes < grid.lowest).any() or codes[num_codes:].any():
        raise UpdateError(
            f"the payload of tensor {name!r} has codes that no sender writes (expected "
            f"{grid.lowest} to {grid.highest}, and zero in unused bits)"
        )
    return codes[:num_codes]


def _blocks_of(part: slice, codec: CodecConfig) -> slice:
    return slice(part.start // codec.block_size, -(-part.stop // codec.block_size))


def _octets_of(part: slice, grid: Grid) -> slice:
    return slice(part.start * grid.num_bits // 8, -(-part.stop * grid.num_bits // 8))
