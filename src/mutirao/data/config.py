"""Settings of the preparation of a silo's text, apart so that a recipe loads in an instant.

The filters that read them pull in datatrove and spaCy; this module pulls in nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mutirao.config import Config

Language = Literal["en", "pt"]


class QualityConfig(Config):
    """Limits of the quality filter."""

    languages: tuple[Language, ...] = Field(default=("en", "pt"), min_length=1)
    """Languages that are kept, of those with a word list here: 'en', 'pt'."""
    min_words: int = Field(default=5, ge=1)
    """Fewest words in a plain text; a record with choices needs 3 in all."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words in a record."""
    short_words: int = Field(default=100, ge=1)
    """Below this many words, only n-grams that repeat count as repetition."""
    language_words: int = Field(default=12, ge=1)
    """Below this many words, a text is not dropped for its language."""
    language_confidence: float = Field(default=0.9, ge=0, le=1)
    """Least confidence (0 to 1) in another language for which a text is dropped."""


class DuplicateConfig(Config):
    """How alike two records must be for the later one to be dropped."""

    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word n-grams from which the later record is dropped, 0 to 1."""
    shingle_words: int = Field(default=5, ge=1, le=50)
    """Words in an n-gram."""
    num_permutations: int = Field(default=128, ge=16, le=1024, multiple_of=16)
    """Length of a MinHash signature."""


class IdentifierConfig(Config):
    """What is done with identifiers of people."""

    mode: Literal["redact", "surrogate", "drop"] = "redact"
    """'redact' puts the type in their place, 'surrogate' a value of the same form, the same for the
    same value, 'drop' leaves out the records that have any."""


class DataConfig(Config):
    """How a silo's text is made ready."""

    quality: QualityConfig = QualityConfig()
    """Limits of the quality filter."""
    duplicates: DuplicateConfig = DuplicateConfig()
    """How alike two records must be for the later one to be dropped."""
    identifiers: IdentifierConfig = IdentifierConfig()
    """What is done with identifiers of people."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """Expected share of records held out for evaluation, between 0 and 1."""
    min_train_records: int = Field(default=20, ge=1)
    """Fewest records to train on; a silo with fewer is refused."""
    min_heldout_records: int = Field(default=1, ge=1)
    """Fewest records to evaluate on; a silo with fewer is refused."""
