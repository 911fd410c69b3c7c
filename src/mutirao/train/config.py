"""Settings of the training loop; light, so that recipes can be read without PyTorch."""

from __future__ import annotations

from pydantic import Field

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
