"""How much an evaluation measures; light enough to be read by the command line."""

from __future__ import annotations

from pydantic import Field

from mutirao.config import Config


class EvaluationConfig(Config):
    """How much held-out data is used."""

    max_text_tokens: int = Field(default=1_600, ge=2)
    """Tokens per silo that pass through the model for the text loss; at least one record."""
    num_questions: int = Field(default=24, ge=0)
    """Questions per silo; fewer where there are fewer."""
    num_outcomes: int = Field(default=80, ge=0)
    """Outcomes per silo; fewer where there are fewer."""
    max_tokens: int = Field(default=256, ge=8)
    """Longest sequence, in tokens. Of a longer text its beginning is scored; a longer
    context loses its beginning."""
