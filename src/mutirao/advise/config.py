"""What an advice is asked to weigh; light enough to be read by the command line."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mutirao.compress.config import TextConfig
from mutirao.config import Config
from mutirao.precision.lifetime import Accelerator

Method = Literal["rtn", "gptq", "awq", "awq,gptq", "gptq,tune"]


class AdviseConfig(Config):
    """What is measured on the model, and what the choice is between."""

    methods: tuple[Method, ...] = Field(default=("rtn", "gptq"), min_length=1)
    """Ways of rounding to choose from; see ``compress.config.CompressConfig``."""
    group_sizes: tuple[int, ...] = Field(default=(32, 64, 128), min_length=1)
    """Weights that share a scale; those that do not divide every layer's inputs are left out."""
    measured_bits: tuple[int, ...] = Field(default=(2, 3, 4, 5, 6, 8), min_length=3)
    """Bits at which rounding to nearest is measured, per channel and in the smallest groups."""
    better_bits: tuple[int, ...] = Field(default=(2, 3, 4), min_length=1)
    """Bits at which the other methods are measured, in the smallest groups."""
    sensitivity_windows: int = Field(default=4, ge=0)
    """Windows, of those to look at, that the parts of the model are rounded for one by one; 0: they
    are not."""
    half_width: float | None = Field(default=None, gt=0, lt=1)
    """Half of the 95 % interval that is wanted for the rise at 4 bits, rounded to nearest, as a
    share of the loss: a first measure says how many windows that takes. None: as they give it."""
    text: TextConfig = TextConfig()
    """Windows to look at and to measure on."""


class Budget(Config):
    """What the model must keep to; None where it does not matter."""

    memory_bytes: int | None = Field(default=None, gt=0)
    """Peak of the whole process that runs it, all weights in memory."""
    disk_bytes: int | None = Field(default=None, gt=0)
    """Of the weights."""
    loss_share: float | None = Field(default=None, gt=0)
    """Rise of the loss over the loss: 0.02 allows 2 %."""


class Outlook(Config):
    """What is known of the model's past and wanted of its future; None where it is not."""

    training_tokens: float | None = Field(default=None, gt=0)
    """D, tokens that it was trained on."""
    is_decayed: bool = True
    """Whether the learning rate had decayed when training ended."""
    num_requests: float | None = Field(default=None, gt=0)
    """In its life."""
    tokens_per_request: float = Field(default=1000, gt=0)
    """Read and written (assumption)."""
    accelerator: Accelerator = Accelerator(
        peak_flops_per_s=989e12, power_w=1000, price_per_hour=2.5
    )
    """What it is trained and served on; by default one H100, 989 TFLOP/s in bfloat16, with its
    share of the host, at 2.50 an hour (assumptions: give your own)."""
