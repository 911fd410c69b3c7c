"""Settings of adapters; light, so that recipes can be read without PyTorch."""

from __future__ import annotations

from pydantic import Field

from mutirao.config import Config


class LoRAConfig(Config):
    """Which low-rank updates are trained."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of each update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale numerator: updates are multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Names of the linear layers that get an update."""
    num_layers: int = Field(default=4, ge=0)
    """Only the last so many layers get updates, which spares the backward pass through the
    others; 0 for all."""
    freeze_a: bool = True
    """Train B alone (FFA-LoRA): sums of sites' updates are exact, and half the size."""
    quantize_base: bool = False
    """Keep the frozen base in 4 bits while training (QLoRA), which needs the extra 'qlora'; the
    adapter is merged into the base as it was."""
