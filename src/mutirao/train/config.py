"""Settings of training, plain and private; light, so that recipes are read without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mutirao.config import Config


class TrainConfig(Config):
    """How parameters are changed."""

    learning_rate: float = Field(default=1.2e-2, gt=0)
    """Peak learning rate."""
    final_learning_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the run, as a share of the peak (cosine decay)."""
    warmup_tokens: int = Field(default=1_000, ge=0)
    """Tokens over which the learning rate rises linearly from zero."""
    tokens_per_step: int = Field(default=512, ge=16)
    """Largest padded area of a batch, in tokens; one optimizer step each."""
    max_tokens_per_example: int = Field(default=256, ge=8)
    """Longest example, in tokens; longer text is cut into windows."""
    learn_context: bool = True
    """Learn the given part of questions too, as text of the silo, not their answers alone."""
    outcome_share: float = Field(default=0.4, ge=0, lt=1)
    """Share of the training tokens that records with an outcome get, where there are any."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    tokens_per_pass: int = Field(default=4_096, ge=16)
    """Most tokens in one forward pass over packed text; a larger step is made of several, which
    bounds memory and changes results by rounding only."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """In which matrices are multiplied: 'auto' takes bfloat16 where the processor has fast products
    of it, float32 elsewhere. What is trained is kept in float32 either way."""


class PrivateConfig(Config):
    """How units are sampled, clipped and blurred."""

    num_units: int = Field(ge=1)
    """Number of units as it may be known to all, rounded if need be. Sampling and scale follow
    from it, however many units there really are, so that the real number stays a secret."""
    units_per_step: float = Field(gt=0)
    """Expected number of units in a step, at most num_units."""
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)
    """Standard deviation of the noise, as a multiple of max_unit_norm; 0 gives no privacy."""
    max_unit_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Global norm that a unit's gradient is scaled down to; the gradient is of the loss summed
    over the unit's learned tokens, in nats."""
    records_per_pass: int = Field(default=16, ge=1)
    """Most records in one forward pass; bounds memory, changes results by rounding only."""
    is_vectorized: bool = False
    """Pass several units at once, where all that is trained are weights and biases of linear
    layers, and take their gradients apart afterwards."""

    @property
    def sampling_probability(self) -> float:
        """Probability that a unit takes part in a step."""
        return self.units_per_step / self.num_units

    @model_validator(mode="after")
    def _check_probability(self) -> PrivateConfig:
        if self.units_per_step > self.num_units:
            raise ValueError(
                f"units_per_step={self.units_per_step:g} is not accepted (expected at most "
                f"num_units={self.num_units})"
            )
        return self
