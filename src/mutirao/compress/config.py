"""What a compression step is asked to do; light enough to be read by the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mutirao.config import Config
from mutirao.errors import RecipeError

SUPPORTED_BITS = (2, 3, 4, 8)


class CompressConfig(Config):
    """How weights are rounded."""

    method: Literal["rtn", "gptq"] = "rtn"
    """'rtn' rounds to the nearest and needs no data; 'gptq' looks at text and lets the weights that
    are left make up for the error of those that were rounded."""
    bits: int = Field(default=4, json_schema_extra={"enum": list(SUPPORTED_BITS)})
    """Bits per weight code: 2, 3, 4 or 8; scales come on top."""
    group_size: int = Field(default=32, ge=8, le=4096)
    """Weights along the input that share a scale and a zero point; must divide every layer's
    input size."""

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int) -> int:
        if bits not in SUPPORTED_BITS:
            accepted = ", ".join(map(str, SUPPORTED_BITS))
            # Not a ValueError: pydantic would wrap it into a longer sentence.
            raise RecipeError(f"compress.bits={bits} is not supported (expected one of {accepted})")
        return bits


class TextConfig(Config):
    """How much text a method looks at, and how much its result is measured on."""

    window_tokens: int = Field(default=256, ge=16)
    """Tokens of a window."""
    calibration_windows: int = Field(default=64, ge=1)
    """Windows that methods look at, spread over the first four fifths of the text."""
    heldout_windows: int = Field(default=48, ge=2)
    """Windows of the last fifth, which no method sees, that the loss is measured on."""
