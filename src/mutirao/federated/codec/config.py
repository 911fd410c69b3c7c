"""Settings of the codec: how many bits a value takes on the wire, and which values go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mutirao.config import Config

MAX_BLOCK_SIZE = 16_384
"""So that a working stretch holds at least four whole blocks (``blocks.stretches``)."""


class CodecConfig(Config):
    """How each tensor of an update is written; agreed before a run, the same at every site."""

    format: Literal["fp32", "bf16", "int8", "int4", "int2"] = "int8"
    """Form of a value: float32, bfloat16, or integer codes of 8, 4 or 2 bits with scales."""
    block_size: int = Field(default=256, ge=1, le=MAX_BLOCK_SIZE)
    """Values that share a float32 scale, in the integer formats: 4 bytes for each block."""
    keep_one_in: int = Field(default=1, ge=1)
    """1 sends every value; n sends the largest ceil(size / n) of each tensor and their places."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To nearest, ties to even; or up or down at random so that the mean is right, by a seed."""

    @property
    def is_sparse(self) -> bool:
        """Whether only the largest values go, with their places."""
        return self.keep_one_in > 1
