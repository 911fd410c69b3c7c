"""Error feedback: what one round's rounding lost goes out with the next round's update.

The sender keeps, for each tensor, the difference between what it wanted to send and what the
receiver decodes, and adds it before the next encoding (Seide et al. 2014, Interspeech;
Karimireddy et al. 2019, arXiv:1901.09847). What was decoded over all rounds then differs from
what was meant by the last residual alone. A residual is a plain mapping of float32 arrays: the
journal keeps it beside the reply, and a round that is done again from it gives the same bytes.

A residual carries a site's data from round to round. Under client-level differential privacy the
clip must therefore come after it is added (``clip_norm``; see ``compatibility``).

A reply that the coordinator did not use leaves no residual: the site goes on from the one
before it (``site.local_round.base_round``), and what that round wanted to send is lost.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import InputError
from mutirao.federated.codec.config import CodecConfig
from mutirao.federated.codec.shapes import Shapes, Tensors, check_tensors, shapes_of
from mutirao.federated.codec.tensors import Payload, decode_tensor, encode_tensor


def start_residuals(shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """Return the residuals before the first round: zeros."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def encode_with_feedback(
    tensors: Tensors,
    residuals: Tensors,
    codec: CodecConfig,
    *,
    seed: int | None = None,
    clip_norm: float | None = None,
) -> tuple[dict[str, Payload], dict[str, NDArray[np.float32]]]:
    """Encode an update together with what earlier rounds left behind.

    Args:
        tensors: this round's update.
        residuals: after the round before; unchanged.
        codec: how it is written.
        seed: of stochastic rounding; a new one for each site and round.
        clip_norm: largest L2 norm of what is encoded, residual included; what is cut off is
            lost, not kept. Rounding may lead beyond it again: a bound on what is decoded must
            be enforced on what is decoded.

    Returns:
        The payloads, and the residuals after this round, which are to be kept before anything
        is sent.

    Raises:
        UpdateError: the residuals are not of this update, or a value is not finite.
        InputError: the clip is not positive, or stochastic rounding has no seed.
    """
    check_tensors(residuals, shapes_of(tensors), "this site's journal")
    check_tensors(tensors, shapes_of(tensors), "this site")
    with np.errstate(over="ignore"):  # what overflows is refused by its name when encoded
        wanted = {name: tensors[name] + residuals[name] for name in sorted(tensors)}
    if clip_norm is not None:
        check_tensors(wanted, shapes_of(tensors), "this site")
        wanted = _clip(wanted, clip_norm)
    payloads: dict[str, Payload] = {}
    left: dict[str, NDArray[np.float32]] = {}
    for name, values in wanted.items():
        payloads[name] = encode_tensor(name, values, codec, seed=seed)
        left[name] = values - decode_tensor(name, payloads[name], values.shape, codec)
    return payloads, left


def _clip(
    tensors: dict[str, NDArray[np.float32]], clip_norm: float
) -> dict[str, NDArray[np.float32]]:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise InputError(f"clip_norm={clip_norm} is not supported (expected more than 0)")
    squares = (np.square(each, dtype=np.float64).sum() for each in tensors.values())
    norm = math.sqrt(math.fsum(squares))
    if norm <= clip_norm:
        return tensors
    # Rounded towards zero, so that float32 does not lead beyond the clip again.
    factor = np.float64(clip_norm / norm) * (1 - 2.0**-22)
    return {name: (each * factor).astype(np.float32) for name, each in tensors.items()}
